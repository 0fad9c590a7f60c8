"""The contract of stages. A stage is a frozen dataclass: the configuration and the technique at once.

It says itself what it needs, what becomes of the model, what it costs, what it must find out first, and how it edits; no
code outside this package asks which stage it has. A new technique is one file here and one line in the registry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.reader import Checkpoint
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError
from tsotsallm.files import Json, JsonObject, quoted
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.stages.costs import Conditions, Cost, dense_bytes
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Tick, Visit, silent
from tsotsallm.validation import HIDDEN, RULES, Natural, checked, schema_of

MOST_DIGITS = 12


def forget(_key: str, _value: float) -> None:
    """Keep no note."""


@dataclass(frozen=True)
class Workplace:
    """What a stage works with besides the model: the corpus, a scratch directory, the device.

    `noted` holds the measurements of an interrupted attempt, and `note` keeps one safely for the next.
    """

    corpus: Corpus | None
    scratch: Path
    device: torch.device
    tick: Tick = silent
    noted: Mapping[str, float] = field(default_factory=dict)
    note: Callable[[str, float], None] = forget

    def text(self, stage: str) -> Corpus:
        """The calibration text."""
        assert self.corpus is not None, f"{stage} was planned without a corpus"
        return self.corpus


@dataclass(frozen=True)
class Protect:
    """Layers at either end that a stage leaves alone."""

    __pydantic_config__ = RULES
    first: Natural = 0
    last: Natural = 0

    def open_layers(self, layers: int) -> list[int]:
        """The layers of a model of `layers` that are not protected."""
        return list(range(self.first, layers - self.last))


@dataclass(frozen=True)
class Needs:
    """What a stage works with besides the weights themselves.

    text                windows of calibration text
    gram                the Gram of every linear's inputs, (d_in, d_in)
    factor              that Gram's Cholesky factor
    token_weights       how strongly the loss depends on each token at each linear, found in a sweep back through the model
    output_metric       how the loss couples the outputs of a linear, found in the same sweep
    original_inputs     the inputs that the model before this pass gives each linear
    second_observation  o_proj and down_proj observed again after the linears before them were edited
    held_out            where text is scarce, some inputs that no Gram has seen, to judge by
    peaks               the largest inputs of blocks of columns, to know what an engine's rounding of them costs
    gradients           gradients of an objective: the stage trains
    training_text       the calibration text as training data
    """

    text: bool = False
    gram: bool = False
    factor: bool = False
    token_weights: bool = False
    output_metric: bool = False
    original_inputs: bool = False
    second_observation: bool = False
    held_out: bool = False
    peaks: bool = False
    gradients: bool = False
    training_text: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What two stages need together."""
        return Needs(*(getattr(self, item.name) or getattr(other, item.name) for item in dataclasses.fields(self)))


@dataclass(frozen=True)
class LayerFile:
    """A layer on its way through a recipe: the stored layer that it comes from, its bytes, and whether they are codes."""

    source: int
    size: int
    packed: bool = False


@dataclass(frozen=True)
class Model:
    """What is known of a model on its way through a recipe before anything is computed.

    layers          in the order in which they run
    ends            bytes of embeddings, final norm and head
    element         bytes of a number in storage
    sparse          whether its zeros were made on purpose
    packed          whether its linears are codes on a grid
    quantized       whether a stage of this recipe made them so
    in_order        whether the layers run in the original's order, each at most once
    corrected       whether low-rank corrections stand beside its linears; None where that is not known
    shares_repeats  whether repeated layers are written once
    stages          stages done so far
    edits           edits of linears done so far in the pass that the next edit joins
    regridded       whether one of these put the linears on a grid
    beside          whether one of these left a correction beside the linears, which later edits would not see
    most_bytes      what all weights take at most, where an edit keeps to a budget
    from_gguf       whether the source is a GGUF file
    """

    spec: ModelSpec
    layers: tuple[LayerFile, ...]
    ends: int = 0
    element: int = 2
    sparse: bool = False
    packed: bool = False
    quantized: bool = False
    in_order: bool = True
    corrected: bool | None = None
    shares_repeats: bool = False
    stages: int = 0
    edits: int = 0
    regridded: bool = False
    beside: bool = False
    most_bytes: int | None = None
    from_gguf: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, *, sparse: bool = False, shares_repeats: bool = False) -> Model:
        """A model of this shape in 16 bits, its file not looked at."""
        layers = tuple(LayerFile(layer, dense_bytes(spec, layer, 2)) for layer in range(spec.layers))
        return cls(spec, layers, sparse=sparse, packed=spec.quantization is not None, shares_repeats=shares_repeats)

    def made_dense(self, stage: str) -> str:
        """What to do so that a stage finds dense weights where it found codes."""
        return f"put {stage} before quantize" if self.quantized else (
            "make a dense copy of the model first with `tsotsallm export MODEL --hf DIR`")

    @property
    def bytes(self) -> int:
        """Bytes of all weights at most."""
        layers = {layer.source: layer for layer in self.layers}.values() if self.shares_repeats else self.layers
        whole = self.ends + sum(layer.size for layer in layers)
        return whole if self.most_bytes is None else min(whole, self.most_bytes)


