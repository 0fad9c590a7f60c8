"""Records checked by pydantic, and the JSON Schema that follows from them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import yaml
from pydantic import Field

from tsotsallm.api.schema import schema
from tsotsallm.errors import RecipeError, TsotsallmError
from tsotsallm.evaluation.tasks import packaged_tasks, read_task
from tsotsallm.recipe import Recipe, packaged_recipes
from tsotsallm.stages import STAGES
from tsotsallm.study.spec import packaged_specs
from tsotsallm.validation import HIDDEN, RULES, Count, Natural, Part, checked, schema_of


@dataclass(frozen=True)
class Inside:
    """What stands inside.

    first  at the beginning
    """

    __pydantic_config__ = RULES
    first: Natural
    last: Natural = 0


@dataclass(frozen=True)
class Example:
    """An example. Its second sentence is not in the schema.

    bits         2 to 8, of every number
                 that is stored
    low, high    both ends
    """

    __pydantic_config__ = RULES
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group: Count | Literal["channel", "auto"] = "auto"
    share: Part | None = None
    method: Literal["gptq", "rtn"] = "gptq"
    low: float = 0.0
    high: float = 1.0
    fast: bool = False
    inside: Inside | None = None
    texts: Annotated[list[str], Field(min_length=1)] | None = None
    order: list[int | str] | None = None
    per_layer: dict[Annotated[int, Field(strict=False)], Inside] = field(default_factory=dict)
    found: int | None = field(default=None, metadata={HIDDEN: True})


@pytest.mark.parametrize(("content", "message"), [
    ({"bits": 9}, "here.bits is 9; it takes a whole number from 2 to 8"),
    ({"bits": "4"}, "here.bits is '4'; it takes a whole number from 2 to 8"),
    ({"bits": True}, "here.bits is True; it takes a whole number from 2 to 8"),
    ({"bits": 4.0}, "here.bits is 4.0; it takes a whole number from 2 to 8"),
    ({"bits": 1 << 70}, "here.bits is 1180591620717411303424, which is too large for anything"),
    ({"share": 1}, "here.share is 1; it takes a number, 0 or more, below 1"),
    ({"share": float("inf")}, "here.share is inf; it takes a number, 0 or more, below 1"),
    ({"low": float("nan")}, "here.low is nan; it takes a number"),
    ({"group": 0}, "here.group is 0; it takes a whole number, 1 or more, or channel or auto"),
    ({"method": "gtpq"}, "here.method is 'gtpq'; did you mean 'gptq'? (known: gptq, rtn)"),
    ({"method": 4}, "here.method is 4; it takes gptq or rtn"),
    ({"fast": 1}, "here.fast is 1; it takes true or false"),
    ({"inside": 3}, "here.inside is 3; it takes keys and values, such as {first, last}"),
    ({"inside": {"first": -1}}, "here.inside.first is -1; it takes a whole number, 0 or more"),
    ({"inside": {"frist": 1}}, "here.inside has no option 'frist'; did you mean 'first'? (known: first, last)"),
    ({"inside": {}}, "here.inside lacks first, which is a whole number, 0 or more"),
    ({"texts": []}, "here.texts is []; it takes a list of texts, at least one"),
    ({"texts": ["a", 7]}, "here.texts[1] is 7; it takes text, so write it in quotes"),
    ({"order": [0, "1-3", 2.5]}, "here.order[2] is 2.5; it takes a whole number, or text"),
    ({"per_layer": {"a": {"first": 1}}}, "here.per_layer has the key 'a', which it does not take"),
    ({"per_layer": {3: {"first": -1}}}, "here.per_layer.3.first is -1; it takes a whole number, 0 or more"),
    ({"found": 3}, "here has no option 'found' (known: bits, fast, group, high, inside, low, method, order, per_layer, "
                   "share, texts)"),
    ({"bit": 3}, "here has no option 'bit'; did you mean 'bits'? (known: bits, fast, group, high, inside, low, method, "
                 "order, per_layer, share, texts)"),
    ([4], "here has the value [4]; it takes keys and values, such as {bits, group, share, method, low, high, fast, inside, "
          "texts, order, per_layer}")])
def test_what_a_record_does_not_take_is_named_with_what_it_takes(content: object, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        checked(Example, content, "here", RecipeError)
    assert str(refused.value) == message


def test_what_a_record_takes() -> None:
    content = {"bits": 3, "group": "channel", "low": 1, "inside": {"first": 2}, "texts": ("a",), "order": [1, "3-4"],
               "per_layer": {"7": {"first": 0}}}
    made = checked(Example, content, "here", RecipeError)
    assert made == Example(bits=3, group="channel", low=1.0, inside=Inside(2), texts=["a"], order=[1, "3-4"],
                           per_layer={7: Inside(0)})
    assert isinstance(made.low, float)


def test_the_schema_of_a_record_is_described_by_its_docstring() -> None:
    found = schema_of(Example)
    assert found["description"] == "An example. Its second sentence is not in the schema."
    assert {name: part.get("description") for name, part in found["properties"].items() if "description" in part} == {
        "bits": "2 to 8, of every number that is stored", "low": "both ends", "high": "both ends"}
    assert found["properties"]["bits"] == {"description": "2 to 8, of every number that is stored", "type": "integer",
                                           "minimum": 2, "maximum": 8, "default": 4}
    assert "found" not in found["properties"]


WHOLE = jsonschema.Draft202012Validator(schema())


def test_the_whole_schema_is_one_and_the_command_prints_it() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    printed = subprocess.run([sys.executable, "-m", "tsotsallm", "recipes", "--schema"], capture_output=True, check=True)
    assert json.loads(printed.stdout) == json.loads(json.dumps(schema()))


@pytest.mark.parametrize("file", [*packaged_recipes().values(), *packaged_specs().values(), *packaged_tasks().values()],
                         ids=lambda file: file.name)
def test_packaged_files_fit_the_schema(file: Any) -> None:
    content = json.loads(json.dumps(yaml.safe_load(file.read_text("utf-8"))))      # JSON has texts as keys
    assert [error.message for error in WHOLE.iter_errors(content)] == []


def test_every_option_of_every_stage_is_described() -> None:
    lacking = []
    for name, stage in STAGES.items():
        whole = stage.schema()
        for kind in whole.get("anyOf", [whole]):
            lacking += [f"{name}.{option}" for option, part in kind["properties"].items() if "description" not in part]
    assert lacking == []


@pytest.mark.parametrize("recipe", [
    "[{quantize: {bits: 9}}]", "[{quantize: {grid: q9}}]", "[{quantise: {bits: 4}}]", "[{quantize: {bit: 4}}]", "[3]",
    "[{depth: {remove: -1}}]", "[{depth: {remove: 2, protect: {frist: 1}}}]", "[{depth: {remove: 1}, layers: {}}]",
    "[{sparsity: {prune_fraction: 1.5}}]", "[{layers: {repeat: {3: 0}}}]", "[{vocabulary: {keep: []}}]", "[gptqq:4]",
    "[{adapt: {data: 7}}]", "[{adapt: {select: {graph: a.ttl, share: 2}}}]", "[{quantize: {damp: -1}}]"])
def test_what_the_schema_refuses_the_program_refuses(recipe: str) -> None:
    assert list(WHOLE.iter_errors(json.loads(json.dumps(yaml.safe_load(recipe)))))
    with pytest.raises(TsotsallmError):
        Recipe.parse(recipe)


@pytest.mark.parametrize("study", [
    {"stages": ["gptq:4"], "strategy": "guess"}, {"stages": ["gptq:4"], "objectives": ["joy"]}, {"colour": "red"},
    {"stages": [{"depth": {"remove": {"one_of": []}}}]}, {"stages": [{"depth": {"remove": {"from": 1}}}]}])
def test_studies_that_the_schema_refuses(study: dict[str, Any]) -> None:
    assert list(WHOLE.iter_errors(study))


def test_open_values_fit_the_schema_of_a_study_and_of_no_recipe() -> None:
    stages = [{"depth": {"remove": {"one_of": [0, 1]}}}, {"one_of": ["gptq:4", {"quantize": {"grid": "q4_k"}}]},
              {"adapt": {"learning_rate": {"from": 1e-4, "to": 1e-2, "log": True}}}]
    assert not list(WHOLE.iter_errors({"stages": stages}))
    assert list(WHOLE.iter_errors(stages))


def test_a_task_that_the_schema_refuses() -> None:
    task = {"kind": "answers", "layouts": [{"prompt": "{{q}}", "answers": "a"}]}
    assert not list(WHOLE.iter_errors(task))
    assert list(WHOLE.iter_errors(task | {"judge": "luck"}))
    assert read_task("world-closed").kind == "answers"
