"""The best use of a budget over everything at once: vocabulary, layers, widths, and the bits of every matrix."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tsotsallm.checkpoint.gguf_layout import aligned
from tsotsallm.checkpoint.shapes import linear_shapes
from tsotsallm.checkpoint.spec import EMBEDDING, HEAD
from tsotsallm.errors import RecipeError
from tsotsallm.fit.files import Files, Structure
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.stages.allocation import DENSE, allocate, candidates

BIT = 4.0
"""How many times as much is lost with a bit less, where a grid was not measured."""
CHEAPEST, DEAREST, HALVINGS = 1e-12, 1e12, 60
"""Nats that a second may cost, and how often the range of prices is halved."""
HOPELESS = 2.0
"""Units are taken no further once they cost so many nats a token."""
UNSURE = 0.3
"""How far predictions are thought to be off at most, by the logarithm."""


@dataclass(frozen=True)
class Measured:
    """What units cost and hurt, each by itself, in nats a token (KL divergence).

    order        layers, that whose removal hurts least first
    depth        loss with the first k of them removed, for k from 0 on
    width        share of neurons -> loss
    grids        `layer.linear`, embeddings or head -> grid -> loss
    vocabulary   tokens -> loss; empty where all are kept
    alone        layer -> what the loss rises by without it alone
    seconds      grid -> seconds that one weight takes in a new token on this machine, where speed matters
    activations  as `grids`, what the rounding of inputs adds in llama.cpp: it counts in the choice of grids, not in
                 predictions, which are compared with losses in float32
    until        nats up to which layers and shares of neurons were measured: dearer ones are not known
    """

    order: tuple[int, ...]
    depth: tuple[float, ...]
    width: dict[float, float]
    grids: dict[str, dict[str, float]]
    vocabulary: dict[int, float] = field(default_factory=dict)
    alone: dict[int, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    activations: dict[str, dict[str, float]] = field(default_factory=dict)
    until: float = HOPELESS

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
    """A way to use a budget, and what is expected of it: bytes of the file at most, nats a token, seconds a token."""

    structure: Structure
    grids: dict[str, str]
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
    """What the matrices of a structure can take: the names of grids, and for each its bytes, its loss, its seconds.

    fixed        bytes of the file beside these matrices, with the longest names of grids in its recipe
    activations  what the rounding of their inputs adds to the loss in llama.cpp
    """

    structure: Structure
    fixed: int
    names: dict[str, list[str]]
    sizes: dict[str, list[int]]
    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]
    activations: dict[str, list[float]]

    @classmethod
    def of(cls, structure: Structure, files: Files, measured: Measured) -> Choices:
        """What a narrower linear loses on a grid is its share of what the whole one does."""
        spec, whole = structure.spec(files.whole), files.whole
        known: dict[str, tuple[tuple[int, int], float, str]] = {}
        for layer, original in enumerate(structure.kept(whole.layers)):
            before = linear_shapes(whole, original)
            known |= {f"{layer}.{name}": (shape, math.prod(shape) / math.prod(before[name]), f"{original}.{name}")
                      for name, shape in linear_shapes(spec, layer).items()}
        for end in (EMBEDDING, HEAD)[:1 if spec.tied else 2]:
            module = end.removesuffix(".weight")
            known[module] = (spec.vocabulary, spec.hidden), 1.0, module
        grids = {key: candidates(shape[1]) for key, (shape, _, _) in known.items()}
        longest = {key: max((one.type for one in some), key=len) for key, some in grids.items() if some}
        found = cls(structure, files.layout(structure, longest).bytes_beside_matrices + sum(
            aligned(2 * math.prod(shape)) for key, (shape, _, _) in known.items() if not grids[key]), {}, {}, {}, {}, {})
        for key, some in grids.items():
            shape, share, original_key = known[key]
            losses, activations = (of.get(original_key, {}) for of in (measured.grids, measured.activations))
            if some:
                found.names[key] = [*(grid.type for grid in some), DENSE]
                found.sizes[key] = [aligned(size) for size in (*(grid.stored_bytes(*shape) for grid in some),
                                                               2 * math.prod(shape))]
                found.losses[key] = [*(share * on_grid(grid, losses, BIT) for grid in some), 0.0]
                found.activations[key] = [*(share * on_grid(grid, activations, 1.0) for grid in some), 0.0]
                found.seconds[key] = [math.prod(shape) * taken for taken in token_seconds(some, measured.seconds)]
        return found

    def surveyed(self, losses: Mapping[str, Mapping[str, float]],
                 activations: Mapping[str, Mapping[str, float]]) -> Choices:
        """The same, with what matrices of the structure itself lose on their grids, and through their inputs."""
        own, more = ({key: [of[key].get(name, 0.0) for name in names] for key, names in self.names.items()}
                     for of in (losses, activations))
        return replace(self, losses=own, activations=more)

    @property
    def smallest(self) -> int:
        """Bytes that the smallest choice takes."""
        return self.fixed + sum(min(sizes) for sizes in self.sizes.values())

    def best(self, limits: Limits) -> dict[str, int] | None:
        """The grid of every matrix, by place, that loses least in llama.cpp within the limits; None where none is within."""
        budget = limits.bytes - self.fixed
        losses = {key: [own + more for own, more in zip(losses, self.activations[key], strict=True)]
                  for key, losses in self.losses.items()}
        try:
            if limits.seconds is None:
                return allocate(losses, self.sizes, budget)
            return allocate_within(losses, self.sizes, budget, self.seconds, limits.seconds)
        except RecipeError:
            return None

    @staticmethod
    def total(of: Mapping[str, Sequence[float]], chosen: Mapping[str, int]) -> float:
        """The sum of a quantity over a choice."""
        return sum(of[key][place] for key, place in chosen.items())


def plan_for(choices: Choices, measured: Measured, corrections: Corrections, limits: Limits) -> Plan | None:
    """The best grids for a structure within some limits; None where even the smallest or fastest are not."""
    allowed = limits.seconds / corrections.seconds if limits.seconds is not None else None
    chosen = choices.best(Limits(limits.bytes, allowed))
    if chosen is None:
        return None
    structure, seconds = choices.structure, None
    if measured.seconds:
        seconds = corrections.seconds * choices.total(choices.seconds, chosen)
    return Plan(structure, {key: choices.names[key][place] for key, place in chosen.items()},
                choices.fixed + int(choices.total(choices.sizes, chosen)),
                (1.0 if corrections.known(structure) else corrections.structure) * measured.structure_loss(structure),
                corrections.grids * choices.total(choices.losses, chosen), seconds)


def allocate_within(losses: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]], budget: int,
                    seconds: Mapping[str, Sequence[float]], limit: float) -> dict[str, int]:
    """The same, with the sum of `seconds` at most `limit`: they are bought with loss at one price for all items (a Lagrange
    multiplier, found by halving)."""
    def at(price: float) -> tuple[dict[str, int], float]:
        priced = {name: [loss + price * time for loss, time in zip(losses[name], seconds[name], strict=True)]
                  for name in losses}
        chosen = allocate(priced, sizes, budget)
        return chosen, sum(seconds[name][choice] for name, choice in chosen.items())

    chosen, taken = at(0.0)
    if taken <= limit:
        return chosen
    low, high = CHEAPEST, DEAREST
    chosen, taken = at(high)
    if taken > limit:
        raise RecipeError(f"a new token is expected to take {taken:.3g} s at best, but {limit:.3g} s is the limit; allow "
                          "more, or remove layers, neurons or vocabulary first")
    for _ in range(HALVINGS):
        price = math.sqrt(low * high)
        tried, taken = at(price)
        low, high, chosen = (low, price, tried) if taken <= limit else (price, high, chosen)
    return chosen


def on_grid(grid: GgmlGrid, known: Mapping[str, float], bit: float) -> float:
    """What is known of a grid, such as its loss; of one that is not known, from the nearest: a bit less is worth so many
    times as much. 0 where nothing is known."""
    grids = [name for name in known if name != DENSE]
    if not grids:
        return 0.0
    if grid.type in known:
        return known[grid.type]
    nearest = min(grids, key=lambda name: abs(GgmlGrid(name).bits_per_weight - grid.bits_per_weight))
    return float(known[nearest] * bit ** (GgmlGrid(nearest).bits_per_weight - grid.bits_per_weight))


def token_seconds(grids: Sequence[GgmlGrid], known: Mapping[str, float]) -> list[float]:
    """Seconds that a weight takes in a new token on each of some grids, and in 16 bits."""
    dense = known.get(DENSE, max(known.values(), default=0.0))
    return [*(on_grid(grid, known, 1.0) for grid in grids), dense]


def corrected(pairs: Sequence[tuple[float, float]]) -> float:
    """The factor between predicted and measured losses: the mean of their ratios, by the logarithm."""
    ratios = [math.log(measured / predicted) for predicted, measured in pairs if predicted > 1e-9 and measured > 1e-9]
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0


def unsure(pairs: Iterable[tuple[float, float]]) -> float:
    """How far, by the logarithm, the next prediction may be off, given (predicted, measured) of the n until now.

    Corrections take away the mean of log(measured / predicted), so that its spread s is left, and that of the mean:
    s·√(1 + 1/n). It is at most UNSURE, and UNSURE where fewer than two say anything.
    """
    off = [math.log(measured / predicted) for predicted, measured in pairs if predicted > 0 and measured > 0]
    return min(UNSURE, statistics.stdev(off) * math.sqrt(1 + 1 / len(off))) if len(off) > 1 else UNSURE
