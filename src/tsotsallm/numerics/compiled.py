"""The inner loops of `rounding`, compiled by Numba: LANES rows at a time, one row in each lane of a vector register.

Every function does for a part (16 or 32 columns) what the function of `rounding` with the same words does, in the same
order and in float32. Sums over columns take RUN columns at a time, as torch's do: scales are rounded to 16 bits, where a
sum's last bit may decide. Rows are independent of each other. Arrays are as in `rounding`: columns or parts as rows, in
reversed visiting order, and contiguous. Import this module only where `machine.compiler()` names a version.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit
from numba.extending import overload

from tsotsallm.numerics.ggml import IQ4_LEVELS
from tsotsallm.numerics.rounding import LOCAL_ROUNDS, SPANS, TRIED, UNEVEN_SPANS, WIDEST_COMPILED
from tsotsallm.numerics.vectors import (
    LANES,
    absolute,
    at,
    fused,
    half,
    inverse,
    less,
    load,
    local,
    nearest_of,
    spread,
    store,
    where,
    whole,
)

Floats = npt.NDArray[np.float32]
PART = WIDEST_COMPILED
"""Columns of the widest part."""
RUN = 16
_SPANS, _UNEVEN_SPANS = (tuple(np.float32(span) for span in spans) for spans in (SPANS, UNEVEN_SPANS))
_WIDE = tuple((np.float32(left), np.float32(right)) for left in SPANS[1:] for right in SPANS[1:] if abs(left - right) < 0.13)
_NEAR = 5
_MOST = _NEAR + 2 * max(2 * len(SPANS), 2 * len(UNEVEN_SPANS), len(_WIDE))
_ZERO, _ONE, _HALF, _TINY, _SMALL = (np.float32(value) for value in (0, 1, 0.5, 1e-30, 1e-12))
_INFINITE = np.float32(np.inf)


class Form(NamedTuple):
    """The structure of a grid, as compiled functions take it.

    columns            of a part
    minimum            whether parts have a minimum of their own
    several            whether a block has several parts, whose scales are integers between `least` and `most`
    lowest, highest    codes
    mirrored           where the largest weight lies, with a step of the other sign than that which puts it at `lowest`
    """

    columns: int
    minimum: bool
    several: bool
    lowest: np.float32
    highest: np.float32
    mirrored: np.float32
    least: np.float32
    most: np.float32


class Uneven(Form):
    """The same of a grid with the levels of iq4; a type of its own, so that functions are compiled for it apart."""


class Tile(NamedTuple):
    """Neighbouring rows that are worked on together: the first of them, how many, and the row at which arrays begin that
    hold only some rows."""

    row: int
    count: int
    first: int


class Place(NamedTuple):
    """Where a part stands: its first column, that within the span of columns, its block and its number."""

    low: int
    within: int
    block: int
    part: int


class Metric(NamedTuple):
    """The metric of a part: R of it, and its rows divided by the diagonal, (columns, columns); the sum of the squares of
    each part's diagonal, (parts,); the metric itself, (columns, columns)."""

    upper: Floats
    passing: Floats
    totals: Floats
    whole: Floats


class Weights(NamedTuple):
    """What rows hold, (d_in, rows): values, codes, and, where `kept` says so, 0 or 1 for what is pruned."""

    values: Floats
    codes: Floats
    keep: Floats
    kept: bool


class Scales(NamedTuple):
    """The 16-bit numbers of blocks, (blocks, rows), and the integers of parts, (parts, rows)."""

    step: Floats
    low: Floats
    scale: Floats
    lows: Floats


class Seen(NamedTuple):
    """What a first visit reads and leaves: target and errors (d_in, rows), which may be the same memory; owed (columns,
    rows), what earlier columns leave to the part; more (columns, rows from `first`), what earlier rows do; left (columns,
    rows), upper · errors + owed."""

    target: Floats
    owed: Floats
    more: Floats
    errors: Floats
    left: Floats


