"""The kinds of stages. A stage is a frozen dataclass: the configuration and the technique at once."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.checkpoint.spec import ModelSpec
from tsotsallm.checkpoint.view import View
from tsotsallm.errors import RecipeError, nearest
from tsotsallm.files import quoted
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.grids import Grid
from tsotsallm.streaming.corpus import Corpus
from tsotsallm.streaming.hidden import HiddenStates
from tsotsallm.streaming.statistics import Gram
from tsotsallm.streaming.sweep import Tick, silent


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
        assert self.corpus is not None, f"{stage} was planned without a corpus"
        return self.corpus


@dataclass(frozen=True)
class Protect:
    """Layers at either end that a stage leaves alone."""

    first: int = 0
    last: int = 0

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 0:
            raise RecipeError(f"protect has first {self.first} and last {self.last}; both must be 0 or more")

    def open_layers(self, layers: int) -> list[int]:
        return list(range(self.first, layers - self.last))


@dataclass(frozen=True)
class Stage:
    """One technique applied once."""

    name: ClassVar[str]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Build the stage from a recipe's keys; unknown keys are refused with the nearest known one."""
        stage: Self = _build(cls, fields, cls.name)
        return stage

    def fields(self) -> dict[str, Any]:
        """The configuration as plain data, defaults written out (a later version may have others), empty ones left out."""
        plain = {item.name: _plain(getattr(self, item.name)) for item in _options(type(self))}
        return {name: value for name, value in plain.items() if value is not None and value != {}}

    @property
    def measured_by(self) -> list[Any]:
        """What the measurements that the stage decides by depend on: not how far it goes by them."""
        return [self.name, self.fields()]

    @property
    def needs_corpus(self) -> bool:
        return False

    @property
    def surveys(self) -> bool:
        """Whether the stage must see the whole model before it decides."""
        return False

    def decided(self, decision: Mapping[str, Any]) -> Self:
        """The stage with what a survey decided; `decision` is plain data and is kept in the journal."""
        raise RecipeError(f"{self.name} decides nothing")

    def keeps_order(self, layers: int) -> bool:
        """Whether the layers afterwards stand in the order that they had, each at most once."""
        return True

    def check(self, spec: ModelSpec) -> None:
        """Raise RecipeError where the stage cannot be applied to a model of this shape."""

    def resolved(self, spec: ModelSpec) -> Stage:
        """The stage with what it leaves to the model's widths written out."""
        return self

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        """The spec of the model that it leaves."""
        return spec

    def without_text(self) -> Stage | None:
        """The same as well as it goes without calibration text; None where nothing is near."""
        return None if self.needs_corpus else self


def decided_later() -> Any:
    """A field that no recipe sets: a survey of the model decides it."""
    return field(default=None, metadata={"decided_later": True})


