"""A study as data: SPEC.yaml says what is tried, how, on what and for how long; it is checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.errors import StudyError, nearest
from tsotsallm.files import Json, JsonObject, parse_yaml, quoted, read_utf8
from tsotsallm.recipe import recipe_schema
from tsotsallm.study.space import Space
from tsotsallm.study.trial import Setup
from tsotsallm.units import bytes_from_text
from tsotsallm.validation import RULES, Count, Positive, checked, schema_of

STORE_BYTES, STORED_MODELS = 4 << 30, 6
"""Bytes, and models of the original's size: what recipes have in common takes at most the larger of both on disk."""

Objective = Literal["kl", "perplexity", "loss", "bytes", "parameters", "nonzero_parameters", "decode"]

@dataclass(frozen=True)
class CalibrationKeys:
    """What recipes are calibrated on: `windows` windows of `window` tokens of a text.

    source   a file, a folder of texts, or a hub data set; by default the one that `compress` takes
    windows  how many windows
    window   tokens of a window
    seed     of the draw
    """

    __pydantic_config__ = RULES
    source: str | None = None
    windows: Count | None = None
    window: Count | None = None
    seed: int | None = None


@dataclass(frozen=True)
class EvaluationKeys:
    """How trials are evaluated.

    text     whose perplexity is measured; by default the embedded world's test text
    context  tokens of a window
    cheap    windows of the first evaluation, which decides whether a trial is evaluated fully; empty: all are
    full     windows of the full evaluation
    tasks    tasks of the full evaluation, by name or file
    data     the tasks' data
    limit    items of each task
    speed    whether a GGUF file is written and timed in llama.cpp
    country  ISO code, with which energy is measured or estimated
    """

    __pydantic_config__ = RULES
    text: str | None = None
    context: Count | None = None
    cheap: Count | None = 8
    full: Count = 60
    tasks: str | list[str] | None = None
    data: str | None = None
    limit: Count | None = None
    speed: bool | None = None
    country: str | None = None

    def __post_init__(self) -> None:
        if self.cheap is not None and self.cheap > self.full:
            raise StudyError(f"evaluation.cheap is {self.cheap} and full is {self.full}; they take numbers of windows, of "
                             "which cheap is the smaller")


@dataclass(frozen=True)
class StudyFile:
    """A study as its file has it.

    about        what it is to find out, in a sentence
    needs        NAME: what it is; `$NAME` stands for a value that whoever runs the study gives with --set
    optional     NAME: what it is; without a value for it, recipes that have `$NAME` are left out
    layers       of the model that its numbers of layers are for; for another model they are rescaled
    stages       stages with open values: {one_of: [...]} or {from:, to:, step: or log:}
    order        the orders that the stages may have: {one_of: [[depth, quantize], [quantize, depth]]}
    conditions   {when: {NAME: values}, then: {NAME: values}}
    recipes      NAME: RECIPE instead of stages
    strategy     all, random, tpe, nsga2; or halving: many recipes under `size_limit` bytes are evaluated on little text, the
                 best third on three times as much, and so on
    objectives   measures to minimise; `decode` counts as seconds per token
    trials       at most this many
    hours        no trial begins later than this
    seed         of all draws
    size_limit   the largest model that counts, such as 700MB
    cycle        trials after which the notebook draws a conclusion
    calibration  what recipes are calibrated on
    evaluation   how trials are evaluated
    published    figures of others, for comparison
    """

    __pydantic_config__ = RULES
    about: str | int | float = ""
    needs: JsonObject = field(default_factory=dict)
    optional: JsonObject = field(default_factory=dict)
    layers: Count | None = None
    stages: list[Json] | None = None
    order: JsonObject | None = None
    conditions: list[Json] = field(default_factory=list)
    recipes: dict[str | int | float, Json] | None = None
    strategy: Literal["all", "random", "tpe", "nsga2", "halving"] = "all"
    objectives: Annotated[list[Objective], Field(min_length=1)] = field(default_factory=lambda: ["kl", "bytes"])
    trials: Count | None = None
    hours: Positive | None = None
    seed: int = 0
    size_limit: str | int | None = None
    cycle: Count = 8
    calibration: CalibrationKeys = field(default_factory=CalibrationKeys)
    evaluation: EvaluationKeys = field(default_factory=EvaluationKeys)
    published: JsonObject = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.stages is None) == (self.recipes is None):
            raise StudyError("a study's space is either `stages` with open values or `recipes` by name; give one of them")
        if "decode" in self.objectives and self.evaluation.speed is False:
            raise StudyError("the objective decode needs evaluation.speed; leave out speed: false, or the objective")
        if self.strategy == "halving" and self.size_limit is None:
            raise StudyError("the strategy halving compares models below one size; give size_limit, such as 700MB")
        if self.strategy == "halving" and self.trials is None:
            raise StudyError("the strategy halving needs a number of recipes to begin with; give trials")
        if self.strategy not in ("all", "halving") and self.trials is None and self.hours is None:
            raise StudyError(f"the strategy {self.strategy} never ends by itself; give trials or hours")

    def setup(self) -> JsonObject:
        """What `Setup` takes besides the model, without what it knows by itself."""
        calibration, evaluation = asdict(self.calibration), asdict(self.evaluation)
        given = {"calibration": calibration.pop("source")} | calibration | evaluation
        tasks = given.pop("tasks") or ()
        if "decode" in self.objectives:
            given["speed"] = True
        found = {key: value for key, value in given.items() if value is not None or key == "cheap"}
        return found | {"tasks": tuple(tasks.split(",") if isinstance(tasks, str) else tasks)}


