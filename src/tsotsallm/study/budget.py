"""The best use of a budget over everything at once: vocabulary, layers, widths, and the bits of every matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD, ModelSpec
from tsotsallm.errors import RecipeError
from tsotsallm.stages.allocation import allocate, allocate_within, candidates, on_grid, token_seconds
from tsotsallm.stages.neurons import Neurons
from tsotsallm.stages.quantize.sizes import other_bytes

BIT = 4.0
"""How many times as much is lost with a bit less, where a grid was not measured."""


@dataclass(frozen=True)
class Structure:
    """What a model is before its matrices get their grids: tokens kept, layers that go, the share of neurons that goes.

    vocabulary  tokens; None: all
    """

    removed: tuple[int, ...] = ()
    narrower: float = 0.0
    vocabulary: int | None = None

    @property
    def single(self) -> bool:
        """Whether it was measured as it is: nothing goes, or of one kind only."""
        return not (self.removed and self.narrower)

    @property
    def name(self) -> str:
        """What was removed, in a few words."""
        parts = [f"{self.vocabulary} tokens"] if self.vocabulary is not None else []
        parts += [f"{len(self.removed)} layer{'s' if len(self.removed) > 1 else ''} fewer"] if self.removed else []
        parts += [f"{self.narrower:.0%} fewer neurons"] if self.narrower else []
        return ", ".join(parts) or "all layers and neurons"

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The spec of the model that the structure leaves."""
        found = whole.with_layers(whole.layers - len(self.removed))
        if self.vocabulary is not None:
            found = ModelSpec(found.config | {"vocab_size": self.vocabulary}, found.quantization, found.layer_order)
        return Neurons(feed_forward=self.narrower).spec_after(found) if self.narrower else found

    def stages(self, layers: int, keep: Sequence[str] = ()) -> list[Any]:
        """The stages that make it; `keep` are the texts whose tokens stay."""
        kept = [layer for layer in range(layers) if layer not in self.removed]
        found: list[Any] = []
        if self.vocabulary is not None:
            found.append({"vocabulary": {"keep": list(keep), "size": self.vocabulary}})
        if self.removed:
            found.append({"layers": {"order": kept}})
        return found + ([{"neurons": {"feed_forward": self.narrower}}] if self.narrower else [])


@dataclass(frozen=True)
class Measured:
    """What units cost and hurt, each by itself, in nats a token (KL divergence).

    order       layers, that whose removal hurts least first
    depth       loss with the first k of them removed, for k from 0 on
    width       share of neurons -> loss
    grids       `layer.linear`, embeddings or head -> grid -> loss
    vocabulary  tokens -> loss; empty where all are kept
    alone       layer -> what the loss rises by without it alone
    seconds     grid -> seconds that one weight takes in a new token on this machine, where speed matters
    """

    order: tuple[int, ...]
    depth: tuple[float, ...]
    width: dict[float, float]
    grids: dict[str, dict[str, float]]
    vocabulary: dict[int, float] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def structure_loss(self, structure: Structure) -> float:
        """The sum of what its units cost."""
        tokens = self.vocabulary[structure.vocabulary] if structure.vocabulary is not None else 0.0
        return tokens + self.depth[len(structure.removed)] + self.width[structure.narrower]


@dataclass(frozen=True)
class Corrections:
    """How what was measured compares with the sums of units: loss of structure, loss of grids, seconds a token.

    recovered  whether what was cut learns by before it is measured, so that no structure is what its units say
    """

    structure: float = 1.0
    grids: float = 1.0
    seconds: float = 1.0
    recovered: bool = False

    def known(self, structure: Structure) -> bool:
        """Whether units say what a structure loses, with nothing to correct."""
        return structure.single and not self.recovered


@dataclass(frozen=True)
class Limits:
    """What a candidate must not exceed: bytes of the file, seconds a new token takes."""

    bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Plan:
    """A way to use a budget, and what is expected of it: nats a token, seconds a token."""

    structure: Structure
    bytes: int
    structure_loss: float
    grids_loss: float
    seconds: float | None = None

    @property
    def loss(self) -> float:
        """The loss expected of the plan, in nats a token."""
        return self.structure_loss + self.grids_loss


