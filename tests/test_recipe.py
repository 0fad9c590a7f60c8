"""Recipes: three ways to write them, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import RecipeError
from tsotsallm.recipe import Recipe, packaged_recipes
from tsotsallm.stages.layers import expand


@pytest.mark.parametrize(("short", "plain"), [
    ("depth:2", [{"depth": {"remove": 2}}]),
    ("depth:2:taylor", [{"depth": {"remove": 2, "importance": "taylor"}}]),
    ("wanda:2:4, gptq:4", [{"sparsity": {"prune": 2, "group": 4}}, {"quantize": {"bits": 4}}]),
    ("wanda:0.5", [{"sparsity": {"prune_fraction": 0.5}}]),
    ("sparsegpt:1:8", [{"sparsity": {"method": "sparsegpt", "prune": 1, "group": 8}}]),
    ("rtn:3:64", [{"quantize": {"method": "rtn", "bits": 3, "group": 64}}]),
    ("gptq:4:channel", [{"quantize": {"bits": 4, "group": "channel"}}]),
    ("layers:0-3+5+6+6", [{"layers": {"order": ["0-3", 5, 6, 6]}}]),
    ("skip:3+7-9", [{"layers": {"skip": [3, "7-9"]}}]),
    ("", []),
])
def test_one_line_means_the_same_as_yaml(short: str, plain: list[object]) -> None:
    one, other = Recipe.parse(short), Recipe.parse(plain)
    assert [stage.name for stage in one.stages] == [stage.name for stage in other.stages]
    for first, second in zip(one.stages, other.stages, strict=True):
        if first.name == "layers":
            assert first.resolve(12) == second.resolve(12)  # type: ignore[attr-defined]
        else:
            assert first == second


def test_inline_yaml_and_files_and_plain_data_round_trip(tmp_path: Path) -> None:
    text = "[{depth: {remove: 2}}, {quantize: {bits: 4}}]"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.parse(text)
    assert Recipe.parse(tmp_path / "recipe.yaml") == recipe
    assert Recipe.parse(recipe.plain()) == recipe


def test_an_empty_file_is_not_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(RecipeError, match="is empty"):
        Recipe.parse(tmp_path / "empty.yaml")


def test_layers_named_in_json_are_numbers_again() -> None:
    import json

    recipe = Recipe.parse("[{sparsity: {prune: 2, group: 4, per_layer: {1: {prune: 1}}}}]")
    assert Recipe.parse(json.loads(json.dumps(recipe.plain()))) == recipe


def test_packaged_recipes_parse() -> None:
    assert len(packaged_recipes()) >= 4
    for name in packaged_recipes():
        assert Recipe.parse(name).stages


@pytest.mark.parametrize(("recipe", "message"), [
    ("wandda:2:4", "did you mean 'wanda'"),
    ("wanda:2", "above 0, below 1"),
    ("wanda:4:4", "fewer than the group"),
    ("wanda:x:4", "not a whole number"),
    ("gptq", "written gptq:BITS"),
    ("gptq:9", "from 2 to 8"),
    ("gptq:4:", "incomplete"),
    ("[{quantise: {bits: 4}}]", "did you mean 'quantize'"),
    ("[{quantize: {bit: 4}}]", "did you mean 'bits'"),
    ("[{quantize: {bits: four}}]", "takes a whole number from 2 to 8"),
    ("[{quantize: {method: gptqq}}]", "did you mean 'gptq'"),
    ("[{quantize: {bits: 4, bits_per_wait: 3}}]", "no option 'bits_per_wait'; did you mean 'bits_per_weight'"),
    ("[{depth: {remove: 2, protect: {frist: 1}}}]", "did you mean 'first'"),
    ("[{depth: {remove: 2, importance: luck}}]", "known: cosine"),
    ("[{layers: {order: [0-3], skip: [2]}}]", "either `order`"),
    ("[{layers: {order: [a]}}]", "takes layer numbers"),
    ("[{layers: {repeat: {3: 0}}}]", "whole number from 1"),
    ("[{sparsity: {prune: 2, group: 4, prune_fraction: 0.5}}]", "either"),
    ("[{sparsity: {prune_fraction: 1.5}}]", "above 0, below 1"),
    ("[{sparsity: {prune: 2, group: 4, per_layer: {3: {pruned: 1}}}}]", "did you mean 'prune'"),
    ("[{depth: 2}]", "takes keys and values"),
    ("[3]", "written as"),
    ("[{", "not valid YAML"),
    ("[{depth: {remove: 2020-99-99}}]", "not valid YAML"),
    ("[{layers: {repeat: {1.5: 2}}}]", "the key 1.5"),
    ("layers:0-9999999999", "no model has that many"),
    ("[{layers: {repeat: {0: 1000000000}}}]", "from 1 to 100"),
    ("gptq:²", "there is no grid"),
    ("[{quantize: {damp: .nan}}]", "a number, 0 or more"),
    ("missing.yaml", "cannot be read"),
])
def test_wrong_recipes_are_refused_with_a_remedy(recipe: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(recipe)


@pytest.mark.parametrize(("recipe", "message"), [
    ("depth:3", "only 0 can go"),
    ("skip:7", "layers 0 to 3"),
    ("skip:0-3", "leaves no layer"),
    ("skip:0, skip:3", "layers 0 to 2"),
    ("gptq:4:128", "usable groups: 2, 4, 8, 16, 32, or channel"),
    ("wanda:2:5", "usable groups: 2, 4, 8, 16, 32"),
    ("[{sparsity: {prune: 2, group: 4, protect: {first: 2, last: 2}}}]", "protects all"),
    ("rtn:4:32, wanda:2:4", "put sparsity first"),
    ("rtn:4:32, rtn:3:32", "quantizes twice"),
])
def test_recipes_that_do_not_fit_the_model_are_refused(tiny: Path, recipe: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(recipe).check(Checkpoint.open(tiny).spec)


@pytest.mark.parametrize("recipe", [
    "[" * 5000, "[{" + "x" * 9000 + ": {}}]", f"[{{quantize: {{bits: {'y' * 9000}}}}}]", "gptq:" + "9" * 5000, "z" * 9000,
    f"[{{depth: {{remove: {'9' * 900}}}}}]", "[{quantize: {bits: 4}\n{\n\n", f"[{'[1], ' * 900}]",
    f"[{{quantize: {{group: [{'1, ' * 4000}]}}}}]"])
def test_refusals_are_short_and_of_one_line(recipe: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe.parse(recipe)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_a_recipe_file_may_begin_with_a_byte_order_mark_and_must_be_text(tmp_path: Path) -> None:
    (tmp_path / "marked.yaml").write_bytes(b"\xef\xbb\xbf- quantize: {bits: 4}\n")
    assert Recipe.parse(tmp_path / "marked.yaml") == Recipe.parse("gptq:4")
    (tmp_path / "binary.yaml").write_bytes(b"- \xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8 text"):
        Recipe.parse(tmp_path / "binary.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match="is a directory"):
        Recipe.parse(tmp_path / "folder.yaml")


def test_neighbouring_edits_share_a_sweep() -> None:
    recipe = Recipe.parse("depth:1, wanda:2:4, gptq:4, skip:1, rtn:3")
    assert [[stage.name for stage in (*sweep.choices, *sweep.edits)] for sweep in recipe.sweeps()] == [
        ["depth", "sparsity", "quantize"], ["layers", "quantize"]]
    assert len(recipe.sweeps(one_stage_each=True)) == 5


def test_ranges_expand_both_ways() -> None:
    assert expand(["0-3", 5, "8-6"], "x") == [0, 1, 2, 3, 5, 8, 7, 6]


def test_the_reference_layer_orders_resolve() -> None:
    import yaml

    from tests.conftest import shared

    found = yaml.safe_load(shared("reference", "franken_layer_orders.yaml").read_text())
    for configuration in found["configurations"]:
        stage = Recipe.parse([{"layers": {"order": configuration["order"]}}]).stages[0]
        assert stage.resolve(found["layers"]) == configuration["order"]  # type: ignore[attr-defined]


def test_per_layer_lists_move_with_their_layers(tmp_path: Path) -> None:
    from tests.conftest import build
    from tsotsallm.checkpoint.view import View

    source = Checkpoint.open(build(tmp_path / "qwen2", "qwen2"))
    kinds = source.spec.hf_config.layer_types
    moved: ModelSpec = View.of(source).reordered([3, 0, 0]).spec
    assert moved.hf_config.layer_types == [kinds[3], kinds[0], kinds[0]]


def test_an_unknown_grid_says_what_it_is() -> None:
    with pytest.raises(RecipeError, match="there is no grid 'q4_9'; did you mean"):
        Recipe.parse_text("gptq:q4_9")


def test_a_blank_in_place_of_a_comma_is_named() -> None:
    with pytest.raises(RecipeError, match="a comma is missing before 'gptq:4'"):
        Recipe.parse("wanda:2:4 gptq:4")
    assert len(Recipe.parse("wanda:2:4,gptq:4 , eora:8").stages) == 3