class Proposal(NamedTuple):
    """Better codes and rises = metric · change − 2 pull, (columns, rows from `first`), scales (4, rows from `first`), and
    the change of the values, (columns, rows)."""

    codes: Floats
    scales: Floats
    change: Floats
    rises: Floats


class Refit(NamedTuple):
    """What a 16-bit number moves, (columns, rows from `first`): the change of values with it; metric · that, which becomes
    metric · change; Rᵀ · residual with other rows mixed in."""

    direction: Floats
    moved: Floats
    mixed: Floats


_inner = njit(error_model="numpy")


@njit(forceinline=True)
def _lower(left, right):
    return where(less(left, right), left, right)


@njit(forceinline=True)
def _higher(left, right):
    return where(less(right, left), left, right)


@njit(forceinline=True)
def _nearest(value, lowest, highest):
    return _lower(_higher(whole(value), spread(lowest)), spread(highest))


_level = nearest_of(IQ4_LEVELS)


def _code(value, form):
    """The code of a form that is nearest to a value in units of the step; only compiled, from `_code_of`."""
    raise NotImplementedError       # Python never runs it: Numba takes what `overload` gives for the form's type


def _spans(form):
    """The spans that are tried on a grid without a minimum; only compiled, from `_spans_of`."""
    raise NotImplementedError       # as above


@overload(_code)
def _code_of(value, form):
    if form.instance_class is Uneven:
        return lambda value, form: _level(value)
    return lambda value, form: _nearest(value, form.lowest, form.highest)


@overload(_spans)
def _spans_of(form):
    return (lambda form: _UNEVEN_SPANS) if form.instance_class is Uneven else (lambda form: _SPANS)


# -- small products ---------------------------------------------------------------------------------------------------


@_inner
def _sum(values, columns):
    total = spread(_ZERO)
    for run in range(0, columns, RUN):
        some = spread(_ZERO)
        for column in range(run, run + RUN):
            some += values[column]
        total += some
    return total


@_inner
def _solve_upper(upper, values, columns):
    """Replace values y by x with upper · x = y."""
    for column in range(columns - 1, -1, -1):
        rest = values[column]
        for other in range(columns - 1, column, -1):
            rest = fused(-at(upper, column, other), values[other], rest)
        values[column] = rest * (_ONE / at(upper, column, column))


@_inner
def _solve_lower(upper, values, columns):
    """Replace values y by x with upperᵀ · x = y."""
    for column in range(columns):
        rest = values[column]
        for other in range(column):
            rest = fused(-at(upper, other, column), values[other], rest)
        values[column] = rest * (_ONE / at(upper, column, column))


@_inner
def _product(to, matrix, values, columns):
    """to = matrix · values."""
    for column in range(0, columns, 4):
        first, second, third, fourth = spread(_ZERO), spread(_ZERO), spread(_ZERO), spread(_ZERO)
        for other in range(columns):
            value = values[other]
            first = fused(at(matrix, column, other), value, first)
            second = fused(at(matrix, column + 1, other), value, second)
            third = fused(at(matrix, column + 2, other), value, third)
            fourth = fused(at(matrix, column + 3, other), value, fourth)
        to[column], to[column + 1], to[column + 2], to[column + 3] = first, second, third, fourth


# -- candidates for scales --------------------------------------------------------------------------------------------


@_inner
def _refitted(aim, upper, start, form, step):
    """The least-squares step for the codes that a step of a symmetric grid gives."""
    per_step, power, pull = inverse(step), spread(_ZERO), spread(_ZERO)
    for run in range(0, form.columns, RUN):
        some_power, some_pull = spread(_ZERO), spread(_ZERO)
        for column in range(run, run + RUN):
            importance = at(upper, start + column, start + column)
            code = _code(aim[column] * per_step, form)
            weighted = code * (importance * importance)
            some_power += weighted * code
            some_pull += weighted * aim[column]
        power += some_power
        pull += some_pull
    return where(less(spread(_ZERO), power), pull / _higher(power, spread(_TINY)), step)