@dataclass(frozen=True)
class Spec:
    """A study for one model, its fields as those of `StudyFile`.

    size_limit  in bytes
    setup       what `Setup` takes besides the model
    content     the spec as given, for the ledger
    notes       which recipes were left out, and why
    """

    name: str
    about: str
    space: Space
    strategy: str = "all"
    objectives: tuple[str, ...] = ("kl", "bytes")
    trials: int | None = None
    hours: float | None = None
    seed: int = 0
    size_limit: int | None = None
    cycle: int = 8
    setup: JsonObject = field(default_factory=dict)
    content: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def setup_for(self, model: str) -> Setup:
        """What all trials have in common when the study runs on `model`."""
        return Setup(model=model, store_bytes=max(STORE_BYTES, STORED_MODELS * Checkpoint.open(model).weight_bytes),
                     **self.setup)


def packaged_specs() -> dict[str, Traversable]:
    """Name -> file of the studies that come with the package."""
    files = resources.files("tsotsallm.study.specs").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def read_spec(source: str | Path, *, layers: int, given: Mapping[str, str] | None = None) -> Spec:
    """A study from a file or a packaged name, for a model of `layers` layers; `given` holds the values that it needs.

    Raises StudyError where the spec cannot be read or is wrong.
    """
    return spec_from(Path(source).stem, read_content(source), layers=layers, given=given)


def read_content(source: str | Path) -> JsonObject:
    """The content of a study's file, or of a packaged study; StudyError where it cannot be read or is empty."""
    packaged = packaged_specs()
    try:
        text = (packaged[str(source)].read_text("utf-8") if str(source) in packaged else
                read_utf8(Path(source), StudyError))
    except OSError as error:
        raise StudyError(f"the study {source} cannot be read ({error.strerror or error}); packaged studies: "
                         f"{', '.join(packaged)}") from None
    content = parse_yaml(text, str(source), StudyError)
    if not isinstance(content, Mapping) or not content:
        raise StudyError(f"{source} is empty; a study has stages or recipes, and a strategy")
    return dict(content)


def spec_from(name: str, content: JsonObject, *, layers: int, given: Mapping[str, str] | None = None) -> Spec:
    """A study from plain data, for a model of `layers` layers; `$NAME` anywhere in it stands for a value of `given`.

    Raises StudyError where a key, a value or their combination is wrong.
    """
    content = _without_empty(content)
    needs, optional = (value if isinstance(value := content.get(key), Mapping) else {} for key in ("needs", "optional"))
    content, notes = _without_missing(content, optional, given or {})
    content = _with_given(content, needs, optional, given or {})
    file = checked(StudyFile, content, name, StudyError)
    as_given: dict[str, object] = dict(content)
    if file.layers not in (None, layers):
        content = _rescaled(content, int(content["layers"]), layers)
    space = Space.of_recipes(content["recipes"]) if "recipes" in content else Space.read(content)
    limit = None if file.size_limit is None else bytes_from_text(str(file.size_limit), "size_limit", StudyError)
    return Spec(name, str(file.about), space, file.strategy, tuple(file.objectives), file.trials, file.hours, file.seed,
                limit, file.cycle, file.setup(), as_given, notes)


