"""A recipe is data: YAML or one line -> frozen stages -> sweeps; refused when wrong, before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.errors import RecipeError, nearest
from tsotsallm.files import parse_yaml, quoted, read_utf8
from tsotsallm.numerics.grids import GRIDS
from tsotsallm.stages import STAGES
from tsotsallm.stages.base import LayerChoice, LinearEdit, Stage
from tsotsallm.stages.compensate import Compensate
from tsotsallm.stages.depth import Depth
from tsotsallm.stages.neurons import Neurons
from tsotsallm.stages.quantize import Quantize
from tsotsallm.stages.retraining import Retraining, Trained
from tsotsallm.stages.sparsity import Sparsity
from tsotsallm.stages.vocabulary import Vocabulary

MOST_DIGITS, MOST_STAGES = 12, 100


@dataclass(frozen=True)
class Sweep:
    """Stages that are done in one pass: choices of layers first, then edits of every linear, one retraining or narrowing.

    A pass begins with the model that the pass before it wrote; one that does over what that one did, with more stages,
    begins where that one began.
    """

    choices: tuple[LayerChoice, ...] = ()
    edits: tuple[LinearEdit, ...] = ()
    training: Retraining | None = None
    narrowing: Neurons | None = None
    does_over: bool = False

    @property
    def observes(self) -> bool:
        return self.narrowing is not None or any(edit.needs_gram for edit in self.edits)

    @property
    def weighs_tokens(self) -> bool:
        return any(edit.weighs_tokens for edit in self.edits)

    @property
    def follows_original(self) -> bool:
        return any(edit.follows_original for edit in self.edits)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (*self.choices, *self.edits, *((self.training,) if self.training else ()),
                *((self.narrowing,) if self.narrowing else ()))


@dataclass(frozen=True)
class Recipe:
    """Ordered stages; an empty recipe copies the checkpoint."""

    stages: tuple[Stage, ...]

    @classmethod
    def parse(cls, source: str | Path | Sequence[Any]) -> Recipe:
        """Read a recipe from a YAML file, a packaged name, inline YAML, a one-liner, or a list of plain data."""
        content: Any = _read(str(source)) if isinstance(source, (str, Path)) else source
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

    def plain(self) -> list[dict[str, Any]]:
        """The recipe as plain data, from which `parse` makes an equal one."""
        return [{stage.name: stage.fields()} for stage in self.stages]

    def line(self) -> str:
        """The recipe as one line that `parse` reads, without what defaults say."""
        short = [_shortened(stage) for stage in self.stages]
        if all(isinstance(one, str) for one in short):
            return ", ".join(map(str, short)) or "[]"
        return yaml.safe_dump(short, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False).strip()

    def resolved(self, spec: ModelSpec) -> Recipe:
        """The recipe for a model of this shape, with what its stages leave to the widths that they will see written out."""
        found = []
        for stage in self.stages:
            found.append(stage.resolved(spec))
            spec = stage.spec_after(spec)
        return Recipe(tuple(found))

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
        for stage in self.stages:
            if isinstance(stage, Vocabulary):
                continue                    # the source is read with fewer tokens: no pass of its own
            last = sweeps[-1] if sweeps else Sweep()
            if isinstance(stage, LinearEdit) and stage.completes_edit_before and one_stage_each and last.edits:
                sweeps.append(Sweep(last.choices, (*last.edits, stage), does_over=True))
                continue
            after_edits = bool(last.edits) and not isinstance(stage, LinearEdit)
            if not sweeps or one_stage_each or last.training or last.narrowing or after_edits:
                last = Sweep()
                sweeps.append(last)
            if isinstance(stage, LayerChoice):
                sweeps[-1] = replace(last, choices=(*last.choices, stage))
            elif isinstance(stage, LinearEdit):
                sweeps[-1] = replace(last, edits=(*last.edits, stage))
            elif isinstance(stage, Retraining):
                sweeps[-1] = replace(last, training=stage)
            elif isinstance(stage, Neurons):
                sweeps[-1] = replace(last, narrowing=stage)
        return sweeps or [Sweep()]

    @property
    def needs_corpus(self) -> bool:
        return any(stage.needs_corpus for stage in self.stages)

    @property
    def trainings(self) -> list[Retraining]:
        """The stages that train, in order."""
        return [stage for stage in self.stages if isinstance(stage, Retraining)]

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The stage that cuts the vocabulary before anything else, if any."""
        return self.stages[0] if self.stages and isinstance(self.stages[0], Vocabulary) else None

    @property
    def needs_text(self) -> bool:
        """Whether anything works on the text that the recipe is calibrated on."""
        return self.needs_corpus or any(stage.needs_text for stage in self.trainings)

    @property
    def shared(self) -> bool:
        """Whether repeated layers are written once, in the project's own container."""
        return any(getattr(stage, "shared", False) for stage in self.stages)

    def check(self, spec: ModelSpec, *, sparse: bool = False) -> None:
        """Raise RecipeError where a stage does not fit the model it will see, or undoes the stage before it.

        `sparse` says that the model's zeros were made on purpose.
        """
        if any(isinstance(stage, Vocabulary) for stage in self.stages[1:]):
            raise RecipeError("vocabulary decides which tokens there are for everything after it; put it first, once")
        quantized = False
        state = Trained(packed=spec.quantization is not None)
        for asked in self.stages:
            stage = asked.resolved(spec)
            stage.check(spec)
            if isinstance(stage, Retraining):
                if self.shared:
                    raise RecipeError(f"{stage.name} trains every layer by itself, but `shared` keeps repeated layers as "
                                      "one; leave shared out")
                stage.check_base(state)
            if isinstance(stage, Quantize):
                stage.require_zeros(pruned=sparse)
            sparse = sparse or stage.name == "sparsity"
            if quantized and stage.name == "sparsity":
                raise RecipeError("sparsity comes after quantize, which would make the weights dense again; put sparsity "
                                  "first: quantize keeps its zeros and compensates for them")
            quantized = quantized or stage.name == "quantize"
            state = Trained(packed=quantized or (state.packed and stage.name != "sparsity"),
                            in_order=state.in_order and stage.keeps_order(spec.layers),
                            corrected=isinstance(stage, LinearEdit) and stage.adapter_bytes(
                                linear_shapes(spec, 0), spec.layers, 1) > 0)
            if isinstance(stage, Neurons):
                if self.shared:
                    raise RecipeError("neurons narrows every layer by itself, but `shared` keeps repeated layers as one; "
                                      "leave shared out")
                if sparse:
                    raise RecipeError("neurons comes after sparsity, whose zeros its update would fill; put neurons first")
                if quantized:
                    raise RecipeError("neurons comes after quantize, which would make the weights dense again; put neurons "
                                      "first")
            spec = stage.spec_after(spec)
        for sweep in self.sweeps():
            names = [edit.name for edit in sweep.edits]
            if "compensate" in names and names.index("compensate") != len(names) - 1 and not getattr(
                    sweep.edits[names.index("compensate")], "merge", False):
                raise RecipeError("compensate keeps its correction beside the linears, so that a stage right after it would "
                                  "not see it; put compensate last, or merge it")
            if names == ["compensate"]:
                raise RecipeError("compensate corrects what the stages before it did to the linears; put it right after "
                                  "sparsity or quantize")
            if sum(edit.name == "quantize" for edit in sweep.edits) > 1:
                raise RecipeError("the recipe quantizes twice in a row, and the first would be lost; keep one of them")


