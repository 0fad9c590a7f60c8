"""A recipe is data: YAML or one line -> frozen stages -> sweeps; refused when wrong, before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib import resources
from operator import or_
from pathlib import Path

import yaml

from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import RecipeError, nearest
from tsotsallm.files import Json, JsonObject, parse_yaml, quoted, read_utf8
from tsotsallm.stages import STAGES
from tsotsallm.stages.contract import LayerChoice, LayerEdit, LinearEdit, Model, Needs, Short, SourceEdit, Stage
from tsotsallm.stages.retraining import Retraining

MOST_STAGES = 100


@dataclass(frozen=True)
class Sweep:
    """Stages that are done in one pass: choices of layers first, then edits of every linear, or one stage of another kind.

    A pass begins with the model that the pass before it wrote; one that `does_over` what that one did, with more stages,
    begins where that one began. `first` and `last` are the places of its stages in the recipe.
    """

    choices: tuple[LayerChoice, ...] = ()
    edits: tuple[LinearEdit, ...] = ()
    training: Retraining | None = None
    rewriting: LayerEdit | None = None
    does_over: bool = False
    first: int = 0
    last: int = -1

    @property
    def needs(self) -> Needs:
        """What the edits need together, or the one stage that takes the pass by itself."""
        own = (self.rewriting,) if self.rewriting is not None else ()
        return reduce(or_, (stage.needs for stage in (*self.edits, *own)), Needs())

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of the pass, in the order in which they are done."""
        return (*self.choices, *self.edits, *((self.training,) if self.training else ()),
                *((self.rewriting,) if self.rewriting else ()))


@dataclass(frozen=True)
class Recipe:
    """Ordered stages; an empty recipe copies the checkpoint."""

    stages: tuple[Stage, ...]

    @classmethod
    def parse(cls, source: str | Path | Sequence[object]) -> Recipe:
        """Read a recipe from a YAML file, a packaged name, inline YAML, a one-liner, or a list of plain data."""
        content: Json = _read(str(source)) if isinstance(source, (str, Path)) else source
        if isinstance(content, Mapping):
            content = content.get("stages") if set(content) == {"stages"} else [content]
        if not isinstance(content, Sequence) or isinstance(content, str):
            raise RecipeError(f"a recipe is a list of stages, but this is {quoted(content)}")
        if len(content) > MOST_STAGES:
            raise RecipeError(f"the recipe has {len(content)} stages; it takes {MOST_STAGES} at most")
        return cls(tuple(_stage(item) for item in content))

    @classmethod
    def parse_text(cls, text: str) -> Recipe:
        """Read inline YAML or a one-liner, never a file."""
        return cls.parse(_inline(text))

    def plain(self) -> list[JsonObject]:
        """The recipe as plain data, from which `parse` makes an equal one."""
        return [{stage.name: stage.fields()} for stage in self.stages]

    def line(self) -> str:
        """The recipe as one line that `parse` reads, without what defaults say."""
        short = [_shortened(stage) for stage in self.stages]
        if all(isinstance(one, str) for one in short):
            return ", ".join(map(str, short)) or "[]"
        return yaml.safe_dump(short, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False).strip()

    def resolved(self, spec: ModelSpec) -> Recipe:
        """The recipe for a model of this shape, with what its stages leave to the widths that they will see written out.

        It has passed `check`.
        """
        stages: list[Stage] = []
        model = Model.of(spec)
        for stage in self.stages:
            stages.append(stage.resolved(model.spec))
            model = stages[-1].shape(model)
        return Recipe(tuple(stages))

    def without_text(self) -> Recipe | None:
        """The nearest recipe that needs no calibration text; None where a stage has no such form."""
        stages = [one for stage in self.stages if (one := stage.without_text()) is not None]
        other = Recipe(tuple(stages))
        return None if len(stages) < len(self.stages) or other.needs_text else other

    def sweeps(self, *, one_stage_each: bool = False) -> list[Sweep]:
        """The passes that the recipe takes; a choice of layers after an edit begins a new one.

        With `one_stage_each` every stage gets a pass of its own. A stage that makes sense only in one pass with the edit
        before it gets one that does both, from where that edit began.
        """
        sweeps: list[Sweep] = []
        for place, stage in enumerate(self.stages):
            if isinstance(stage, SourceEdit):
                continue                    # the source is read otherwise: no pass of its own
            last = sweeps[-1] if sweeps else Sweep()
            if isinstance(stage, LinearEdit) and stage.completes_edit_before and one_stage_each and last.edits:
                sweeps.append(Sweep(last.choices, (*last.edits, stage), does_over=True, first=last.first, last=place))
                continue
            after_edits = bool(last.edits) and not isinstance(stage, LinearEdit)
            if not sweeps or one_stage_each or last.training or last.rewriting or after_edits:
                last = Sweep(first=place)
                sweeps.append(last)
            last = replace(last, last=place)
            if isinstance(stage, LayerChoice):
                sweeps[-1] = replace(last, choices=(*last.choices, stage))
            elif isinstance(stage, LinearEdit):
                sweeps[-1] = replace(last, edits=(*last.edits, stage))
            elif isinstance(stage, Retraining):
                sweeps[-1] = replace(last, training=stage)
            elif isinstance(stage, LayerEdit):
                sweeps[-1] = replace(last, rewriting=stage)
        return sweeps or [Sweep()]

    @property
    def needs(self) -> Needs:
        """What any of the stages needs."""
        return reduce(or_, (stage.needs for stage in self.stages), Needs())

    @property
    def trainings(self) -> list[Retraining]:
        """The stages that train, in order."""
        return [stage for stage in self.stages if isinstance(stage, Retraining)]

    @property
    def source_edits(self) -> list[SourceEdit]:
        """The stages that change how the source is read."""
        return [stage for stage in self.stages if isinstance(stage, SourceEdit)]

    @property
    def needs_text(self) -> bool:
        """Whether anything works on the text that the recipe is calibrated on."""
        return self.needs.text or self.needs.training_text

    @property
    def shared(self) -> bool:
        """Whether repeated layers are written once, in the project's own container."""
        return any(stage.shares_repeats for stage in self.stages if isinstance(stage, LayerChoice))

    def models(self, begin: Model) -> list[Model]:
        """The model before every stage, and the one after the last; RecipeError where a stage does not fit."""
        models = [replace(begin, shares_repeats=self.shared)]
        for asked in self.stages:
            stage = asked.resolved(models[-1].spec)
            stage.check(models[-1])
            models.append(stage.shape(models[-1]))
        return models

    def check(self, spec: ModelSpec, *, sparse: bool = False) -> None:
        """Raise RecipeError where a stage does not fit the model it will see, or undoes the stage before it.

        `sparse` says that the model's zeros were made on purpose.
        """
        self.models(Model.of(spec, sparse=sparse))


