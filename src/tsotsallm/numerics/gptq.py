"""Rounding and pruning column by column, each error compensated by the columns that are still free.

GPTQ (arXiv:2210.17323) works with the upper Cholesky factor of the inverse Gram. The same updates follow from the
Cholesky factor of the Gram itself (arXiv:2307.13304, theorem 6): with H = Rᵀ R in reversed column order, column r is
rounded at  w_r + Σ_{i>r} (R[r, i] / R[r, r]) · e_i,  where e_i = w_i − ŵ_i are the errors made so far. No inverse is
formed, which saves two thirds of the cubic cost and one matrix of memory. All arrays here are in reversed visiting
order and hold the columns of a weight as rows, so that every step reads contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tsotsallm.errors import NumericsError
from tsotsallm.machine import threads_for
from tsotsallm.numerics.grids import IntegerGrid, Quantised
from tsotsallm.numerics.masks import keep_all_but, keep_fraction
from tsotsallm.timing import counted

BLOCK = 128
SUB_BLOCK = 16
PERMUTED_ROWS = 256


def visiting_order(gram_diagonal: Tensor, act_order: bool) -> Tensor:
    """Column order, (d_in,) int64: as stored, or by falling Gram diagonal with the lower column first in ties."""
    if act_order:
        return gram_diagonal.sort(descending=True, stable=True).indices
    return torch.arange(len(gram_diagonal), device=gram_diagonal.device)


def reversed_factor(gram: Tensor, order: Tensor, damp: float, *, overwrite: bool = False) -> Tensor:
    """Upper Cholesky factor R of the damped Gram in reversed visiting order: H = Rᵀ R, (d_in, d_in).

    The diagonal is raised by `damp` times its mean (by one where all inputs are zero). With `overwrite` the factor
    takes the Gram's place, so that no second matrix is in memory. Raises NumericsError where the damped Gram is not
    positive definite.
    """
    raised = damp * gram.diagonal().mean()
    if raised <= 0:
        raised = torch.ones_like(raised)
    factor = gram if overwrite else gram.clone()
    _permute_in_place(factor, order.flip(0))
    factor.diagonal().add_(raised)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    # A symmetric matrix equals its transpose, which LAPACK factors in place.
    with threads_for(len(factor) ** 3 / 3):
        torch.linalg.cholesky_ex(factor.mT, out=(factor.mT, info))
    if info.item():
        raise NumericsError(f"the Gram of {len(gram)} inputs is not positive definite with damp {damp:g} "
                            f"(at column {int(info.item())}); raise damp, or calibrate on more text")
    return factor


def _permute_in_place(matrix: Tensor, order: Tensor) -> None:
    """matrix[order][:, order] without a second matrix: rows along the cycles of the order, then columns in blocks."""
    sources = order.tolist()
    placed = [False] * len(sources)
    for start in range(len(sources)):
        if placed[start] or sources[start] == start:
            continue
        saved, row = matrix[start].clone(), start
        while sources[row] != start:
            matrix[row] = matrix[sources[row]]
            placed[row] = True
            row = sources[row]
        matrix[row] = saved
        placed[row] = True
    for start in range(0, len(matrix), PERMUTED_ROWS):
        rows = matrix[start:start + PERMUTED_ROWS]
        rows.copy_(rows.index_select(1, order))


def _sweep_columns(values: Tensor, factor: Tensor, settle: Callable[[int, Tensor], Tensor],
                   prepare: Callable[[int, int, Tensor], None] | None = None, unit: int = SUB_BLOCK) -> None:
    """Visit the rows of `values` (reversed columns, (d_in, d_out)) from last to first and leave the errors in them.

    settle(r, wanted) returns the value that column r gets, given the value that compensation calls for; prepare(low, high,
    wanted) sees the compensated values of each `unit` columns before they are settled.
    """
    d_in = len(values)
    diagonal = factor.diagonal()
    block = unit * max(1, BLOCK // unit)
    for block_high in range(d_in, 0, -block):
        block_low = max(0, block_high - block)
        # compensation still owed to this block by all columns settled before it
        weights = factor[block_low:block_high, block_high:] / diagonal[block_low:block_high, None]
        with threads_for(2 * weights.numel() * values.shape[1]):
            wanted = torch.addmm(values[block_low:block_high], weights, values[block_high:])
        errors = values[block_low:block_high]
        local = factor[block_low:block_high, block_low:block_high] / diagonal[block_low:block_high, None]
        size = block_high - block_low
        with threads_for(2 * unit * size * values.shape[1]):
            for high in range(size, 0, -unit):
                low = max(0, high - unit)
                if high < size:
                    wanted[low:high].addmm_(local[low:high, high:], errors[high:])
                if prepare is not None:
                    prepare(block_low + low, block_low + high, wanted[low:high])
                for r in range(high - 1, low - 1, -1):
                    if r + 1 < high:
                        wanted[r].addmv_(errors[r + 1:high].mT, local[r, r + 1:high])
                    errors[r].sub_(settle(block_low + r, wanted[r]))


@counted("rounding")
def gptq(weight: Tensor, factor: Tensor, order: Tensor, grid: IntegerGrid, storage: torch.dtype,
         keep: Tensor | None = None, *, searched: bool = False) -> Quantised:
    """Quantise with error compensation (arXiv:2210.17323, algorithm 1), scales fixed in the stored column order.

    With `searched`, scales cover the share of each group's range that leaves the least error, a column counting by what
    columns after it cannot compensate: R[r, r]². weight (d_out, d_in); factor from `reversed_factor` with the same order;
    keep (d_out, d_in) bool holds the pruned weights at exactly zero while the others compensate for them.
    """
    d_out, d_in = weight.shape
    backwards, kept_weight = order.flip(0), weight if keep is None else weight * keep
    if searched:
        importance = torch.empty_like(factor.diagonal())
        importance[backwards] = factor.diagonal().square()
        scales, zero_points = grid.searched(kept_weight, storage, importance)
    else:
        scales, zero_points = grid.fit(kept_weight, storage)
    del kept_weight
    width = grid.group or d_in
    columns = backwards.tolist()
    values = weight.mT[backwards]                       # (d_in, d_out), reversed visiting order
    scale_rows = scales.mT.to(weight.dtype).contiguous()      # (groups, d_out)
    zero_codes = None if zero_points is None else zero_points.mT.contiguous()
    zero_rows = None if zero_codes is None else zero_codes.to(weight.dtype)
    kept = None if keep is None else keep.mT[backwards]
    codes = torch.empty(d_in, d_out, dtype=torch.int8, device=weight.device)
    rounded = torch.empty(d_out, dtype=weight.dtype, device=weight.device)

    def settle(r: int, wanted: Tensor) -> Tensor:
        group = columns[r] // width
        torch.div(wanted, scale_rows[group], out=rounded)
        if zero_rows is not None:
            rounded.add_(zero_rows[group])
        nearest = grid.nearest(rounded)
        if kept is not None:
            nearest = torch.where(kept[r], nearest, grid.zero if zero_codes is None else zero_codes[group])
        codes[r] = nearest
        rounded.copy_(grid.levels(nearest))
        if zero_rows is not None:
            rounded.sub_(zero_rows[group])
        rounded.mul_(scale_rows[group])
        return rounded if storage == weight.dtype else rounded.to(storage).to(weight.dtype)

    _sweep_columns(values, factor, settle)
    del values
    stored_order = torch.empty_like(codes)
    stored_order[backwards] = codes
    return Quantised(stored_order.mT.contiguous(), scales, zero_points, grid)


@counted("rounding")
def sparsegpt(weight: Tensor, factor: Tensor, prune: int = 0, group: int = 0,
              prune_fraction: float = 0.0) -> tuple[Tensor, Tensor]:
    """Prune with error compensation (arXiv:2301.00774, algorithm 1); returns new weights and the mask, both (d_out, d_in).

    factor from `reversed_factor` in stored order, which is also the visiting order. The saliency is w² · R[r, r]²: N:M is
    decided group by group on compensated values, `prune_fraction` within every block of 128 columns.
    """
    d_out, d_in = weight.shape
    values = weight.mT.flip(0)                          # (d_in, d_out), reversed
    original = values.clone()
    power = factor.diagonal().square()
    keep = torch.ones(d_in, d_out, dtype=torch.bool, device=weight.device)
    settled = torch.empty(d_out, dtype=weight.dtype, device=weight.device)

    def choose(low: int, high: int, wanted: Tensor) -> None:
        # the values that these columns would take if all of them were still free
        local = (factor[low:high, low:high] / factor.diagonal()[low:high, None]).triu(1)
        free = torch.linalg.solve_triangular(local, torch.addmm(wanted, local, values[low:high]), upper=True,
                                             unitriangular=True)
        saliency = (free.square() * power[low:high, None]).mT.flip(1)     # (d_out, columns), stored order
        chosen = keep_all_but(saliency, prune, group) if prune else keep_fraction(saliency, prune_fraction)
        keep[low:high] = chosen.mT.flip(0)

    def settle(r: int, wanted: Tensor) -> Tensor:
        return torch.mul(wanted, keep[r], out=settled)

    _sweep_columns(values, factor, settle, choose, unit=group if prune else BLOCK)
    new = original.sub_(values).mul_(keep)              # the product only clears rounding noise where weights are pruned
    return new.flip(0).mT.contiguous(), keep.flip(0).mT.contiguous()