@dataclass(frozen=True)
class Short:
    """A short form: `word:value:value`. `read` makes a stage's fields of the values; the last may be a file name."""

    read: Callable[[list[str]], JsonObject]
    form: str
    most: int = 1
    file_last: bool = False


@dataclass(frozen=True)
class Stage:
    """One technique applied once: its configuration, and everything that others must know of it."""

    __pydantic_config__ = RULES
    name: ClassVar[str]
    shorts: ClassVar[Mapping[str, Short]] = {}

    # -- its configuration ------------------------------------------------------------------------------------

    @classmethod
    def from_fields(cls, fields: Mapping[str, Json]) -> Self:
        """Build the stage from a recipe's keys; unknown keys are refused with the nearest known one."""
        return checked(cls, fields, cls.name, RecipeError)

    @classmethod
    def options(cls) -> list[str]:
        """The names of the keys that a recipe can set."""
        return list(schema_of(cls)["properties"])

    @classmethod
    def schema(cls) -> JsonObject:
        """The JSON Schema of the stage's keys."""
        return schema_of(cls)

    def fields(self) -> JsonObject:
        """The configuration as plain data, defaults written out (a later version may have others), empty ones left out."""
        plain = {name: _plain(getattr(self, name)) for name in self.options()}
        return {name: value for name, value in plain.items() if value is not None and value != {}}

    def short(self) -> str | None:
        """A short form that may stand for the stage; whoever asks checks that it is read as the same stage."""
        return None

    def resolved(self, spec: ModelSpec) -> Stage:
        """The stage with what it leaves to the model's widths written out."""
        return self

    def without_text(self) -> Stage | None:
        """The nearest stage that needs no calibration text; None where there is none."""
        return None if self.needs.text else self

    # -- what it needs and what becomes of the model ------------------------------------------------------------

    @property
    def needs(self) -> Needs:
        """What the stage works with."""
        return Needs()

    def check(self, model: Model) -> None:
        """Raise RecipeError, with the remedy, where the stage cannot be applied to this model."""

    def shape(self, model: Model) -> Model:
        """The model that the stage leaves: layers, widths, vocabulary, grids, bytes."""
        return replace(model, stages=model.stages + 1, edits=0, regridded=False, beside=False, corrected=False,
                       most_bytes=None)

    def forecast(self, model: Model, conditions: Conditions) -> Cost:
        """What the stage takes besides the pass that it is done in."""
        return Cost()

    def remarks(self, model: Model) -> list[str]:
        """What a user should know of how the stage fits the model that it leaves."""
        return []

    # -- what it must find out first ----------------------------------------------------------------------------

    @property
    def surveys(self) -> bool:
        """Whether the stage must see the whole model before it decides."""
        return False

    def visits(self, model: Model) -> int:
        """How often it reads every layer of the model before it, besides the pass that it is done in."""
        return int(self.surveys)

    @property
    def measured_by(self) -> list[Json]:
        """What the measurements that the stage decides by depend on: not how far it goes by them."""
        return [self.name, self.fields()]

    def decided(self, decision: Mapping[str, Json]) -> Self:
        """The stage with what a survey decided; `decision` is plain data and is kept in the journal."""
        raise RecipeError(f"{self.name} decides nothing")