def structures(measured: Measured) -> Iterator[Structure]:
    """Every combination of vocabulary, depth and width that was measured."""
    sizes: list[int | None] = [*sorted(measured.vocabulary, reverse=True)] or [None]
    for vocabulary in sizes:
        for removed in range(len(measured.depth)):
            for narrower in sorted(measured.width):
                yield Structure(tuple(sorted(measured.order[:removed])), narrower, vocabulary)


@dataclass(frozen=True)
class Choices:
    """What the matrices of a structure can take: per matrix and grid its bytes, its loss, its seconds; and fixed bytes."""

    fixed: int
    sizes: dict[str, list[int]]
    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]

    @classmethod
    def of(cls, structure: Structure, whole: ModelSpec, directory: Path, measured: Measured) -> Choices:
        """What a narrower linear loses on a grid is its share of what the whole one does."""
        spec = structure.spec(whole)
        kept = [layer for layer in range(whole.layers) if layer not in structure.removed]
        shapes: dict[str, tuple[tuple[int, int], float]] = {}
        for layer, original in enumerate(kept):
            before = linear_shapes(whole, original)
            shapes |= {f"{original}.{name}": (shape, math.prod(shape) / math.prod(before[name]))
                       for name, shape in linear_shapes(spec, layer).items()}
        for end in (EMBEDDING, HEAD)[:1 if spec.tied else 2]:
            shapes[end.removesuffix(".weight")] = ((spec.vocabulary, spec.hidden), 1.0)
        found = cls(other_bytes(spec, directory) + sum(2 * math.prod(shape) for shape, _ in shapes.values()
                                                       if not candidates(shape[1])), {}, {}, {})
        for key, (shape, share) in shapes.items():
            if grids := candidates(shape[1]):
                known = measured.grids.get(key, {})
                found.sizes[key] = [*(grid.stored_bytes(*shape) for grid in grids), 2 * math.prod(shape)]
                found.losses[key] = [*(share * on_grid(grid, known, BIT) for grid in grids), 0.0]
                found.seconds[key] = [math.prod(shape) * taken for taken in token_seconds(grids, measured.seconds)]
        return found

    @property
    def smallest(self) -> int:
        """Bytes that the smallest choice takes."""
        return self.fixed + sum(min(sizes) for sizes in self.sizes.values())

    def best(self, limits: Limits) -> dict[str, int] | None:
        """The grid of every matrix, by place, that loses least within the limits; None where none is within."""
        budget = limits.bytes - self.fixed
        try:
            if limits.seconds is None:
                return allocate(self.losses, self.sizes, budget)
            return allocate_within(self.losses, self.sizes, budget, self.seconds, limits.seconds)
        except RecipeError:
            return None

    @staticmethod
    def total(of: Mapping[str, Sequence[float]], chosen: Mapping[str, int]) -> float:
        """The sum of a quantity over a choice."""
        return sum(of[key][place] for key, place in chosen.items())


def plan_for(structure: Structure, whole: ModelSpec, directory: Path, measured: Measured, corrections: Corrections,
             limits: Limits) -> Plan | None:
    """The best grids for a structure within some limits; None where even the smallest or fastest are not."""
    choices = Choices.of(structure, whole, directory, measured)
    allowed = limits.seconds / corrections.seconds if limits.seconds is not None else None
    chosen = choices.best(Limits(limits.bytes, allowed))
    if chosen is None:
        return None
    seconds = corrections.seconds * choices.total(choices.seconds, chosen) if measured.seconds else None
    return Plan(structure, choices.fixed + int(choices.total(choices.sizes, chosen)),
                (1.0 if corrections.known(structure) else corrections.structure) * measured.structure_loss(structure),
                corrections.grids * choices.total(choices.losses, chosen), seconds)


def smallest(whole: ModelSpec, directory: Path, measured: Measured) -> tuple[int, Structure]:
    """The fewest bytes that any structure takes on its smallest grids."""
    return min(((Choices.of(structure, whole, directory, measured).smallest, structure)
                for structure in structures(measured)), key=lambda one: one[0])


def corrected(pairs: Sequence[tuple[float, float]]) -> float:
    """The factor between predicted and measured losses: the mean of their ratios, by the logarithm."""
    ratios = [math.log(measured / predicted) for predicted, measured in pairs if predicted > 1e-9 and measured > 1e-9]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
