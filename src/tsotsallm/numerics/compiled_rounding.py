"""Rounding onto ggml's grids as in `rounding`, with compiled inner loops: the order of the steps, and the large products.

The steps are those of `rounding._solved`. Products are gathered over SPAN columns: the pull of the residual is computed once
for all parts of a span, and every change inside the span corrects it by the span's own metric.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tsotsallm.machine import threads_for
from tsotsallm.numerics import compiled
from tsotsallm.numerics.compiled import Form, Metric, Place, Proposal, Refit, Scales, Seen, Uneven, Weights
from tsotsallm.numerics.ggml import Blocks, GgmlGrid
from tsotsallm.numerics.rounding import Coupling, blocks_of, conditional, product, upper_factor

Floats = npt.NDArray[np.float32]

SPAN = 256
"""Columns whose changes reach all others in one product; a multiple of every part and block."""
MOVED = 2048
"""Columns that such a product reaches at a time."""


class Solver:
    """Rounds rows of a weight in the metric of one factor.

    factor (d_in, d_in), order (d_in,) and grid as for `round_to_blocks`; every part is visited again `passes` times.
    """

    def __init__(self, factor: Tensor, order: Tensor, grid: GgmlGrid, passes: int) -> None:
        self.factor, self.grid, self.passes, layout = factor, grid, passes, grid.layout
        self.backwards = order.flip(0)
        self.several = layout.scales is not None
        bounds = layout.scales or (0, 0)
        self.form = (Form if layout.levels is None else Uneven)(
            layout.part, layout.minimum, self.several,
            *(np.float32(number) for number in (grid.lowest, grid.highest, grid.outermost[1], *bounds)))
        self.spans = [(max(0, high - SPAN), high) for high in range(len(factor), 0, -SPAN)]
        self.upper = self._diagonal_blocks(factor).triu()
        self.passing, self.totals = _passing(self.upper), _totals(self.upper)
        self.metrics: dict[int, Tensor] = {}
        if passes:
            own = torch.empty_like(self.upper)
            for low, high in self.spans:
                stripe = self.stripe_of(low, high)
                self.metrics[low] = product(stripe.mT, stripe)
                own[low // layout.part:high // layout.part] = self._diagonal_blocks(self.metrics[low])
            self.own_metric = own
            self.own_upper = torch.stack([upper_factor(metric) for metric in own])
            self.own_passing, self.own_totals = _passing(self.own_upper), _totals(self.own_upper)

    def __call__(self, target: Tensor, keep: Tensor | None, coupling: Coupling | None, visit: Tensor) -> Blocks:
        """Blocks of target (rows, d_in) near to it; keep (rows, d_in) bool and coupling as in `rounding`.

        Rows are visited, and returned, in the order `visit` (rows,).
        """
        with threads_for(0), torch.inference_mode():
            rows = _Rows(self, target, keep, coupling, visit)
            rows.visit()
            rows.visit_again()
            return rows.blocks()

    def stripe_of(self, low: int, high: int) -> Tensor:
        """The columns of the factor that belong to a span, down to its last row, (high, high − low)."""
        return self.factor[:high, low:high].triu(-low)

    def _diagonal_blocks(self, matrix: Tensor) -> Tensor:
        """The square blocks of a part's width on the diagonal of a matrix, (parts, columns, columns)."""
        part = self.grid.layout.part
        return torch.stack([matrix[low:low + part, low:low + part] for low in range(0, len(matrix), part)])