def _options(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    """The fields that a recipe can set."""
    return [item for item in dataclasses.fields(cls) if "decided_later" not in item.metadata]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _build(cls: type[Any], fields: Mapping[str, Any], where: str) -> Any:
    if not isinstance(fields, Mapping):
        raise RecipeError(f"{where} has the value {quoted(fields)}; it takes keys and values, such as "
                          f"{{{', '.join(item.name for item in _options(cls))}}}")
    known = {item.name for item in _options(cls)}
    for key in fields:
        if key not in known:
            raise RecipeError(f"{where} has no option {quoted(key)}{nearest(str(key), known)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in fields.items():
        if hints[key] is Protect:
            value = _build(Protect, value, f"{where}.protect")
        _check_type(value, hints[key], f"{where}.{key}")
        values[key] = value
    return cls(**values)


def _check_type(value: Any, hint: Any, where: str) -> None:
    """Accept plain types, unions and literals; containers are checked by their stage."""
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise RecipeError(f"{where} is {quoted(value)}, which is too large for anything")
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise RecipeError(f"{where} is {quoted(value)}{nearest(str(value), map(str, choices))}")
        return
    options = typing.get_args(hint) if origin in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        base = typing.get_origin(option) or option
        if base is typing.Literal and value in typing.get_args(option):
            return
        if base is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return
        plain = isinstance(base, type) and isinstance(value, base) and not (base is int and isinstance(value, bool))
        if plain or (base is list and isinstance(value, tuple)):
            return
    names = " or ".join(" or ".join(map(str, typing.get_args(option))) if typing.get_origin(option) is typing.Literal
                        else "nothing" if option is type(None) else getattr(option, "__name__", str(option))
                        for option in options)
    raise RecipeError(f"{where} is {quoted(value)}, of type {type(value).__name__}; it takes {names}")


@dataclass(frozen=True)
class Choice:
    """The layers that a LayerChoice keeps, in order, and why."""

    order: list[int]
    reasons: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerChoice(Stage):
    """Decides which layers run, in which order; moves no byte."""

    def layers_after(self, layers: int) -> int:
        """How many layers run afterwards."""
        raise RecipeError(f"{self.name} does not say how many layers it keeps")

    def spec_after(self, spec: ModelSpec) -> ModelSpec:
        return spec.with_layers(self.layers_after(spec.layers))

    def choose(self, view: View, workplace: Workplace) -> Choice:
        """The layers of `view` that the next stage sees."""
        raise RecipeError(f"{self.name} chooses nothing")


@dataclass(frozen=True)
class LinearEdit(Stage):
    """Gives one linear new values, knowing its inputs."""

    @property
    def needs_gram(self) -> bool:
        return False

    @property
    def needs_corpus(self) -> bool:
        return self.needs_gram

    @property
    def uses_factor(self) -> bool:
        """Whether the Gram's Cholesky factor is needed."""
        return False

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count as much as the loss depends on them, which a sweep back through the model finds first."""
        return False

    @property
    def follows_original(self) -> bool:
        """Whether it is told how the inputs differ from those of the model before this sweep."""
        return False

    @property
    def observes_again(self) -> bool:
        """Whether o_proj and down_proj are observed again after the linears before them were edited."""
        return False

    def applies_to(self, layer: int, layers: int) -> bool:
        return True

    def grid_for(self, d_in: int) -> Grid | None:
        """The grid that a linear is stored on afterwards; None leaves its form as it is."""
        return None

    @property
    def extra_bits(self) -> float:
        """Bits a weight of the whole model that some linears take beyond `grid_for`, at most."""
        return 0.0

    def end_grids(self, view: View) -> dict[str, GgmlGrid]:
        """The grids that embeddings and head are put on, by their modules' names; those left out stay as they are."""
        return {}

    def end_bytes(self, spec: ModelSpec, before: int) -> int:
        """What embeddings, final norm and head take afterwards, `before` bytes before."""
        return before

    def remarks(self, spec: ModelSpec) -> list[str]:
        """What a user should know of how the stage fits the model."""
        return []

    def model_bytes(self, spec: ModelSpec) -> int | None:
        """What all weights of the model take afterwards at most, where the edit keeps to a budget."""
        return None

    @property
    def completes_edit_before(self) -> bool:
        """Whether the edit makes sense only in one pass with the edit before it."""
        return False

    def adapter_bytes(self, shapes: Mapping[str, tuple[int, int]], layers: int, element: int) -> int:
        """Bytes that the edit leaves beside the linears of a layer, at most; `element` are those of a number in storage."""
        return 0

    def flops(self, d_out: int, d_in: int) -> float:
        """Floating-point operations for one linear, its Gram and factor not counted."""
        return 0.0

    def survey(self, view: View, workplace: Workplace) -> dict[str, Any] | None:
        """What a stage that must see the whole model finds out by itself; None where `probe` and `decide` do."""
        return None

    def probe(self, *, sparse: bool) -> tuple[LinearEdit, dict[str, list[float]]]:
        """An edit that changes nothing but fills notes about every linear, for `decide`."""
        raise RecipeError(f"{self.name} has nothing to survey")

    def probe_ends(self, view: View, corpus: Corpus, outputs: HiddenStates, notes: dict[str, list[float]],
                   squares: float) -> None:
        """Add notes about embeddings and head, given the last layer's outputs and the sensitivity of the first's inputs."""

    def decide(self, notes: Mapping[str, list[float]], view: View) -> dict[str, Any]:
        """What the notes of a whole sweep come to."""
        raise RecipeError(f"{self.name} decides nothing")

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        """Edit the linear in place; `last` says that no later edit needs the Gram's matrix."""
        raise RecipeError(f"{self.name} edits nothing")