def _read(text: str) -> Json:
    path = Path(text)
    packaged = packaged_recipes()
    if text in packaged:
        return _yaml(packaged[text].read_text("utf-8"), text)
    named = path.suffix in (".yaml", ".yml") or (len(text) < 200 and "\n" not in text and path.is_file())
    if named and not _is_yaml(text):
        try:
            return _yaml(read_utf8(path, RecipeError), text)
        except OSError as error:
            raise RecipeError(f"the recipe {text} cannot be read ({error.strerror or error}); packaged recipes: "
                              f"{', '.join(packaged)}") from None
    return _inline(text)


def _is_yaml(text: str) -> bool:
    return re.match(r"\s*(\[|\{|-\s)", text) is not None


def _inline(text: str) -> Json:
    """Plain data of inline YAML, or of stages with commas between."""
    return _yaml(text, text) if _is_yaml(text) else [_one_line(item) for item in re.split(r",", text) if item.strip()]


def _yaml(content: str, text: str) -> Json:
    found = parse_yaml(content, "the recipe", RecipeError)
    if found is None:
        raise RecipeError(f"the recipe {quoted(text)} is empty; to copy a model without any stage write []")
    return found


def packaged_recipes() -> JsonObject:
    """Name -> file of the recipes that come with the package."""
    files = resources.files("tsotsallm.recipes").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def recipe_schema(value: Callable[[JsonObject], JsonObject] = lambda part: part) -> JsonObject:
    """The JSON Schema of a recipe: a list of stages, each a short form or {name: {options}}.

    `value` makes of each option's schema the one that stands for it, where more than a plain value is allowed.
    """
    def options(schema: JsonObject) -> JsonObject:
        if "anyOf" in schema:
            return schema | {"anyOf": [options(kind) for kind in schema["anyOf"]]}
        return schema | {"properties": {name: value(part) for name, part in schema["properties"].items()}}

    stages: list[JsonObject] = [
        {"type": "object", "properties": {name: options(stage.schema())}, "required": [name], "additionalProperties": False,
         "description": stage.schema()["description"]} for name, stage in STAGES.items()]
    forms = ", ".join(dict.fromkeys(short.form for _, short in _SHORT.values()))
    short = {"type": "string", "pattern": f"^({'|'.join(_SHORT)}):", "description": f"a short form: {forms}"}
    return {"type": "array", "maxItems": MOST_STAGES, "items": {"anyOf": [short, *stages]}}


def _stage(item: Json) -> Stage:
    if isinstance(item, str):
        item = _one_line(item)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RecipeError(f"a stage is written as {{name: {{options}}}}, but the recipe holds {quoted(item)}")
    name, fields = next(iter(item.items()))
    if name not in STAGES:
        raise RecipeError(f"there is no stage {quoted(name)}{nearest(str(name), STAGES)}")
    return STAGES[name].from_fields({} if fields is None else fields)


def _shortened(stage: Stage) -> str | JsonObject:
    """A stage as it is shortest to write: its short form where that means the same, else the options that need saying."""
    short = stage.short()
    if short and _means(short, stage):
        return short
    fields = stage.fields()
    for key in list(fields):
        fewer = {name: value for name, value in fields.items() if name != key}
        fields = fewer if _means({stage.name: fewer}, stage) else fields
    return {stage.name: fields}


def _means(item: str | JsonObject, stage: Stage) -> bool:
    try:
        return _stage(item) == stage
    except RecipeError:
        return False


_SHORT: dict[str, tuple[str, Short]] = {
    word: (name, short) for name, stage in STAGES.items() for word, short in stage.shorts.items()}


def _one_line(item: str) -> JsonObject:
    word = item.strip().partition(":")[0].strip()
    if word not in _SHORT:
        raise RecipeError(f"there is no short form {quoted(word)}{nearest(word, _SHORT)}; packaged recipes: "
                          f"{', '.join(packaged_recipes())}")
    name, short = _SHORT[word]
    if (more := [part for part in item.split()[1:] if part.partition(":")[0] in _SHORT and ":" in part]):
        raise RecipeError(f"a comma is missing before {quoted(more[0])} in {quoted(item.strip())}; stages are separated by "
                          "commas")
    # a file name may hold colons
    _, *values = (part.strip() for part in item.strip().split(":", short.most if short.file_last else -1))
    if not 1 <= len(values) <= short.most or not all(values):
        raise RecipeError(f"{quoted(item.strip())} is incomplete or has too many parts; it is written {short.form}")
    return {name: short.read(values)}