class _Rows:
    """Rows while they are rounded; arrays are (columns or parts, rows), in reversed visiting order."""

    def __init__(self, solver: Solver, target: Tensor, keep: Tensor | None, coupling: Coupling | None,
                 visit: Tensor) -> None:
        self.solver, self.coupling, layout = solver, coupling, solver.grid.layout
        places = solver.backwards[:, None], visit
        self.target = target.mT[places]                     # the first visit leaves target − values in its place
        self.keep = None if keep is None else keep.mT[places].to(self.target.dtype)
        d_in, rows = self.target.shape
        blocks, parts = d_in // layout.block, d_in // layout.part
        self.groups = [slice(0, rows)] if coupling is None else coupling.groups
        self.values, self.codes = torch.zeros_like(self.target), torch.zeros_like(self.target)
        self.residual = torch.empty_like(self.target)       # R · (target − values), which the first visit leaves
        self.step, self.low = self.target.new_zeros(blocks, rows), self.target.new_zeros(blocks, rows)
        self.scale, self.lows = self.target.new_ones(parts, rows), self.target.new_zeros(parts, rows)
        # the same memory as compiled functions take it
        mask = np.empty((1, 1), dtype=np.float32) if self.keep is None else self.keep.numpy()
        self.weights = Weights(self.values.numpy(), self.codes.numpy(), mask, self.keep is not None)
        self.scales = Scales(self.step.numpy(), self.low.numpy(), self.scale.numpy(), self.lows.numpy())

    def visit(self) -> None:
        """Visit every part for the first time; each leaves its errors where its target was."""
        solver, layout, part = self.solver, self.solver.grid.layout, self.solver.grid.layout.part
        target = errors = self.target
        uppers, passing = solver.upper.numpy(), solver.passing.numpy()
        for low, high in solver.spans:
            local = solver.factor[low:high, low:high].triu()
            owed = product(solver.factor[low:high, high:], errors[high:])
            if solver.several:
                wanted = target[low:high] + torch.linalg.solve_triangular(local, owed, upper=True)
                compiled.choose(solver.form, wanted.shape[1], layout.block, wanted.contiguous().numpy(), local.numpy(),
                                solver.totals, self.scales, low // layout.block)
            for stop in range(high - low, 0, -part):
                within, place = slice(stop - part, stop), (low + stop) // part - 1
                here = torch.addmm(owed[within], local[within, stop:], errors[low + stop:high])
                left = self.residual[low + within.start:low + stop]
                for number, rows in enumerate(self.groups):
                    more = here if self.coupling is None or not number else \
                        left[:, :rows.start] @ self.coupling.passed[number]
                    compiled.visit(solver.form, rows.start, rows.stop, self._place(low, within.start),
                                   Seen(target.numpy(), here.numpy(), more.numpy(), errors.numpy(), left.numpy()),
                                   Metric(uppers[place], passing[place], solver.totals, uppers[place]), self.weights,
                                   self.scales)

    def _place(self, low: int, within: int) -> Place:
        """Where the part is that begins at a column of the span from `low` on."""
        layout, column = self.solver.grid.layout, low + within
        return Place(column, within, column // layout.block, column // layout.part)

    def visit_again(self) -> None:
        """Replace codes and scales of every part, and the 16-bit numbers of every block, where that lowers the error."""
        solver = self.solver
        del self.target
        for _ in range(solver.passes):
            for low, high in solver.spans:
                stripe = solver.stripe_of(low, high)
                pulls = product(stripe.mT, self.residual[:high])
                before = self.values[low:high].clone()
                self._visit_span(low, high, pulls)
                if solver.several:
                    self._refit(low, high, pulls)
                change = self.values[low:high] - before
                for first in range(0, high, MOVED):         # a few rows of a large product at a time, to spare memory
                    self.residual[first:min(first + MOVED, high)].sub_(product(stripe[first:first + MOVED], change))

    def _visit_span(self, low: int, high: int, pulls: Tensor) -> None:
        """Visit the parts of a span again; pulls (span, rows): Rᵀ · residual, kept up to date."""
        solver, part = self.solver, self.solver.grid.layout.part
        metric, pulls_now = solver.metrics[low], pulls.numpy()
        uppers, passing, own = solver.own_upper.numpy(), solver.own_passing.numpy(), solver.own_metric.numpy()
        change = self.values.new_empty(part, self.values.shape[1])
        widest = max(rows.stop - rows.start for rows in self.groups)
        codes, scales, rises = (self.values.new_empty(height, widest) for height in (part, 4, part))
        proposal = Proposal(codes.numpy(), scales.numpy(), change.numpy(), rises.numpy())
        for stop in range(high - low, 0, -part):
            within, place = slice(stop - part, stop), self._place(low, stop - part)
            here = Metric(uppers[place.part], passing[place.part], solver.own_totals, own[place.part])
            for number, rows in enumerate(self.groups):
                pull = pulls[within] if self.coupling is None else pulls[within] @ self.coupling.mixed[number]
                compiled.propose(solver.form, rows.start, rows.stop, place, pull.numpy(), here, self.weights, self.scales,
                                 proposal)
                if self.coupling is not None and self._raises(rises, change, rows):
                    change[:, rows] = 0
                    continue
                compiled.settle(solver.form, rows.start, rows.stop, place, here, self.weights, self.scales, proposal,
                                pulls_now)
            pulls[:within.start].addmm_(metric[:within.start, within], change, alpha=-1)
            if solver.several:
                pulls[stop:].addmm_(metric[stop:, within], change, alpha=-1)

    def _raises(self, rises: Tensor, change: Tensor, rows: slice) -> bool:
        """Whether the joint change of coupled rows would raise their total error."""
        assert self.coupling is not None
        joint = rises[:, :rows.stop - rows.start] @ self.coupling.metric[rows, rows]
        return float(joint.mul_(change[:, rows]).sum()) > 0

    def _refit(self, low: int, high: int, pulls: Tensor) -> None:
        """Set each 16-bit number of a block where the error is smallest with everything else fixed."""
        layout = self.solver.grid.layout
        parts, metric = slice(low // layout.part, high // layout.part), self.solver.metrics[low]
        for number, rows in enumerate(self.groups):
            mixed = pulls[:, rows].clone() if self.coupling is None else product(pulls, self.coupling.mixed[number])
            for numbers, factors in [(self.step, self.scale)] + [(self.low, -self.lows)] * layout.minimum:
                direction = factors[parts, rows].repeat_interleave(layout.part, dim=0)
                if numbers is self.step:
                    direction *= self.codes[low:high, rows]
                if self.keep is not None:
                    direction *= self.keep[low:high, rows]
                moved = product(metric, direction)
                compiled.shift(rows.start, rows.stop, numbers.numpy(), self._place(low, 0), high - low,
                               Refit(direction.numpy(), moved.numpy(), mixed.numpy()), self.weights.values)
                pulls[:, rows].sub_(moved)
                mixed.sub_(moved)

    def blocks(self) -> Blocks:
        """The rounded rows in stored column order; only codes and scales are left of what was worked with."""
        del self.weights, self.values, self.residual, self.keep
        return blocks_of(self.codes, self.step, self.low, self.scale, self.lows, self.solver.backwards, self.solver.grid)


def _passing(upper: Tensor) -> Tensor:
    """What each column (row) of a part takes over of an error in another (column), (parts, columns, columns)."""
    return upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(2)


def _totals(upper: Tensor) -> Floats:
    """The sum of the squares of each part's diagonal, (parts,); one by one, so that they are summed as in `rounding`."""
    return np.array([float(conditional(inner).sum()) for inner in upper], dtype=np.float32)