def _read(text: str) -> Any:
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


def _inline(text: str) -> Any:
    """Plain data of inline YAML, or of stages with commas between."""
    return _yaml(text, text) if _is_yaml(text) else [_one_line(item) for item in re.split(r",", text) if item.strip()]


def _yaml(content: str, text: str) -> Any:
    found = parse_yaml(content, "the recipe", RecipeError)
    if found is None:
        raise RecipeError(f"the recipe {quoted(text)} is empty; to copy a model without any stage write []")
    return found


def packaged_recipes() -> dict[str, Any]:
    """Name -> file of the recipes that come with the package."""
    files = resources.files("tsotsallm.recipes").iterdir()
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)
            if file.name.endswith(".yaml")}


def _stage(item: Any) -> Stage:
    if isinstance(item, str):
        item = _one_line(item)
    if not isinstance(item, Mapping) or len(item) != 1:
        raise RecipeError(f"a stage is written as {{name: {{options}}}}, but the recipe holds {quoted(item)}")
    name, fields = next(iter(item.items()))
    if name not in STAGES:
        raise RecipeError(f"there is no stage {quoted(name)}{nearest(str(name), STAGES)}")
    return STAGES[name].from_fields({} if fields is None else fields)


def _shortened(stage: Stage) -> str | dict[str, Any]:
    """A stage as it is shortest to write: its short form where that means the same, else the options that need saying."""
    if isinstance(stage, Quantize):
        group = "" if stage.group in ("auto", None) else f":{stage.group}"
        kind = f"mixed:{stage.bits_per_weight}" if stage.mixed else stage.bits if stage.grid == "int" else stage.grid
        short = f"{stage.method}:{kind}{group}"
    elif isinstance(stage, Sparsity):
        numbers = stage.prune_fraction if stage.prune is None else f"{stage.prune}:{stage.group}"
        short = f"{stage.method}:{numbers}"
    elif isinstance(stage, Depth):
        short = f"depth:{stage.remove}" + ("" if stage.importance == "perplexity" else f":{stage.importance}")
    elif isinstance(stage, Compensate) and stage.method == "eora":
        short = f"eora:{stage.rank}" + ("" if stage.budget is None else f":{stage.budget}")
    else:
        short = ""
    if short and _means(short, stage):
        return short
    fields = stage.fields()
    for key in list(fields):
        fewer = {name: value for name, value in fields.items() if name != key}
        fields = fewer if _means({stage.name: fewer}, stage) else fields
    return {stage.name: fields}