@_inner
def _ranges_of_symmetric(aim, upper, start, form, steps, offsets, first):
    most = aim[0]
    for column in range(1, form.columns):
        most = where(less(absolute(most), absolute(aim[column])), aim[column], most)
    place, spans = first, _spans(form)
    for outermost in (form.lowest, form.mirrored):
        for number in range(len(spans)):
            steps[place] = most * spans[number] / outermost
            place += 1
    for number in range(first, place):
        steps[number + place - first] = _refitted(aim, upper, start, form, steps[number])
    last = 2 * place - first
    for number in range(first, last):
        offsets[number] = spread(_ZERO)
    return last


@_inner
def _refitted_with_minimum(aim, upper, start, form, step, offset, total, plain):
    """The least-squares step and offset for the codes that a step and an offset give."""
    first, second, product, zero = spread(_ZERO), spread(_ZERO), spread(_ZERO), spread(_ZERO)
    for run in range(0, form.columns, RUN):
        some_first, some_second, some_product = spread(_ZERO), spread(_ZERO), spread(_ZERO)
        for column in range(run, run + RUN):
            importance = at(upper, start + column, start + column)
            code = _code((aim[column] - offset) / step, form)
            weighted = code * (importance * importance)
            some_first += weighted
            some_second += weighted * code
            some_product += weighted * aim[column]
        first += some_first
        second += some_second
        product += some_product
    spread_out = _higher(total * second - first * first, spread(_TINY))
    new_step = (total * product - first * plain) / spread_out
    new_offset = (second * plain - first * product) / spread_out
    if form.several:                                # a stored minimum is never above zero
        above = less(zero, new_offset)
        new_step = where(above, product / _higher(second, spread(_TINY)), new_step)
        new_offset = where(above, zero, new_offset)
    usable = less(zero, new_step)
    return where(usable, new_step, step), where(usable, new_offset, offset)


@_inner
def _ranges_with_minimum(aim, upper, total, start, form, steps, offsets, first):
    lowest, highest, plain, middle = aim[0], aim[0], spread(_ZERO), spread(_ZERO)
    for run in range(0, form.columns, RUN):
        some_plain = spread(_ZERO)
        for column in range(run, run + RUN):
            importance = at(upper, start + column, start + column)
            lowest, highest = _lower(aim[column], lowest), _higher(aim[column], highest)
            some_plain += aim[column] * (importance * importance)
        plain += some_plain
    if form.several:
        lowest, highest = _lower(lowest, spread(_ZERO)), _higher(highest, spread(_ZERO))
    else:
        middle = (lowest + highest) * _HALF
    place = first
    for number in range(len(_WIDE)):
        left, right = _WIDE[number]
        offset = middle + (lowest - middle) * left
        step = _higher((middle + (highest - middle) * right - offset) / form.highest, spread(_SMALL))
        steps[place], offsets[place] = step, offset
        steps[place + len(_WIDE)], offsets[place + len(_WIDE)] = _refitted_with_minimum(
            aim, upper, start, form, step, offset, total, plain)
        place += 1
    return place + len(_WIDE)


@_inner
def _ranges(aim, upper, total, start, form, steps, offsets, first):
    """Write the candidates of `rounding._ranges` from number `first` and return the number after the last.

    The metric of the part starts at row and column `start` of upper; total is the sum of its diagonal's squares.
    """
    if form.minimum:
        return _ranges_with_minimum(aim, upper, total, start, form, steps, offsets, first)
    return _ranges_of_symmetric(aim, upper, start, form, steps, offsets, first)


@_inner
def _cheap_loss(aim, upper, start, form, step, offset):
    """The weighted squared error of plain rounding."""
    loss, per_step = spread(_ZERO), inverse(step)
    for run in range(0, form.columns, RUN):
        some = spread(_ZERO)
        for column in range(run, run + RUN):
            importance = at(upper, start + column, start + column)
            code = _code((aim[column] - offset) * per_step, form)
            error = code * step + offset - aim[column]
            some += error * error * (importance * importance)
        loss += some
    return loss