def whole_number(text: str, where: str) -> int:
    """A number of a short form; RecipeError where it is none."""
    if not text.isdecimal() or not text.isascii() or len(text) > MOST_DIGITS:
        raise RecipeError(f"{where}: {quoted(text)} is not a whole number of at most {MOST_DIGITS} digits")
    return int(text)


def decided_later() -> Any:
    """A field that no recipe sets: a survey of the model decides it."""
    return field(default=None, metadata={HIDDEN: True})


def _plain(value: Json) -> Json:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Choice:
    """The layers that a LayerChoice keeps, in order, and why."""

    order: list[int]
    reasons: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class SourceEdit(Stage):
    """Changes how the source is read: embeddings, head, tokenizer. It comes first and takes no pass of its own."""

    def check(self, model: Model) -> None:
        """Raise RecipeError unless the stage comes first."""
        if model.stages:
            raise RecipeError(f"{self.name} decides which tokens there are for everything after it; put it first, once")

    @property
    def reads(self) -> list[str]:
        """The texts that it works on: files or directories."""
        return []

    def applied(self, checkpoint: Checkpoint, texts: Sequence[str]) -> Checkpoint:
        """The checkpoint as it is read from now on; nothing is written. `texts` are the contents of `reads`."""
        raise RecipeError(f"{self.name} changes nothing")


@dataclass(frozen=True)
class LayerChoice(Stage):
    """Decides which layers run, in which order; moves no byte."""

    @property
    def shares_repeats(self) -> bool:
        """Whether repeated layers are written once, in the project's own container."""
        return False

    def layers_after(self, layers: int) -> int:
        """How many layers run afterwards."""
        raise RecipeError(f"{self.name} does not say how many layers it keeps")

    def known(self, layers: int) -> list[int] | None:
        """The layers that it keeps of `layers`, in order; None where only the model's weights decide."""
        return None

    def keeps_order(self, layers: int) -> bool:
        """Whether the layers afterwards run in the order that they had, each at most once."""
        return True

    def shape(self, model: Model) -> Model:
        """The chosen layers; where only the weights decide which, those that leave the most bytes."""
        order = self.known(len(model.layers))
        if order is None:
            seen: set[int] = set()
            first_time = [not (layer.source in seen or seen.add(layer.source)) for layer in model.layers]  # type: ignore[func-returns-value]
            largest = sorted(range(len(model.layers)), reverse=True,
                             key=lambda index: (first_time[index], model.layers[index].size))
            order = sorted(largest[:self.layers_after(len(model.layers))])
        return replace(super().shape(model), spec=model.spec.with_layers(len(order)),
                       layers=tuple(model.layers[index] for index in order),
                       in_order=model.in_order and self.keeps_order(model.spec.layers))

    def choose(self, view: View, workplace: Workplace) -> Choice:
        """The layers of `view` that the next stage sees."""
        raise RecipeError(f"{self.name} chooses nothing")


