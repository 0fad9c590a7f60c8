"""Spaces of recipes: what they hold, what they refuse, how packaged studies fit another model."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tsotsallm.errors import RecipeError, StudyError
from tsotsallm.study.space import Space
from tsotsallm.study.spec import packaged_specs, read_spec, spec_from
from tsotsallm.study.strategies import All

STAGES = [{"depth": {"remove": {"one_of": [0, 1, 2]}, "importance": "magnitude"}},
          {"one_of": [{"sparsity": {"prune": 2, "group": {"one_of": [4, 8]}}}, "none"]},
          {"quantize": {"grid": {"one_of": ["q4_0", "q4_k"]}, "damp": {"from": 0.001, "to": 0.1, "log": True}}}]


def test_a_space_holds_every_combination_once() -> None:
    stages = [*STAGES[:2], {"quantize": {"grid": {"one_of": ["q4_0", "q8_0"]}}}]
    space = Space.read({"stages": stages})
    recipes = [space.recipe(values) for values in space.all()]
    assert space.size == 3 * 2 * 2 * 2
    assert len(recipes) == len({str(recipe.plain()) for recipe in recipes}) == 3 * 3 * 2    # without sparsity group is idle
    names = [[stage.name for stage in recipe.stages] for recipe in recipes]
    assert ["quantize"] in names
    assert ["depth", "sparsity", "quantize"] in names


def test_orders_and_conditions() -> None:
    space = Space.read({
        "stages": [{"sparsity": {"prune": 2, "group": {"one_of": [4, 8]}}}, {"adapt": {"rank": {"one_of": [2, 4]}}}],
        "order": {"one_of": [["sparsity", "adapt"], ["adapt", "sparsity"]]},
        "conditions": [{"when": {"sparsity.group": 8}, "then": {"adapt.rank": [4]}}]})
    found = [[(stage.name, stage.fields()) for stage in space.recipe(values).stages] for values in space.all()]
    assert len(found) == 6
    assert all(dict(stages)["adapt"]["rank"] == 4 for stages in found if dict(stages)["sparsity"]["group"] == 8)
    assert {stages[0][0] for stages in found} == {"sparsity", "adapt"}


def test_draws_are_those_of_their_seed_and_stay_inside() -> None:
    space = Space.read({"stages": STAGES})
    draws = [space.draw(random.Random(seed)) for seed in range(50)]
    assert draws == [space.draw(random.Random(seed)) for seed in range(50)]
    assert all(0.001 <= draw["quantize.damp"] <= 0.1 for draw in draws)
    assert sum(draw["quantize.damp"] < 0.01 for draw in draws) in range(15, 36)     # even by the logarithm
    with pytest.raises(StudyError, match="range without steps"):
        list(space.all())


@pytest.mark.parametrize(("content", "message"), [
    ({}, "one of them"),
    ({"stages": []}, "space is empty"),
    ({"recipes": {}}, "recipes is empty"),
    ({"stages": [{"depth": {"remove": {"one_of": []}}}]}, "at least one choice"),
    ({"stages": [{"depth": {"remove": {"from": 3, "to": 1}}}]}, "range from 3 to 1 is empty"),
    ({"stages": [{"depth": {"remove": {"from": 1}}}]}, "take numbers"),
    ({"stages": [{"one_of": [{"depth": {"remove": {"one_of": [0, 1]}}}, {"depth": {"remove": {"one_of": [2, 3]}}}]}]},
     "open in two places"),
    ({"stages": ["gptq:4"], "conditions": [{"when": {"depth.remove": 1}, "then": {}}]}, "not an open value"),
    ({"stages": STAGES[:1], "conditions": [{"when": {"depth.remove": [1]}, "then": {"depth.remove": [9]}}]}, "can never be"),
    ({"stages": STAGES[:1], "conditions": [{"when": {"depth.remove": [0, 1]}, "then": {"depth.remove": [2]}},
                                           {"when": {"depth.remove": 2}, "then": {"depth.remove": 1}}]}, "contradict"),
    ({"stages": ["gptq:4"], "strategy": "guess"}, "test.strategy is 'guess'"),
    ({"stages": ["gptq:4"], "strategy": "random"}, "never ends by itself"),
    ({"stages": ["gptq:4"], "strategy": "halving", "trials": 4}, "size_limit"),
    ({"stages": ["gptq:4"], "objectives": ["joy"]}, "test.objectives\\[0\\] is 'joy'"),
    ({"stages": ["gptq:4"], "evaluation": {"cheap": 9, "full": 4}}, "the smaller"),
    ({"stages": ["gptq:4"], "trials": 0}, "1 or more"),
    ({"stages": ["gptq:4"], "colour": "red"}, "test has no option 'colour'"),
    ({"stages": ["gptq:4"], "evaluation": [1, 2]}, "test.evaluation is .* it takes keys and values"),
    ({"stages": ["gptq:4"], "calibration": {"windows": "many"}}, "test.calibration.windows is 'many'; it takes a whole"),
    ({"stages": ["gptq:4"], "seed": True}, "test.seed is True"),
    ({"stages": [{"quantize": {"bits": {"from": 1, "to": 10**15}}}]}, "more than 10000"),
    ({"stages": [{"quantize": [1]}]}, "it takes keys and values"),
    ({"stages": [{"one_of": [7]}]}, "stage 1 is 7"),
    ({"stages": ["gptq:4"], "order": {"one_of": ["quantize"]}}, "lists of stages by name"),
    ({"stages": ["gptq:4"], "order": {}}, "take numbers"),
    ({"stages": ["gptq:4"], "needs": {"questions": "a file"}}, r"given=\{.questions.: FILE\}"),
])
def test_what_makes_no_study_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(StudyError, match=message):
        spec_from("test", content, layers=4)


def test_every_recipe_of_a_space_is_read_before_a_study_begins() -> None:
    stages = [{"depth": {"remove": {"one_of": [0, 1]}, "protect": {"last": "many"}}}]      # wrong only where a layer goes
    with pytest.raises(RecipeError, match="protect"):
        spec_from("test", {"stages": stages}, layers=4)
    wide = {"stages": [*stages, {"quantize": {"damp": {"from": 0.1, "to": 0.2}}}], "strategy": "random", "trials": 1}
    with pytest.raises(RecipeError, match="protect"):
        spec_from("test", wide, layers=4)


@pytest.mark.parametrize(("name", "recipes"), [("reference-pruning", 43), ("reference-pipeline", 120),
                                               ("reference-order", 38), ("franken", 25), ("quick", 8),
                                               ("approaches", 50)])
def test_packaged_studies(name: str, recipes: int) -> None:
    given = {"questions": "some.jsonl"} if name in ("reference-pipeline", "reference-order") else {}
    spec = read_spec(name, layers=16, given=given)
    assert spec.space.size == recipes
    assert name in packaged_specs()


def test_recipes_that_need_a_value_are_left_out_where_it_is_optional() -> None:
    spec = read_spec("approaches", layers=30)
    assert "vocabulary, vocabulary+mixture-4.5 left out" in spec.notes[0]
    assert "--set texts=PATH" in spec.notes[0]
    whole = read_spec("approaches", layers=30, given={"texts": "texts/"})
    assert (whole.space.size, whole.notes) == (52, ())
    assert whole.space.recipe({"recipe": "vocabulary"}).stages[0].fields()["keep"] == ["texts/"]
    with pytest.raises(StudyError, match=r"does not need 'text'; did you mean 'texts'"):
        read_spec("approaches", layers=30, given={"text": "texts/"})


@pytest.mark.parametrize("layers", [14, 16, 30])
def test_every_packaged_recipe_can_be_read(layers: int) -> None:
    for name in packaged_specs():
        given = {"questions": "some.jsonl"} if name in ("reference-pipeline", "reference-order") else {}
        space = read_spec(name, layers=layers, given=given).space
        strategy = All(space, ("kl", "bytes"), 0)
        for number in range(space.size):
            proposal = strategy.propose(number, [])
            assert proposal is not None
            assert space.recipe(proposal.values).stages


def test_layers_are_rescaled_to_the_model() -> None:
    """The pruning study is of 16 layers; of 32 twice as many go, of 8 half as many."""
    for layers, wanted in ((16, 8), (32, 16), (8, 4)):
        space = read_spec("reference-pruning", layers=layers).space
        [stage] = space.recipe({"recipe": "depth-8"}).stages
        assert stage.fields()["remove"] == wanted
    assert read_spec("reference-pruning", layers=4).space.recipe({"recipe": "depth-2"}).stages[0].fields()["remove"] == 1
    orders = read_spec("franken", layers=16).space.recipe({"recipe": "0-7"}).stages[0].fields()["order"]
    assert orders == [0, 1, 2, 3]


def test_a_trial_is_named_by_what_is_open() -> None:
    space = Space.read({"stages": [{"depth": {"remove": {"one_of": [0, 2]}, "importance": "cosine"}},
                                   {"quantize": {"grid": {"one_of": ["q4_0", "q4_k"]}, "damp": {"one_of": [0.01, 0.1]}}}]})
    assert space.name({"depth.remove": 2, "quantize.grid": "q4_k", "quantize.damp": 0.1}) == (
        "depth 2, quantize.grid q4_k, quantize.damp 0.1")