@_inner
def _stored(form, first, last, tried, unit, low):
    """Round candidates to what a block with 16-bit numbers `unit` and `low` can store.

    tried: steps, offsets, scales, lows and losses of the candidates.
    """
    steps, offsets, scales, lows, _ = tried
    for place in range(first, last):
        if form.several:
            scales[place] = _nearest(steps[place] * inverse(unit), form.least, form.most)
            lows[place] = spread(_ZERO)
            if form.minimum:
                lows[place] = _nearest((_ZERO - offsets[place]) * inverse(low), form.least, form.most)
            steps[place], offsets[place] = unit * scales[place], _ZERO - low * lows[place]
        else:
            steps[place], offsets[place] = half(steps[place]), half(offsets[place])
            scales[place], lows[place] = spread(_ONE), spread(_ZERO)


# -- codes ------------------------------------------------------------------------------------------------------------


@_inner
def _compensated(aim, metric, form, step, offset, held, errors, codes):
    """Round a part with one candidate, each error compensated, and return the loss; errors (columns) is overwritten."""
    keep, kept = held
    rests, per_step = local(PART), inverse(step)
    for column in range(form.columns - 1, -1, -1):
        wanted = aim[column]
        for other in range(form.columns - 1, column, -1):
            wanted = fused(at(metric.passing, column, other), errors[other], wanted)
        code = _code((wanted - offset) * per_step, form)
        value = code * step + offset
        if kept:
            code *= keep[column]
            value *= keep[column]
        codes[column], errors[column] = code, aim[column] - value
        rest = (wanted - value) * at(metric.upper, column, column)
        rests[column] = rest * rest
    return _sum(rests, form.columns)


@_inner
def _best(aim, metric, form, span, tried, held, found, codes):
    """Take the first `near` of `last` candidates, span = (near, last), and the TRIED best others by their losses; keep the
    best compensated one.

    Writes its step, offset, scale and low to found (4), its codes to `codes`; losses are overwritten. `tried` as in
    `_stored`.
    """
    near, last = span
    steps, offsets, scales, lows, losses = tried
    rounded, errors, least_loss = local(PART), local(PART), spread(_INFINITE)
    for turn in range(near + TRIED):
        place = min(turn, near)
        step, offset, scale, low = steps[place], offsets[place], scales[place], lows[place]
        if turn >= near:
            least, which = losses[near], spread(np.float32(near))
            for place in range(near + 1, last):
                better = less(losses[place], least)
                least, which = where(better, losses[place], least), where(better, spread(np.float32(place)), which)
                step, offset = where(better, steps[place], step), where(better, offsets[place], offset)
                scale, low = where(better, scales[place], scale), where(better, lows[place], low)
            for place in range(near, last):
                taken = less(absolute(which - np.float32(place)), spread(_HALF))
                losses[place] = where(taken, spread(_INFINITE), losses[place])
        loss = _compensated(aim, metric, form, step, offset, held, errors, rounded)
        if turn == 0:
            least_loss = loss
            found[0], found[1], found[2], found[3] = step, offset, scale, low
            for column in range(form.columns):
                codes[column] = rounded[column]
        else:
            better = less(loss, least_loss)
            least_loss = where(better, loss, least_loss)
            found[0], found[1] = where(better, step, found[0]), where(better, offset, found[1])
            found[2], found[3] = where(better, scale, found[2]), where(better, low, found[3])
            for column in range(form.columns):
                codes[column] = where(better, rounded[column], codes[column])


@_inner
def _descended(aim, metric, form, found, held, codes, values):
    """Set each code to its best given the others, LOCAL_ROUNDS times."""
    keep, kept = held
    slope, error = local(PART), local(PART)
    for column in range(form.columns):
        error[column] = aim[column] - values[column]
    _product(slope, metric, error, form.columns)
    step, offset, per_step = found[0], found[1], inverse(found[0])
    for _ in range(LOCAL_ROUNDS):
        for column in range(form.columns):
            aimed = fused(_ONE / at(metric, column, column), slope[column], values[column])
            code = _code((aimed - offset) * per_step, form)
            new = code * step + offset
            if kept:
                code *= keep[column]
                new *= keep[column]
            moved = values[column] - new
            codes[column], values[column] = code, new
            for other in range(form.columns):
                slope[other] = fused(at(metric, column, other), moved, slope[other])