def study_schema() -> JsonObject:
    """The JSON Schema of a study's file, whose stages may have open values, beside those of `open` and `recipe`."""
    whole = schema_of(StudyFile)
    stages = recipe_schema(lambda part: {key: part[key] for key in ("description",) if key in part} | {
        "anyOf": [part, {"$ref": "#/$defs/open"}]})
    stages["items"]["anyOf"].append({"$ref": "#/$defs/open"})
    recipes = {"type": "object", "additionalProperties": {"$ref": "#/$defs/recipe"}}
    return whole | {"properties": whole["properties"] | {
        "stages": whole["properties"]["stages"] | stages, "recipes": whole["properties"]["recipes"] | recipes}}


def open_schema() -> JsonObject:
    """The JSON Schema of an open value of a study: some choices, or a range of numbers."""
    several = {"type": "object", "properties": {"one_of": {"type": "array", "minItems": 1}}, "required": ["one_of"],
               "additionalProperties": False, "description": "an open value: each of these is tried"}
    numbers = {name: {"type": "number"} for name in ("from", "to", "step")} | {"log": {"type": "boolean"}}
    some = {"type": "object", "properties": numbers, "required": ["from", "to"], "additionalProperties": False,
            "description": "an open value: numbers of a range"}
    return {"anyOf": [several, some]}


def _without_empty(content: JsonObject) -> JsonObject:
    """A file's content without keys that have no value: they mean the default. An empty `cheap` says something."""
    return {key: {name: part for name, part in value.items() if part is not None or name == "cheap"}
            if key in ("calibration", "evaluation") and isinstance(value, dict) else value
            for key, value in content.items() if value is not None}


def _without_missing(content: JsonObject, optional: Mapping[str, Json], given: Mapping[str, str]
                     ) -> tuple[JsonObject, tuple[str, ...]]:
    """A file's content without the recipes that need a value which was not given, and a note on each such value."""
    recipes, notes = content.get("recipes"), []
    for name, about in optional.items():
        if name not in given and isinstance(recipes, Mapping):
            left_out = [recipe for recipe, stages in recipes.items() if _has(stages, f"${name}")]
            recipes = {recipe: stages for recipe, stages in recipes.items() if recipe not in left_out}
            if left_out:
                notes.append(f"{', '.join(map(str, left_out))} left out: give {about} with --set {name}=PATH to try them")
    return content | ({} if recipes is None else {"recipes": recipes}), tuple(notes)


def _has(value: Json, wanted: str) -> bool:
    if isinstance(value, Mapping):
        return any(_has(part, wanted) for part in value.values())
    return any(_has(part, wanted) for part in value) if isinstance(value, list) else value == wanted


def _with_given(content: JsonObject, needs: Mapping[str, object], optional: Mapping[str, object],
                given: Mapping[str, str]) -> JsonObject:
    for name, about in needs.items():
        if name not in given:
            raise StudyError(f"this study needs {name}: {about}; give it with --set {name}=FILE")
    for name in given:
        if name not in {*needs, *optional}:
            raise StudyError(f"this study does not need {quoted(name)}{nearest(name, {*needs, *optional})}")

    def walk(value: Json) -> Json:
        if isinstance(value, str) and value.startswith("$") and value[1:] in given:
            return given[value[1:]]
        if isinstance(value, Mapping):
            return {key: walk(part) for key, part in value.items()}
        return [walk(part) for part in value] if isinstance(value, list) else value

    return {key: value if key in ("needs", "optional") else walk(value) for key, value in content.items()}


def _rescaled(content: JsonObject, source: int, layers: int) -> JsonObject:
    """Adapt a study of a model of `source` layers to a model of `layers` layers.

    Numbers of layers to remove keep their share, rounded to the nearest integer but at least one where there was one; equal
    ones become one. Protected layers are rescaled in the same way. Layer orders keep their share of layers and the depths,
    as `tsotsallm.evaluation.franken.rescale` does.
    """
    from tsotsallm.evaluation.franken import rescale
    from tsotsallm.stages.layers import expand

    def share(number: int) -> int:
        return 0 if number == 0 else max(1, int(number * layers / source + 0.5))

    def walk(value: Json, key: str = "") -> Json:
        if key in ("remove", "first", "last"):
            if isinstance(value, Mapping):
                return {name: [share(number) for number in part] if name == "one_of" else
                        share(part) if name != "step" else part for name, part in value.items()}
            return share(value)
        if key == "order" and isinstance(value, list) and all(isinstance(part, (int, str)) for part in value) and value and (
                isinstance(value[0], int) or str(value[0])[:1].isdigit()):
            return rescale(expand(value, "order"), source, layers)
        if isinstance(value, Mapping):
            return {name: walk(part, name) for name, part in value.items()}
        return [walk(part) for part in value] if isinstance(value, list) else value

    return {key: walk(value) if key in ("stages", "recipes") else value for key, value in content.items()}