def _means(item: str | dict[str, Any], stage: Stage) -> bool:
    try:
        return _stage(item) == stage
    except RecipeError:
        return False


def _number(text: str, where: str) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > MOST_DIGITS:
        raise RecipeError(f"{where}: {quoted(text)} is not a whole number of at most {MOST_DIGITS} digits")
    return int(text)


def _sparsity(method: str) -> Callable[[list[str]], dict[str, Any]]:
    def read(values: list[str]) -> dict[str, Any]:
        if len(values) == 1:
            try:
                return {"sparsity": {"method": method, "prune_fraction": float(values[0])}}
            except ValueError:
                raise RecipeError(f"{method}:{values[0]}: give a fraction such as {method}:0.5, or N:M such as "
                                  f"{method}:2:4 (prunes 2 of every 4)") from None
        prune, group = values
        return {"sparsity": {"method": method, "prune": _number(prune, method), "group": _number(group, method)}}
    return read


def _quantize(method: str) -> Callable[[list[str]], dict[str, Any]]:
    def read(values: list[str]) -> dict[str, Any]:
        fields: dict[str, Any] = {"method": method}
        if values[0] == "mixed":
            return {"quantize": fields | {"bits_per_weight": _bits(values[1] if len(values) == 2 else "", method)}}
        fields |= {"grid": values[0]} if values[0] in GRIDS else {"bits": _number(values[0], method)}
        if len(values) == 2:
            fields["group"] = values[1] if values[1] in ("channel", "auto") else _number(values[1], method)
        return {"quantize": fields}
    return read


def _bits(text: str, method: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise RecipeError(f"{method}:mixed takes bits a weight, such as {method}:mixed:4.2") from None


def _depth(values: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"remove": _number(values[0], "depth")}
    if len(values) == 2:
        fields["importance"] = values[1]
    return {"depth": fields}


def _compensate(method: str) -> Callable[[list[str]], dict[str, Any]]:
    def read(values: list[str]) -> dict[str, Any]:
        if values[0] == "auto":
            return {"compensate": {"method": method, "rank": "auto", "budget": values[1] if len(values) == 2 else None}}
        return {"compensate": {"method": method, "rank": _number(values[0], method)}}
    return read


def _lora(values: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"rank": _number(values[0], "lora")}
    if len(values) == 2:
        fields["data"] = values[1]
    return {"adapt": fields}


_SHORT: dict[str, tuple[Callable[[list[str]], dict[str, Any]], str, int]] = {
    "depth": (_depth, "depth:N or depth:N:importance", 2),
    "layers": (lambda values: {"layers": {"order": values[0].split("+")}}, "layers:0-3+5+6", 1),
    "skip": (lambda values: {"layers": {"skip": values[0].split("+")}}, "skip:3+7-9", 1),
    **{method: (_sparsity(method), f"{method}:N:M (prunes N of every M) or {method}:FRACTION", 2)
       for method in ("wanda", "sparsegpt", "magnitude")},
    "eora": (_compensate("eora"), "eora:RANK or eora:auto:BYTES", 2),
    "lora": (_lora, "lora:RANK or lora:RANK:FILE", 2),
    "distill": (lambda values: {"distill": {"mode": values[0]}}, "distill:layers or distill:logits", 1),
    **{method: (_quantize(method), f"{method}:BITS, {method}:BITS:GROUP, {method}:GRID or "
                f"{method}:mixed:BITS", 2) for method in ("gptq", "rtn")},
}


def _one_line(item: str) -> dict[str, Any]:
    word = item.strip().partition(":")[0].strip()
    if word not in _SHORT:
        raise RecipeError(f"there is no short form {quoted(word)}{nearest(word, _SHORT)}; packaged recipes: "
                          f"{', '.join(packaged_recipes())}")
    read, form, most = _SHORT[word]
    # the last part may hold colons where it can be a file
    _, *values = (part.strip() for part in item.strip().split(":", most if word == "lora" else -1))
    if not 1 <= len(values) <= most or not all(values):
        raise RecipeError(f"{quoted(item.strip())} is incomplete or has too many parts; it is written {form}")
    return read(values)