@_inner
def _loss(metric, error, columns, moved):
    """The loss of an error, which is overwritten; moved becomes metric · error."""
    _product(moved, metric, error, columns)
    for column in range(columns):
        error[column] = moved[column] * error[column]
    return _sum(error, columns)


# -- what a tile of rows goes through ---------------------------------------------------------------------------------


@_inner
def _choose_tile(form, tile, columns, wanted, upper, totals, scales, block):
    """Choose the 16-bit numbers of a block from the best scales of its parts.

    wanted (columns, rows): what the block is rounded towards; upper (columns, columns): R of its metric; totals (parts,):
    sums of the squares of each part's diagonal. Writes row `block` of the 16-bit numbers.
    """
    row, count, _ = tile
    aim, steps, offsets, first = local(PART), local(_MOST), local(_MOST), block * (columns // form.columns)
    most, lowest = spread(_ZERO), spread(_ZERO)
    for start in range(0, columns, form.columns):
        for column in range(form.columns):
            aim[column] = load(wanted, start + column, row, count)
        last = _ranges(aim, upper, totals[first + start // form.columns], start, form, steps, offsets, 0)
        least, liked, offset = _cheap_loss(aim, upper, start, form, steps[0], offsets[0]), steps[0], offsets[0]
        for place in range(1, last):
            loss = _cheap_loss(aim, upper, start, form, steps[place], offsets[place])
            better = less(loss, least)
            least, liked, offset = where(better, loss, least), where(better, steps[place], liked), \
                where(better, offsets[place], offset)
        if start == 0:
            most = liked
        elif form.minimum:
            most = _higher(liked, most)
        else:
            most = where(less(absolute(most), absolute(liked)), liked, most)
        lowest = _higher(_ZERO - offset, lowest)
    if form.minimum:
        store(scales.step, block, row, count, half(most / form.most))
        store(scales.low, block, row, count, half(lowest / form.most))
    else:
        store(scales.step, block, row, count, half(most / form.least))


@_inner
def _visit_tile(form, tile, place, seen, metric, weights, scales):
    """Round a part for the first time: write its values, codes, errors, what it leaves, and its scales."""
    row, count, first = tile
    low, _, block, part = place
    target, owed, more, errors, left = seen
    upper = metric.upper
    aim, held, new, error, found = local(PART), local(PART), local(PART), local(PART), local(4)
    tried = (local(_MOST), local(_MOST), local(_MOST), local(_MOST), local(_MOST))
    steps, offsets, _, _, losses = tried
    columns = form.columns
    for column in range(columns):
        aim[column] = load(owed, column, row, count)
        if first > 0:
            aim[column] = aim[column] + load(more, column, row - first, count)
        if weights.kept:
            held[column] = load(weights.keep, low + column, row, count)
    _solve_upper(upper, aim, columns)
    for column in range(columns):
        aim[column] = load(target, low + column, row, count) + aim[column]
    last = _ranges(aim, upper, metric.totals[part], 0, form, steps, offsets, 0)
    _stored(form, 0, last, tried, load(scales.step, block, row, count), load(scales.low, block, row, count))
    for turn in range(last):
        losses[turn] = _cheap_loss(aim, upper, 0, form, steps[turn], offsets[turn])
    _best(aim, metric, form, (0, last), tried, (held, weights.kept), found, new)
    for column in range(columns):
        value = new[column] * found[0] + found[1]
        if weights.kept:
            value *= held[column]
        error[column] = load(target, low + column, row, count) - value
        store(weights.codes, low + column, row, count, new[column])
        store(weights.values, low + column, row, count, value)
        store(errors, low + column, row, count, error[column])
    for column in range(columns):
        rest = load(owed, column, row, count)
        for other in range(column, columns):
            rest = fused(at(upper, column, other), error[other], rest)
        store(left, column, row, count, rest)
    store(scales.scale, part, row, count, found[2])
    store(scales.lows, part, row, count, found[3])
    if not form.several:
        store(scales.step, part, row, count, found[0])
        store(scales.low, part, row, count, found[1])


@_inner
def _neighbours(form, unit, low, scale, minimum, tried):
    """Write the current scales of a part and those with neighbouring integers, and return their number.

    unit and low: the 16-bit numbers of the block; scale and minimum: the stored integers of the part; tried as in `_stored`.
    """
    steps, offsets, scales, minima, _ = tried
    if not form.several:
        steps[0], offsets[0], scales[0], minima[0] = unit, low, scale, minimum
        return 1
    count = 5 if form.minimum else 3
    for place in range(count):
        more = _ONE if place == 1 else -_ONE if place == 2 else _ZERO
        below = _ONE if place == 3 else -_ONE if place == 4 else _ZERO
        scales[place] = _nearest(scale + more, form.least, form.most)
        minima[place] = _nearest(minimum + below, form.least, form.most)
        steps[place], offsets[place] = unit * scales[place], _ZERO - low * minima[place]
    return count


@_inner
def _propose_tile(form, tile, place, pull, metric, weights, scales, proposal):
    """Find codes and scales of a part that lower the error of each row with all others fixed, and write the proposal, which
    repeats what there is where nothing is better.

    pull (columns, rows from `first`): Rᵀ · residual at the part's columns, with other rows mixed in.
    """
    row, count, first = tile
    low, _, block, part = place
    upper, kept = metric.upper, weights.kept
    aim, before, held, new, value = local(PART), local(PART), local(PART), local(PART), local(PART)
    error, moved, found = local(PART), local(PART), local(4)
    tried = (local(_MOST), local(_MOST), local(_MOST), local(_MOST), local(_MOST))
    steps, offsets, tried_scales, minima, losses = tried
    columns = form.columns
    for column in range(columns):
        aim[column] = load(pull, column, row - first, count)
        before[column] = load(weights.values, low + column, row, count)
        if kept:
            held[column] = load(weights.keep, low + column, row, count)
    _solve_lower(upper, aim, columns)
    _solve_upper(upper, aim, columns)
    for column in range(columns):
        aim[column] = before[column] + aim[column]
    unit, less_than = load(scales.step, block, row, count), load(scales.low, block, row, count)
    scale, minimum = load(scales.scale, part, row, count), load(scales.lows, part, row, count)
    near = _neighbours(form, unit, less_than, scale, minimum, tried)
    last = _ranges(aim, upper, metric.totals[part], 0, form, steps, offsets, near)
    _stored(form, near, last, tried, unit, less_than)
    for turn in range(near, last):
        losses[turn] = _cheap_loss(aim, upper, 0, form, steps[turn], offsets[turn])
    _best(aim, metric, form, (near, last), tried, (held, kept), found, new)
    for column in range(columns):
        value[column] = new[column] * found[0] + found[1]
        if kept:
            value[column] = value[column] * held[column]
    _descended(aim, metric.whole, form, found, (held, kept), new, value)
    for column in range(columns):
        error[column] = aim[column] - before[column]
    worse = _loss(metric.whole, error, columns, moved)
    for column in range(columns):
        error[column] = aim[column] - value[column]
    better = less(spread(_ZERO), worse - _loss(metric.whole, error, columns, moved))
    for column in range(columns):
        old = load(weights.codes, low + column, row, count)
        store(proposal.codes, column, row - first, count, where(better, new[column], old))
        value[column] = where(better, value[column] - before[column], spread(_ZERO))
        store(proposal.change, column, row, count, value[column])
    _product(moved, metric.whole, value, columns)
    for column in range(columns):
        pulled = load(pull, column, row - first, count)
        store(proposal.rises, column, row - first, count, moved[column] - (pulled + pulled))
    store(proposal.scales, 0, row - first, count, where(better, found[0], steps[0]))
    store(proposal.scales, 1, row - first, count, where(better, found[1], offsets[0]))
    store(proposal.scales, 2, row - first, count, where(better, found[2], tried_scales[0]))
    store(proposal.scales, 3, row - first, count, where(better, found[3], minima[0]))


@_inner
def _settle_tile(form, tile, place, metric, weights, scales, proposal, pulls):
    """Carry out a proposal; the part's rows of pulls (span, rows) lose metric · change."""
    row, count, first = tile
    low, within, _, part = place
    moved, changed = local(PART), local(PART)
    for column in range(form.columns):
        store(weights.codes, low + column, row, count, load(proposal.codes, column, row - first, count))
        changed[column] = load(proposal.change, column, row, count)
        store(weights.values, low + column, row, count, load(weights.values, low + column, row, count) + changed[column])
    _product(moved, metric.whole, changed, form.columns)
    for column in range(form.columns):
        store(pulls, within + column, row, count, load(pulls, within + column, row, count) - moved[column])
    store(scales.scale, part, row, count, load(proposal.scales, 2, row - first, count))
    store(scales.lows, part, row, count, load(proposal.scales, 3, row - first, count))
    if not form.several:
        store(scales.step, part, row, count, load(proposal.scales, 0, row - first, count))
        store(scales.low, part, row, count, load(proposal.scales, 1, row - first, count))


@_inner
def _shift_tile(tile, numbers, place, columns, refit, values):
    """Set a 16-bit number of a block, numbers (blocks, rows), where the error of each row is smallest with everything else
    fixed; values (d_in, rows) follow."""
    row, count, first = tile
    low, _, block, _ = place
    direction, moved, mixed = refit
    power, pull, zero = spread(_ZERO), spread(_ZERO), spread(_ZERO)
    for column in range(columns):
        along = load(direction, column, row - first, count)
        power += along * load(moved, column, row - first, count)
        pull += along * load(mixed, column, row - first, count)
    number = load(numbers, block, row, count)
    step = where(less(zero, power), pull / _higher(power, spread(_TINY)), zero)
    change = half(number + step) - number
    change = where(less(change * (change * power - (pull + pull)), zero), change, zero)
    store(numbers, block, row, count, number + change)
    for column in range(columns):
        along = load(direction, column, row - first, count)
        store(values, low + column, row, count, load(values, low + column, row, count) + change * along)
        store(moved, column, row - first, count, load(moved, column, row - first, count) * change)


# -- all rows ---------------------------------------------------------------------------------------------------------


def _on_all_rows(stamp):
    """The functions that are called from outside, kept on disk beside this file, or else in the user's cache.

    Numba would use them again after a change of another file: `stamp`, a variable of theirs, is part of their key.
    """
    def compiled(function):
        try:
            return njit(cache=True, nogil=True, error_model="numpy")(function)
        except RuntimeError:                # no directory can be written: compile in every process
            return njit(nogil=True, error_model="numpy")(function)

    @compiled
    def choose(form, rows, *more):
        """Choose the 16-bit numbers of a block for all rows; see `_choose_tile`."""
        assert stamp >= 0
        for row in range(0, rows, LANES):
            _choose_tile(form, Tile(row, min(LANES, rows - row), 0), *more)

    @compiled
    def visit(form, first, last, *more):
        """Round a part of rows `first` to `last` for the first time; see `_visit_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _visit_tile(form, Tile(row, min(LANES, last - row), first), *more)

    @compiled
    def propose(form, first, last, *more):
        """Find better codes and scales of a part for rows `first` to `last`; see `_propose_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _propose_tile(form, Tile(row, min(LANES, last - row), first), *more)

    @compiled
    def settle(form, first, last, *more):
        """Carry out for rows `first` to `last` what `propose` wrote; see `_settle_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _settle_tile(form, Tile(row, min(LANES, last - row), first), *more)

    @compiled
    def shift(first, last, *more):
        """Improve a 16-bit number of a block for rows `first` to `last`; see `_shift_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _shift_tile(Tile(row, min(LANES, last - row), first), *more)

    return choose, visit, propose, settle, shift


choose, visit, propose, settle, shift = _on_all_rows(zlib.crc32(b"".join(
    Path(__file__).with_name(name).read_bytes() for name in ("compiled.py", "ggml.py", "rounding.py", "vectors.py"))))
