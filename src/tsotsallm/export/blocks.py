"""Integer grids as blocks of ggml: the same codes with the same scales, where a type of GGUF can hold both.

A matrix of ours has one scale s for a group of columns, and values s·(code − zero point). Three of ggml's forms hold these:

    d·q                   with d = s                          q4_0, q5_0, q8_0, and by parts q3_k, q6_k
    d·q + m               with d = s, m = −s·zero point       q4_1, q5_1, where half precision holds every m
    d·1·q − e·z           with d = e = s, z an integer        by parts: q2_k, q4_k, q5_k

The scale is repeated for every block of 32 or 256 columns, so blocks must divide the groups. Asymmetric grids fit the
first form too: a code less its zero point is an integer with one more bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.numerics.ggml import Blocks, GgmlGrid, half
from tsotsallm.numerics.grids import IntegerGrid, NormalFloatGrid, Quantised

TYPES = ("q2_k", "q3_k", "q4_0", "q4_k", "q4_1", "q5_0", "q5_k", "q5_1", "q6_k", "q8_0")
"""The types to try, the smallest first; of two with equal size, the one with simpler blocks."""
BLOCK = 32
"""Columns of the smallest block."""
SUBNORMAL = 2.0 ** -14
"""Below this, half precision has fewer digits; dense weights of this size are rounded as well."""


@dataclass(frozen=True)
class Packing:
    """How GGUF holds a matrix on an integer grid.

    source  its integer grid
    grid    the smallest type that holds its codes and scales; None where none does
    reason  why none does, phrased to follow "with"
    share   the relative change of a scale in half precision, where that is the reason
    change  the largest change of a value, where scales below 2⁻¹⁴ lose digits; 0 where everything is exact
    """

    source: IntegerGrid
    grid: GgmlGrid | None
    reason: str = ""
    share: float = 0.0
    change: float = 0.0


def packing_of(grid: IntegerGrid, d_in: int, scales: Tensor, zero_points: Tensor | None) -> Packing:
    """Choose the type for a matrix with `d_in` columns from its scales and zero points, both (d_out, groups)."""
    group = grid.group or d_in
    if isinstance(grid, NormalFloatGrid):
        return Packing(grid, None, "levels of a normal distribution, nf4")
    if group % BLOCK:
        return Packing(grid, None, f"one scale for {group} columns, which blocks of {BLOCK} do not divide")
    scales = scales.float()
    rounded = half(scales)
    change = torch.where(rounded == scales, 0.0, (rounded - scales).abs())
    wrong = (change > 0) & (scales.abs() >= SUBNORMAL)
    if bool(wrong.any()):
        share = float((change / scales.abs())[wrong].max())
        return Packing(grid, None, "scales that half precision does not hold", share)
    least, most = _span(grid, zero_points)
    for name in TYPES:
        target = GgmlGrid(name)
        if group % target.layout.block == 0 and _holds(target, grid, rounded, zero_points):
            return Packing(grid, target, change=float(change.max()) * max(-least, most))
    return Packing(grid, None, "codes and zero points that need more than 8 bits together")


def held(packings: Iterable[Packing], storage: torch.dtype) -> list[str]:
    """A note for every grid and type about the matrices that GGUF can hold."""
    counts: dict[tuple[IntegerGrid, GgmlGrid], int] = {}
    changes: dict[tuple[IntegerGrid, GgmlGrid], float] = {}
    for packing in packings:
        if packing.grid is not None:
            key = packing.source, packing.grid
            counts[key], changes[key] = counts.get(key, 0) + 1, max(changes.get(key, 0.0), packing.change)
    sentences = []
    for (source, grid), count in counts.items():
        change = changes[source, grid]
        sentences.append(
            f"{count} linears of {source.bits} bits are packed as {grid.type}, with the same codes and "
            + (f"scales in half precision, which changes values by at most {change:.1g}" if change else "the same scales")
            + ("" if storage == torch.float32 else "; values are code times scale, which readers of the checkpoint round to "
               f"{str(storage).removeprefix('torch.')}, by at most {torch.finfo(storage).eps / 2:.2%}")
            + (f"; {grid.bits_per_weight} bits per weight are more than {source.bits} bits need: q2_k and q3_k are GGUF's "
               "own grids for these" if source.bits < 4 <= grid.layout.bits else ""))
    return sentences


def not_held(packings: Iterable[Packing]) -> str:
    """A note about the matrices that no type of GGUF can hold, and why; empty where there are none."""
    loose = [packing for packing in packings if packing.grid is None]
    if not loose:
        return ""
    share = max(packing.share for packing in loose)
    reasons = ", and ".join(dict.fromkeys(packing.reason for packing in loose))
    return (f"{len(loose)} linears fit no type of GGUF exactly, with {reasons}"
            + ("" if share == 0 else " (some would be infinite)" if share == float("inf") else
               f" (it would change values by up to {share:.2g} of themselves)"))


def blocks_of(matrix: Quantised, target: GgmlGrid) -> Blocks:
    """A matrix as blocks of the type that `packing_of` chose."""
    layout = target.layout
    d_out, d_in = matrix.codes.shape
    groups = matrix.scales.shape[1]
    step = half(matrix.scales).repeat_interleave(d_in // layout.block // groups, dim=1)
    zeros = torch.zeros_like(matrix.scales) if matrix.zero_points is None else matrix.zero_points
    zeros, codes = zeros.to(torch.int16), matrix.codes.to(torch.int16)
    scales = None if layout.scales is None else torch.ones(d_out, d_in // layout.part, dtype=torch.int16)
    if not layout.minimum:
        codes = codes - zeros.repeat_interleave(d_in // groups, dim=1)
        return Blocks(codes.to(torch.int8), step, None, scales, None, target)
    codes, lows = (codes - matrix.grid.lowest).to(torch.int8), zeros - matrix.grid.lowest
    if scales is None:
        return Blocks(codes, step, -lows.repeat_interleave(step.shape[1] // groups, dim=1) * step, None, None, target)
    return Blocks(codes, step, step, scales, lows.repeat_interleave(scales.shape[1] // groups, dim=1), target)


def _span(grid: IntegerGrid, zero_points: Tensor | None) -> tuple[int, int]:
    """The smallest and the largest possible value of a code less its zero point."""
    if zero_points is None:
        return grid.lowest, grid.highest
    return grid.lowest - int(zero_points.max()), grid.highest - int(zero_points.min())


def _holds(target: GgmlGrid, grid: IntegerGrid, scales: Tensor, zero_points: Tensor | None) -> bool:
    """Whether a type holds all possible codes, with scales that half precision holds."""
    layout = target.layout
    if not layout.minimum:
        least, most = _span(grid, zero_points)
        lowest = -128 if target.type == "q8_0" else target.lowest       # ggml never rounds to -128, but reads it
        return lowest <= least and most <= target.highest
    if grid.bits > layout.bits:
        return False
    if layout.scales is not None:
        return grid.highest - grid.lowest <= layout.scales[1]
    low = scales * (-grid.lowest if zero_points is None else zero_points.float() - grid.lowest)
    return torch.equal(half(low), low)
