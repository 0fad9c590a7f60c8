"""Rounding onto ggml's grids: scales and codes are chosen together, and later columns compensate every error.

The output error of a row is ‖e·V‖², with e = target − values and the Gram H = V·Vᵀ, V upper triangular in visiting order
(theorem 6 of arXiv:2307.13304 in reverse). To the error of the columns visited so far, a block adds

    ‖e_b·V_bb + e_before·V_before,b‖²        while later columns can compensate everything else,

so it is rounded towards  target_b + e_before·V_before,b·V_bb⁻¹  in the metric V_bb·V_bbᵀ. Within a part several
scales are tried, each with its codes compensated column by column (GPTQ, arXiv:2210.17323, within the part), and the
best is kept. Afterwards each part is visited again with all others fixed: its codes and scales are replaced where
that lowers the total error, which therefore never rises (block coordinate descent).

Arrays are in reversed visiting order with columns as rows, as in `gptq`: R, with H = Rᵀ·R, is then the Cholesky factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tsotsallm.errors import NumericsError
from tsotsallm.machine import COMPILED, compiler, side_by_side, threads_for
from tsotsallm.numerics.ggml import Blocks, GgmlGrid, Layout, half
from tsotsallm.timing import counted

OUTPUTS = 1024
"""Rows that are rounded together, coupled by the metric of the outputs."""
AT_ONCE = 2
"""How many times OUTPUTS rows are rounded at once by compiled loops."""
BYTES_A_WEIGHT = 20
"""What that takes for each of their weights."""
GROUPS = 8
SPANS = (0.7, 0.76, 0.82, 0.88, 0.94, 1.0, 1.06)
UNEVEN_SPANS = (0.9, 0.95, 1.0, 1.05, 1.1, 1.16, 1.22)
TERNARY_SPANS = (0.3, 0.37, 0.44, 0.51, 0.6, 0.75, 1.0)
"""Shares of a part's range that its levels may cover, those of uneven levels, the outermost of which lie far apart, and
those of three levels for 256 columns."""
WIDEST_COMPILED = 32
"""Columns of the widest part that compiled loops round; torch rounds the parts of tq2_0."""
TRIED = 4
LOCAL_ROUNDS = 2


def block_order(diagonal: Tensor, grid: GgmlGrid) -> Tensor:
    """Visiting order for a grid, (d_in,) int64: blocks, their parts and the columns of parts by falling Gram diagonal."""
    layout = grid.layout
    blocks = diagonal.view(-1, layout.block // layout.part, layout.part)
    columns = torch.arange(len(diagonal), device=diagonal.device).view(blocks.shape)
    within = blocks.sort(dim=2, descending=True, stable=True).indices
    columns = columns.gather(2, within)
    parts = blocks.sum(2).sort(dim=1, descending=True, stable=True).indices
    columns = columns.gather(1, parts.unsqueeze(2).expand_as(columns))
    return columns[blocks.sum((1, 2)).sort(descending=True, stable=True).indices].flatten()


@counted("rounding")
def round_to_blocks(target: Tensor, factor: Tensor, order: Tensor, grid: GgmlGrid, *, passes: int = 1,
                    keep: Tensor | None = None, outputs: Tensor | None = None) -> Blocks:
    """Round `target` to blocks of a grid that are near to it in the metric of the Gram.

    target   (d_out, d_in): the weight, or the target that its outputs call for
    factor   (d_in, d_in): factor of the damped Gram in reversed `order`, from `reversed_factor`
    order    (d_in,), from `block_order`
    passes   how many times every part is visited again
    keep     (d_out, d_in) bool: where False the value is exactly zero (grids with a level at zero)
    outputs  (d_out, at most OUTPUTS): the damped metric O of the outputs, its diagonal blocks stacked

    What lies on a GPU is rounded by the compiled loops of the CPU where they are installed, since the many short steps take
    much longer there; the answer lies where the target does.
    """
    if target.device.type != "cpu" and compiler() is not None:
        here = [None if one is None else one.cpu() for one in (keep, outputs)]
        return round_to_blocks(target.cpu(), factor.cpu(), order.cpu(), grid, passes=passes, keep=here[0],
                               outputs=here[1]).to(target.device)
    solve = _solver(factor, order, grid, passes)

    def rounded(first: int) -> Blocks:
        rows = slice(first, first + OUTPUTS)
        here, kept = target[rows], None if keep is None else keep[rows]
        if outputs is None:
            return solve(here, kept, None, torch.arange(len(here), device=here.device))
        metric = outputs[rows, :len(here)]
        visit = metric.diagonal().sort(descending=True, stable=True).indices
        with threads_for(len(metric) ** 3):
            coupling = Coupling.of(metric[visit][:, visit])
        return solve(here, kept, coupling, visit).rows_at(visit.argsort())

    firsts = range(0, len(target), OUTPUTS)
    return _joined(side_by_side(rounded, firsts, AT_ONCE) if _compiles(factor, grid) else list(map(rounded, firsts)))


def _compiles(factor: Tensor, grid: GgmlGrid) -> bool:
    return (compiler() is not None and grid.layout.part <= WIDEST_COMPILED and factor.device.type == "cpu"
            and factor.dtype == torch.float32)


def _solver(factor: Tensor, order: Tensor, grid: GgmlGrid, passes: int) -> Callable[..., Blocks]:
    """What rounds at most OUTPUTS rows, given (target, keep, coupling, their order): compiled loops where a compiler is
    installed, else torch."""
    if _compiles(factor, grid):
        try:
            from tsotsallm.numerics.compiled_rounding import Solver
        except ImportError as error:
            raise NumericsError(f"numba {compiler()} is installed, but cannot be loaded ({error}); install the versions in "
                                f"constraints.txt, or set {COMPILED}=0 to round without it") from None
        return Solver(factor, order, grid, passes)

    def solve(target: Tensor, keep: Tensor | None, coupling: Coupling | None, visit: Tensor) -> Blocks:
        groups = [_Rows(target[visit[rows]], factor, order, grid, None if keep is None else keep[visit[rows]])
                  for rows in ([slice(None)] if coupling is None else coupling.groups)]
        return _joined(_solved(groups, coupling, passes))

    return solve


def _joined(pieces: Sequence[Blocks]) -> Blocks:
    def joined(name: str) -> Tensor | None:
        parts = [getattr(piece, name) for piece in pieces]
        return None if parts[0] is None else torch.cat(parts)

    codes, step = joined("codes"), joined("step")
    assert codes is not None
    assert step is not None
    return Blocks(codes, step, joined("low"), joined("scales"), joined("lows"), pieces[0].grid)


@counted("rounding")
def round_plainly(weight: Tensor, grid: GgmlGrid, keep: Tensor | None = None) -> Blocks:
    """Round a weight (d_out, d_in) to blocks of a grid, every column independently and with equal importance."""
    block = grid.layout.block                   # no block knows of another: each is a row
    found = round_to_blocks(weight.reshape(-1, block), torch.eye(block, device=weight.device),
                            torch.arange(block, device=weight.device), grid, passes=0,
                            keep=None if keep is None else keep.reshape(-1, block))
    codes, step, low, scales, lows = (None if one is None else one.reshape(len(weight), -1) for one in
                                      (found.codes, found.step, found.low, found.scales, found.lows))
    assert codes is not None
    assert step is not None
    return Blocks(codes, step, low, scales, lows, grid)


@dataclass
class _Scales:
    """Candidates for the scales of a part: step and offset of its codes, and the stored numbers; each (candidates, rows)."""

    step: Tensor
    offset: Tensor
    scale: Tensor
    low: Tensor

    def take(self, which: Tensor) -> _Scales:
        """Select candidates for every row by their indices (candidates, rows)."""
        return _Scales(*(one.gather(0, which) for one in (self.step, self.offset, self.scale, self.low)))

    def with_more(self, more: _Scales) -> _Scales:
        """These candidates followed by others."""
        return _Scales(*(torch.cat(pair) for pair in ((self.step, more.step), (self.offset, more.offset),
                                                      (self.scale, more.scale), (self.low, more.low))))


@dataclass(frozen=True)
class Coupling:
    """How the errors of rows add up or cancel: the metric O of the outputs, and its factors.

    With O = U·Uᵀ, U upper triangular in visiting order, the rows of group g can compensate the errors that earlier groups
    left, and are rounded towards  target_g + (U_before,g · U_gg⁻¹)ᵀ · left_before  (theorem 6 again, now by rows;
    arXiv:2505.22988, section 4).

    groups   slices of rows
    passed   for each group (rows before, rows of the group): U_before,g · U_gg⁻¹
    mixed    for each group (rows, rows of the group): O[:, g] · O[g, g]⁻¹
    """

    groups: list[slice]
    passed: list[Tensor]
    mixed: list[Tensor]
    metric: Tensor

    @classmethod
    def of(cls, metric: Tensor) -> Coupling:
        """The coupling that a metric (rows, rows) implies, for at most GROUPS groups."""
        rows = len(metric)
        size = max(1, -(-rows // GROUPS))
        groups = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
        factor = torch.linalg.cholesky(metric.flip(0, 1).double()).flip(0, 1).to(metric)
        passed = [torch.linalg.solve_triangular(factor[group, group], factor[:group.start, group], upper=True, left=False)
                  for group in groups]
        mixed = [torch.linalg.solve(metric[group, group], metric[group]).mT for group in groups]
        return cls(groups, passed, mixed, metric)


@threads_for(0)                 # products aside, vectors of a few thousand numbers at most: more threads would only wait
@torch.inference_mode()         # thousands of small operations are a fifth faster without autograd's bookkeeping
def _solved(groups: list[_Rows], coupling: Coupling | None, passes: int) -> list[Blocks]:
    """Round several groups of rows in turn, part by part."""
    first = groups[0]
    layout, factor = first.layout, first.factor
    for high in range(factor.shape[0], 0, -layout.block):
        low = high - layout.block
        local = factor[low:high, low:high].triu()
        for group in groups:
            group.enter(low, high, local)
        for part_high in range(layout.block, 0, -layout.part):
            left: list[Tensor] = []
            for place, group in enumerate(groups):
                more = torch.cat(left, 1) @ coupling.passed[place] if coupling is not None and place else None
                left.append(group.visit(low, slice(part_high - layout.part, part_high), local, more))
    if passes:
        for group in groups:
            group.residual = product(factor.triu(), group.target - group.values)
    for _ in range(passes):
        for high in range(factor.shape[0], 0, -layout.block):
            low = high - layout.block
            for part_high in range(high, low, -layout.part):
                columns = slice(part_high - layout.part, part_high)
                stripe = factor[:part_high, columns].triu(-columns.start)
                metric = stripe.mT @ stripe
                inner = upper_factor(metric)
                pulls = [product(stripe.mT, group.residual[:part_high]) for group in groups]
                for place, group in enumerate(groups):
                    if coupling is None:
                        group.visit_again(columns, stripe, metric, inner, pulls[place], None)
                        continue
                    rows = coupling.groups[place]
                    change = group.visit_again(columns, stripe, metric, inner, torch.cat(pulls, 1) @ coupling.mixed[place],
                                               coupling.metric[rows, rows])
                    pulls[place] = pulls[place] - metric @ change
            if layout.scales is not None:
                for place, group in enumerate(groups):
                    mixed = None if coupling is None else product(
                        torch.cat([other.residual[:high] for other in groups], 1), coupling.mixed[place])
                    group.refit(low, high, mixed)
    return [group.blocks() for group in groups]


class _Rows:
    """Some rows of a weight while they are rounded; all arrays are (columns or parts, rows), in reversed visiting order."""

    def __init__(self, target: Tensor, factor: Tensor, order: Tensor, grid: GgmlGrid, keep: Tensor | None) -> None:
        self.grid, self.layout, self.factor = grid, grid.layout, factor
        self.backwards = order.flip(0)
        self.target = target.mT[self.backwards].contiguous()
        self.keep = None if keep is None else keep.mT[self.backwards].contiguous()
        d_in, rows = self.target.shape
        blocks, parts = d_in // self.layout.block, d_in // self.layout.part
        self.values = torch.zeros_like(self.target)
        self.codes = torch.zeros_like(self.target)
        self.errors = torch.empty_like(self.target)
        self.residual = torch.empty(0)          # R·(target − values), updated while parts are visited again
        self.owed = torch.empty(0)
        self.step, self.low = self.target.new_zeros(blocks, rows), self.target.new_zeros(blocks, rows)
        self.scale, self.lows = self.target.new_ones(parts, rows), self.target.new_zeros(parts, rows)

    # -- the first visit ----------------------------------------------------------------------------------------------

    def enter(self, low: int, high: int, local: Tensor) -> None:
        """Begin a block: compute the compensation owed by earlier blocks, and choose its 16-bit numbers."""
        self.owed = product(self.factor[low:high, high:], self.errors[high:])      # (block, rows): e_before · V_before,b
        if self.layout.scales is not None:
            wanted = self.target[low:high] + torch.linalg.solve_triangular(local, self.owed, upper=True)
            self._choose_block_scales(low // self.layout.block, wanted, local)

    def visit(self, low: int, within: slice, local: Tensor, more: Tensor | None) -> Tensor:
        """Round a part of a block and return the error it leaves; `more` is the error that other rows leave to it."""
        inner = local[within, within]
        high = low + self.layout.block
        owed = local[within, within.stop:] @ self.errors[low + within.stop:high] + self.owed[within]
        columns = slice(low + within.start, low + within.stop)
        here = self.target[columns]
        aim = here + torch.linalg.solve_triangular(inner, owed if more is None else owed + more, upper=True)
        tried = self._candidates(aim, conditional(inner), low // self.layout.block)
        self._settle(columns, columns.start // self.layout.part, *self._best(aim, inner, tried, columns))
        self.errors[columns] = here - self.values[columns]
        return inner @ self.errors[columns] + owed

    def _choose_block_scales(self, block: int, wanted: Tensor, local: Tensor) -> None:
        """Choose the 16-bit numbers of a block from the best scales of its parts."""
        layout = self.layout
        assert layout.scales is not None
        likes, lows = [], []
        for first in range(0, layout.block, layout.part):
            inner = local[first:first + layout.part, first:first + layout.part]
            aim = wanted[first:first + layout.part]
            step, offset = _ranges(aim, conditional(inner), self.grid)
            best = _cheap_loss(aim, conditional(inner), step, offset, self.grid).argmin(0, keepdim=True)
            likes.append(step.gather(0, best)[0])
            lows.append(-offset.gather(0, best)[0])
        liked = torch.stack(likes)
        if layout.minimum:
            self.step[block] = half(liked.amax(0) / layout.scales[1])
            self.low[block] = half(torch.stack(lows).amax(0).clamp(min=0) / layout.scales[1])
        else:
            most = liked.gather(0, liked.abs().argmax(0, keepdim=True))[0]
            self.step[block] = half(most / layout.scales[0])

    def _candidates(self, aim: Tensor, importance: Tensor, block: int) -> _Scales:
        """The storable scales for a part (columns, rows) that a cheap estimate ranks best."""
        step, offset = _ranges(aim, importance, self.grid)
        tried = self._stored(step, offset, block)
        loss = _cheap_loss(aim, importance, tried.step, tried.offset, self.grid)
        return tried.take(_lowest(loss))

    def _stored(self, step: Tensor, offset: Tensor, block: int) -> _Scales:
        """Steps and offsets rounded to what a block can store."""
        bounds = self.layout.scales
        if bounds is None:
            step, offset = half(step), half(offset)
            return _Scales(step, offset, torch.ones_like(step), torch.zeros_like(step))
        unit, low = self.step[block], self.low[block]
        scale = (step * _inverse(unit)).round_().clamp_(*bounds)
        lows = (-offset * _inverse(low)).round_().clamp_(*bounds) if self.layout.minimum else torch.zeros_like(scale)
        return _Scales(unit * scale, -(low * lows), scale, lows)

    def _best(self, aim: Tensor, inner: Tensor, tried: _Scales, columns: slice) -> tuple[Tensor, Tensor, _Scales]:
        """(codes, values, scales) of the candidate whose compensated codes leave the smallest error."""
        keep = None if self.keep is None else self.keep[columns]
        codes, loss = _compensated(aim, inner, tried, self.grid, keep)
        best = loss.argmin(0, keepdim=True)
        scales = tried.take(best)
        chosen = codes.gather(1, best.expand(len(codes), 1, -1))[:, 0]
        return chosen, _values(chosen, scales, keep), scales

    def _settle(self, columns: slice, part: int, codes: Tensor, values: Tensor, scales: _Scales) -> None:
        self.codes[columns], self.values[columns] = codes, values
        self.scale[part], self.lows[part] = scales.scale[0], scales.low[0]
        if self.layout.scales is None:
            self.step[part], self.low[part] = scales.step[0], scales.offset[0]

    # -- later visits -------------------------------------------------------------------------------------------------

    def visit_again(self, columns: slice, stripe: Tensor, metric: Tensor, inner: Tensor, pull: Tensor,
                    coupling: Tensor | None) -> Tensor:
        """Replace codes and scales of a part where that lowers the error with all others fixed.

        `pull` is Rᵀ·residual at the part's columns, with other rows mixed in; `coupling` is the metric of these rows'
        outputs, and their joint change is kept only where it lowers their total error. Returns the change, (columns, rows).
        """
        part, block = columns.start // self.layout.part, columns.start // self.layout.block
        before = self.values[columns]
        aim = before + torch.cholesky_solve(pull, inner.mT.contiguous())
        tried = self._neighbours(part, block).with_more(self._candidates(aim, conditional(inner), block))
        codes, values, scales = self._best(aim, inner, tried, columns)
        codes, values = self._descended(aim, metric, codes, values, scales, columns)
        better = _loss(aim - before, metric) - _loss(aim - values, metric) > 0
        change = torch.where(better, values - before, torch.zeros_like(values))
        if coupling is not None:
            rises = ((metric @ change - 2 * pull) @ coupling) * change
            if float(rises.sum()) > 0:
                return torch.zeros_like(change)
        kept = _Scales(*(current[None] for current in self._now(part, block)))
        self._settle(columns, part, torch.where(better, codes, self.codes[columns]), before + change,
                     _Scales(*(torch.where(better, new, old) for new, old in zip(
                         (scales.step, scales.offset, scales.scale, scales.low),
                         (kept.step, kept.offset, kept.scale, kept.low), strict=True))))
        self.residual[:columns.stop].sub_(product(stripe, change))
        return change

    def _now(self, part: int, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The current step, offset and stored numbers of a part, each (rows,)."""
        if self.layout.scales is None:
            return self.step[part], self.low[part], self.scale[part], self.lows[part]
        return (self.step[block] * self.scale[part], -(self.low[block] * self.lows[part]), self.scale[part],
                self.lows[part])

    def _neighbours(self, part: int, block: int) -> _Scales:
        """The current scales of a part, and those with neighbouring integers."""
        step, offset, scale, lows = self._now(part, block)
        bounds = self.layout.scales
        if bounds is None:
            return _Scales(step[None], offset[None], scale[None], lows[None])
        moves = [(0, 0), (1, 0), (-1, 0)] + ([(0, 1), (0, -1)] if self.layout.minimum else [])
        scales = torch.stack([(scale + move).clamp(*bounds) for move, _ in moves])
        more = torch.stack([(lows + move).clamp(*bounds) for _, move in moves])
        return _Scales(self.step[block] * scales, -(self.low[block] * more), scales, more)

    def _descended(self, aim: Tensor, metric: Tensor, codes: Tensor, values: Tensor, scales: _Scales,
                   columns: slice) -> tuple[Tensor, Tensor]:
        """Codes and values of a part after setting each code to its best given the others, LOCAL_ROUNDS times."""
        keep = None if self.keep is None else self.keep[columns].unbind()
        codes, values = codes.clone(), values.clone()
        slope = metric @ (aim - values)
        slopes, steps, places = slope.unbind(), metric.unbind(1), list(zip(codes.unbind(), values.unbind(), strict=True))
        power = metric.diagonal().reciprocal().tolist()
        scale, offset, inverse = scales.step[0], scales.offset[0], _inverse(scales.step[0])
        nearest = self.grid.nearest
        for _ in range(LOCAL_ROUNDS):
            for column, (code, value) in enumerate(places):
                torch.add(value, slopes[column], alpha=power[column], out=code)
                nearest(code.sub_(offset).mul_(inverse))
                new = torch.addcmul(offset, code, scale)
                if keep is not None:
                    code.mul_(keep[column])
                    new.mul_(keep[column])
                slope.addr_(steps[column], value.sub_(new))
                value.copy_(new)
        return codes, values

    def refit(self, low: int, high: int, mixed: Tensor | None) -> None:
        """Set each 16-bit number of a block where the error is smallest with everything else fixed.

        `mixed` is the residual with other rows mixed in, or None where rows are independent.
        """
        layout, residual, block = self.layout, self.residual, low // self.layout.block
        parts = slice(low // layout.part, high // layout.part)
        stripe = self.factor[:high, low:high].triu(-low)

        def per_column(values: Tensor) -> Tensor:
            return values[parts].repeat_interleave(layout.part, dim=0)

        for name in ("step", "low") if layout.minimum else ("step",):
            numbers = getattr(self, name)
            direction = self.codes[low:high] * per_column(self.scale) if name == "step" else -per_column(self.lows)
            if self.keep is not None:
                direction = direction * self.keep[low:high]
            moved = product(stripe, direction)
            power, pull = moved.square().sum(0), (moved * (residual[:high] if mixed is None else mixed)).sum(0)
            new = half(numbers[block] + torch.where(power > 0, pull / power.clamp(min=1e-30), torch.zeros_like(pull)))
            shift = new - numbers[block]
            shift = torch.where(shift * (shift * power - 2 * pull) < 0, shift, torch.zeros_like(shift))
            numbers[block] += shift
            self.values[low:high] += shift * direction
            residual[:high] -= shift * moved
            if mixed is not None:
                mixed -= shift * moved

    def blocks(self) -> Blocks:
        """The rounded rows in stored column order."""
        return blocks_of(self.codes, self.step, self.low, self.scale, self.lows, self.backwards, self.grid)


def blocks_of(codes: Tensor, step: Tensor, low: Tensor, scale: Tensor, lows: Tensor, backwards: Tensor,
              grid: GgmlGrid) -> Blocks:
    """Rounded rows in stored column order, from arrays (columns, blocks or parts, rows) in the order `backwards` (d_in,)."""
    layout, d_in = grid.layout, len(codes)
    in_order = torch.empty_like(codes, dtype=torch.int8)
    in_order[backwards] = codes.to(torch.int8)
    block_of, part_of = backwards[::layout.block] // layout.block, backwards[::layout.part] // layout.part

    def stored(values: Tensor, places: Tensor) -> Tensor:
        in_place = torch.empty_like(values)
        in_place[places] = values
        return in_place.mT.contiguous()

    several = layout.scales is not None
    assert d_in % layout.block == 0
    return Blocks(in_order.mT.contiguous(), stored(step, block_of),
                  stored(low, block_of) if layout.minimum else None,
                  stored(scale, part_of).to(torch.int16) if several else None,
                  stored(lows, part_of).to(torch.int16) if several and layout.minimum else None, grid)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, on as many threads as its size deserves."""
    with threads_for(2 * left.numel() * right.shape[1]):
        return left @ right


def _lowest(loss: Tensor) -> Tensor:
    """The TRIED candidates of lowest loss (candidates, rows), in any order where losses are equal."""
    return loss.topk(min(TRIED, len(loss)), dim=0, largest=False).indices


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values != 0, 1 / values, torch.zeros_like(values))


def conditional(inner: Tensor) -> Tensor:
    """The cost of an error in each column after later columns have compensated it, (columns,)."""
    return inner.diagonal().square()


def upper_factor(metric: Tensor) -> Tensor:
    """Upper triangular R with Rᵀ·R = metric, (columns, columns); the diagonal is raised where rounding made it singular."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(metric, upper=True)
    if int(info):
        factor = torch.linalg.cholesky(metric + 1e-6 * metric.diagonal().mean() * torch.eye(len(metric)).to(metric),
                                       upper=True)
    return factor


def _loss(errors: Tensor, metric: Tensor) -> Tensor:
    loss: Tensor = ((metric @ errors) * errors).sum(0)
    return loss


def _values(codes: Tensor, scales: _Scales, keep: Tensor | None) -> Tensor:
    values = codes * scales.step[0] + scales.offset[0]
    return values if keep is None else values * keep


def _ranges(aim: Tensor, importance: Tensor, grid: GgmlGrid) -> tuple[Tensor, Tensor]:
    """Steps and offsets that cover more or less of the range of a part (columns, rows), and their least-squares refits.

    Returns both as (candidates, rows); the refit weights columns by `importance` (columns,).
    """
    layout: Layout = grid.layout
    weights = importance[None, :, None]
    if not layout.minimum:
        most = aim.gather(0, aim.abs().argmax(0, keepdim=True))
        shares = UNEVEN_SPANS if layout.levels is not None else TERNARY_SPANS if grid.highest == 1 else SPANS
        spans = aim.new_tensor(shares)[:, None]
        step = torch.cat([most * spans / code for code in grid.outermost])
        codes = grid.nearest(aim[None] * _inverse(step)[:, None])
        weighted = codes * weights
        power, pull = (weighted * codes).sum(1), (weighted * aim[None]).sum(1)
        refit = torch.where(power > 0, pull / power.clamp(min=1e-30), step)
        return torch.cat([step, refit]), aim.new_zeros(2 * len(step), aim.shape[1])
    lowest, highest = aim.amin(0, keepdim=True), aim.amax(0, keepdim=True)
    if layout.scales is not None:
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    middle = (lowest + highest) / 2 if layout.scales is None else torch.zeros_like(lowest)
    wide = [(left, right) for left in SPANS[1:] for right in SPANS[1:] if abs(left - right) < 0.13]
    left, right = (aim.new_tensor(side)[:, None] for side in zip(*wide, strict=True))
    offset = middle + (lowest - middle) * left
    step = ((middle + (highest - middle) * right - offset) / grid.highest).clamp(min=1e-12)
    codes = grid.nearest((aim[None] - offset[:, None]) / step[:, None])
    weighted = codes * weights
    total, first, second = importance.sum(), weighted.sum(1), (weighted * codes).sum(1)
    plain, product = (weights * aim[None]).sum(1), (weighted * aim[None]).sum(1)
    spread = (total * second - first * first).clamp(min=1e-30)
    new_step = (total * product - first * plain) / spread
    new_offset = (second * plain - first * product) / spread
    if layout.scales is not None:           # a stored minimum is never above zero
        above = new_offset > 0
        new_step = torch.where(above, product / second.clamp(min=1e-30), new_step)
        new_offset = torch.where(above, torch.zeros_like(new_offset), new_offset)
    usable = new_step > 0
    return (torch.cat([step, torch.where(usable, new_step, step)]),
            torch.cat([offset, torch.where(usable, new_offset, offset)]))


def _cheap_loss(aim: Tensor, importance: Tensor, step: Tensor, offset: Tensor, grid: GgmlGrid) -> Tensor:
    """Weighted squared error of plain rounding for each candidate, (candidates, rows)."""
    errors = grid.nearest((aim[None] - offset[:, None]).mul_(_inverse(step)[:, None]))
    errors.mul_(step[:, None]).add_(offset[:, None]).sub_(aim[None]).square_()
    return (errors * importance[None, :, None]).sum(1)


def _compensated(aim: Tensor, inner: Tensor, tried: _Scales, grid: GgmlGrid, keep: Tensor | None
                 ) -> tuple[Tensor, Tensor]:
    """Round a part column by column from the last, each error compensated (GPTQ), for all candidates at once.

    aim (columns, rows), inner: R of the part's metric; returns codes (columns, candidates, rows), loss (candidates, rows).
    """
    columns = len(aim)
    inverse = _inverse(tried.step)
    codes = aim.new_empty(columns, *tried.step.shape)
    wanted = aim[:, None].expand_as(codes).contiguous()
    flat = wanted.view(columns, -1)
    passing = (inner / inner.diagonal()[:, None]).unbind(1)
    kept = None if keep is None else keep.unbind()
    places = list(zip(aim.unbind(), wanted.unbind(), codes.unbind(), strict=True))
    nearest = grid.nearest
    for column in range(columns - 1, -1, -1):
        target, here, code = places[column]
        torch.sub(here, tried.offset, out=code)
        nearest(code.mul_(inverse))
        value = torch.addcmul(tried.offset, code, tried.step)
        if kept is not None:
            code.mul_(kept[column])
            value.mul_(kept[column])
        here.sub_(value)                # what remains after all earlier errors are compensated
        if column:
            flat[:column].addr_(passing[column][:column], (target - value).view(-1))
    loss = wanted.mul_(inner.diagonal()[:, None, None]).square_().sum(0)
    return codes, loss