@dataclass(frozen=True)
class LayerEdit(Stage):
    """Gives whole layers new tensors, of new shapes perhaps, in a pass of its own; it may remove layers as well."""

    def check(self, model: Model) -> None:
        """Raise RecipeError where layers are shared, pruned, or quantised by a stage before, which new tensors would undo.

        Of a source that came quantised the layers are read as numbers and written in 16 bits.
        """
        if model.shares_repeats:
            raise RecipeError(f"{self.name} changes every layer by itself, but `shared` keeps repeated layers as one; leave "
                              "shared out")
        if model.sparse:
            raise RecipeError(f"{self.name} comes after sparsity, whose zeros its update would fill; put {self.name} first")
        if model.quantized:
            raise RecipeError(f"{self.name} comes after quantize, which would make the weights dense again; put "
                              f"{self.name} first")

    def choose(self, view: View, workplace: Workplace) -> Choice:
        """The layers of `view` that are kept, in order: all of them by default."""
        return Choice(list(range(view.spec.layers)))

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the model that it leaves."""
        return spec

    def prepare(self, view: View, order: Sequence[int], workplace: Workplace) -> Any:
        """What `reshape` is given of the whole model, of which `order` is kept; made again after an interruption."""
        return None

    def reshape(self, visit: Visit, spec: ModelSpec, prepared: Any) -> dict[str, Tensor] | None:
        """All tensors of a layer in storage type, by name; None for a layer that stays as it is stored.

        `spec` is that of the kept layers before. Where inputs are observed, the layer in memory must go on to compute what
        the written one will.
        """
        raise RecipeError(f"{self.name} reshapes nothing")


@dataclass(frozen=True)
class LinearEdit(Stage):
    """Gives one linear new values, knowing its inputs."""

    @property
    def completes_edit_before(self) -> bool:
        """Whether the edit makes sense only in one pass with the edit before it."""
        return False

    @property
    def leaves_zeros(self) -> bool:
        """Whether it makes zeros that later stages have to keep."""
        return False

    @property
    def leaves_python(self) -> bool:
        """Whether most of an edit is compiled code, so that threads can edit several small linears at once."""
        return False

    def check(self, model: Model) -> None:
        """Raise RecipeError where a correction stands beside the linears, which the edit would not see."""
        if model.beside:
            raise RecipeError(f"{self.name} comes right after a stage that keeps its correction beside the linears, which "
                              "it would not see; put that stage last, or merge its correction")

    def applies_to(self, layer: int, layers: int) -> bool:
        """Whether the edit changes linears of a layer of a model of `layers`."""
        return True

    def layer_after(self, model: Model, index: int) -> LayerFile:
        """The file of a layer that the edit applies to, at most."""
        return model.layers[index]

    def shape(self, model: Model) -> Model:
        """The model with every layer that the edit applies to as `layer_after` gives it."""
        layers = tuple(self.layer_after(model, index) if self.applies_to(index, model.spec.layers) else layer
                       for index, layer in enumerate(model.layers))
        return replace(model, layers=layers, stages=model.stages + 1, edits=model.edits + 1,
                       sparse=model.sparse or self.leaves_zeros, corrected=False)

    def end_grids(self, view: View) -> dict[str, GgmlGrid]:
        """The grids that embeddings and head are put on, by their modules' names; those left out stay as they are."""
        return {}

    def round_ends(self, view: View, gram: Gram | None, tick: Tick) -> dict[str, Tensor]:
        """The blocks of the matrices that `end_grids` names, by the name that they are stored under."""
        return {}

    def flops(self, d_out: int, d_in: int) -> float:
        """Floating-point operations for one linear, its Gram and factor not counted."""
        return 0.0

    def work_bytes(self, d_out: int, d_in: int) -> int:
        """Memory in bytes while one linear is edited, beside the layer, Grams and factors: four copies of it."""
        return 4 * 4 * d_out * d_in

    def forecast(self, model: Model, conditions: Conditions) -> Cost:
        """The operations of the edit on all linears."""
        spec = model.spec
        return Cost(flops=sum(self.flops(*shape) for layer in range(spec.layers) if self.applies_to(layer, spec.layers)
                              for shape in linear_shapes(spec, layer).values()))

    def survey(self, view: View, workplace: Workplace) -> JsonObject | None:
        """What a stage that must see the whole model finds out by itself; None where `probe` and `decide` do."""
        return None

    def probe(self, *, sparse: bool) -> tuple[LinearEdit, dict[str, list[float]]]:
        """An edit that changes nothing but fills notes about every linear, for `decide`."""
        raise RecipeError(f"{self.name} has nothing to survey")

    def probe_ends(self, view: View, corpus: Corpus, outputs: HiddenStates, notes: dict[str, list[float]],
                   squares: float) -> None:
        """Add notes about embeddings and head, given the last layer's outputs and the sensitivity of the first's inputs."""

    def decide(self, notes: Mapping[str, list[float]], view: View) -> JsonObject:
        """What the notes of a whole sweep come to."""
        raise RecipeError(f"{self.name} decides nothing")

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        """Edit the linear in place; `last` says that no later edit needs the Gram's matrix."""
        raise RecipeError(f"{self.name} edits nothing")
