"""A grid for every matrix of a model: measured losses, a budget of bits, the best use of them."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from torch import Tensor

from tsotsallm.checkpoint.linear import Linear
from tsotsallm.errors import RecipeError
from tsotsallm.machine import compiler
from tsotsallm.numerics.ggml import GgmlGrid
from tsotsallm.numerics.rounding import block_order, round_to_blocks
from tsotsallm.stages.contract import LinearEdit
from tsotsallm.streaming.statistics import Gram
from tsotsallm.units import human_bytes

MIXED = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
DENSE = "f16"
"""What a matrix on no grid takes in a GGUF file: 16 bits, and nothing is lost."""
ACTIVATIONS = ":activations"
"""Ends the key of a note about what the rounding of a matrix's inputs costs."""
MIXED_WITH_ZEROS = ("q3_k", "q4_0", "q5_0", "q6_k", "q8_0")


def candidates(d_in: int, *, zeros: bool = False) -> list[GgmlGrid]:
    """The grids that a matrix with rows so long can take, each once, the smallest first."""
    found = [GgmlGrid(name).fitting(d_in, zeros=zeros) for name in (MIXED_WITH_ZEROS if zeros else MIXED)]
    unique = {grid for grid in found if grid is not None}
    return sorted(unique, key=lambda grid: (grid.bits_per_weight, grid.type))


@dataclass(frozen=True)
class Probe(LinearEdit):
    """Notes for every linear what the loss is expected to rise by on each grid that it can take, in nats a token.

    ½·g²·tr(Δ·H·Δᵀ)·tokens with g² the mean square of the mean loss's gradient by an output of the linear: its second-order
    change where the gradient stands for the Fisher information and outputs for one another. Under the linear's key with
    ACTIVATIONS stands what the loss rises by in llama.cpp besides, which rounds the inputs (see `activation_error`).
    """

    name: ClassVar[str] = "probe"
    damp: float = 0.01
    zeros: bool = False
    notes: dict[str, list[float]] = field(default_factory=dict)

    @property
    def leaves_python(self) -> bool:
        """Where a compiler is installed."""
        return compiler() is not None

    def edit(self, linear: Linear, gram: Gram | None, layer: int, *, last: bool) -> None:
        """Note the expected rise of the loss on each grid; the linear stays as it is."""
        assert gram is not None
        losses, rounded_inputs = [], []
        per_square = 0.5 * gram.squares[linear.name] * gram.tokens
        for grid in candidates(linear.d_in, zeros=self.zeros):
            layout = grid.layout
            factor = gram.factor(self.damp, f"blocks of {layout.block} in parts of {layout.part}",
                                        partial(block_order, grid=grid))
            keep = linear.mask if grid.holds_zeros else None
            rounded = round_to_blocks(linear.dense, factor.upper, factor.order, grid, passes=0, keep=keep)
            errors = linear.dense - rounded.dequantise()
            losses.append(per_square * float((gram.times(errors.mT).mT * errors).sum()))
            rounded_inputs.append(per_square * float(activation_error(linear.dense, gram, grid).sum()))
        self.notes.update({f"{layer}.{linear.name}": losses, f"{layer}.{linear.name}{ACTIVATIONS}": rounded_inputs})


def activation_error(weight: Tensor, gram: Gram, grid: GgmlGrid) -> Tensor:
    """The sum over tokens, each with its weight, of the squared error of every output of a matrix, (d_out,), that comes of
    rounding its inputs.

    llama.cpp's kernels for a grid round what they multiply by it to whole numbers of −127 to 127, with a scale for each
    block of the grid's columns: the largest |x| / 127, which itself is exact. Other errors are thought to be uniform, s²/12,
    and independent.
    """
    block = grid.layout.block
    squares = weight.reshape(len(weight), -1, block).square().sum(-1)              # (d_out, d_in / block)
    return (squares @ gram.peaks[block]).mul_((1 - 1 / block) / (12 * 127 ** 2))


def require_budget(budget: int, least: int) -> None:
    """Raise RecipeError where the smallest grids of all matrices take more bytes than the budget has."""
    if budget < least:
        raise RecipeError(f"the budget is {human_bytes(budget)}, but the smallest grids take {human_bytes(least)}; "
                          "give more, or remove layers, neurons or vocabulary first")


def allocate(losses: Mapping[str, Sequence[float]], sizes: Mapping[str, Sequence[int]], budget: int) -> dict[str, int]:
    """Which choice each item takes, so that the sum of losses is small and that of sizes at most `budget`.

    Items move along the lower convex hulls of (size, loss) where a byte takes off most: optimal for the budgets that are
    met exactly, else within the last step of it (the relaxed multiple-choice knapsack; Sinha and Zoltners, 1979). What is
    left is spent on single steps that still fit.
    """
    hulls = {name: _hull(sizes[name], losses[name]) for name in losses}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(sizes[name][choice] for name, choice in chosen.items())
    require_budget(budget, budget - left)
    heap: list[tuple[float, str, int]] = []

    def offer(name: str, step: int) -> None:
        hull = hulls[name]
        if step + 1 < len(hull):
            before, after = hull[step], hull[step + 1]
            gain = (losses[name][before] - losses[name][after]) / (sizes[name][after] - sizes[name][before])
            heapq.heappush(heap, (-gain, name, step))

    for name in hulls:
        offer(name, 0)
    while heap:
        _, name, step = heapq.heappop(heap)
        more = sizes[name][hulls[name][step + 1]] - sizes[name][hulls[name][step]]
        if more > left:
            continue                        # another item's step may still fit
        left -= more
        chosen[name] = hulls[name][step + 1]
        offer(name, step + 1)
    return chosen


def _hull(sizes: Sequence[int], losses: Sequence[float]) -> list[int]:
    """The choices on the lower convex hull, from the smallest on, each with less loss than those before it."""
    order = sorted((place for place in range(len(sizes)) if math.isfinite(losses[place])),
                   key=lambda place: (sizes[place], losses[place]))
    hull: list[int] = []
    for place in order:
        if hull and losses[place] >= losses[hull[-1]]:
            continue
        while len(hull) > 1 and _slope(sizes, losses, hull[-2], hull[-1]) >= _slope(sizes, losses, hull[-1], place):
            hull.pop()
        if hull and sizes[place] == sizes[hull[-1]]:
            continue
        hull.append(place)
    assert all(sizes[a] < sizes[b] for a, b in itertools.pairwise(hull))
    return hull


def _slope(sizes: Sequence[int], losses: Sequence[float], first: int, second: int) -> float:
    return (losses[second] - losses[first]) / (sizes[second] - sizes[first])
