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
from numba import njit

from tsotsallm.numerics.rounding import LOCAL_ROUNDS, SPANS, TRIED
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
    spread,
    store,
    where,
    whole,
)

PART = 32
"""Columns of the widest part."""
RUN = 16
_SPANS = tuple(np.float32(span) for span in SPANS)
_WIDE = tuple((np.float32(left), np.float32(right)) for left in SPANS[1:] for right in SPANS[1:] if abs(left - right) < 0.13)
_NEAR = 5
_MOST = _NEAR + 2 * max(2 * len(SPANS), len(_WIDE))
_ZERO, _ONE, _HALF, _TINY, _SMALL = (np.float32(value) for value in (0, 1, 0.5, 1e-30, 1e-12))
_INFINITE = np.float32(np.inf)


class Form(NamedTuple):
    """The structure of a grid, as compiled functions take it.

    columns            of a part
    minimum            whether parts have a minimum of their own
    several            whether a block has several parts, whose scales are integers between `least` and `most`
    lowest, highest    codes
    """

    columns: int
    minimum: bool
    several: bool
    lowest: np.float32
    highest: np.float32
    least: np.float32
    most: np.float32


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
            code = _nearest(aim[column] * per_step, form.lowest, form.highest)
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
    place = first
    for sign in range(2):
        for number in range(len(_SPANS)):
            step = most * _SPANS[number] / form.lowest
            steps[place] = step if sign == 0 else _ZERO - step
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
            code = _nearest((aim[column] - offset) / step, _ZERO, form.highest)
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
            code = _nearest((aim[column] - offset) * per_step, form.lowest, form.highest)
            error = code * step + offset - aim[column]
            some += error * error * (importance * importance)
        loss += some
    return loss


@_inner
def _stored(form, first, last, steps, offsets, scales, lows, unit, low):
    """Round candidates to what a block with 16-bit numbers `unit` and `low` can store."""
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
def _compensated(aim, upper, passing, form, step, offset, keep, kept, errors, codes):
    """Round a part with one candidate, each error compensated, and return the loss; errors (columns) is overwritten."""
    rests, per_step = local(PART), inverse(step)
    for column in range(form.columns - 1, -1, -1):
        wanted = aim[column]
        for other in range(form.columns - 1, column, -1):
            wanted = fused(at(passing, column, other), errors[other], wanted)
        code = _nearest((wanted - offset) * per_step, form.lowest, form.highest)
        value = code * step + offset
        if kept:
            code *= keep[column]
            value *= keep[column]
        codes[column], errors[column] = code, aim[column] - value
        rest = (wanted - value) * at(upper, column, column)
        rests[column] = rest * rest
    return _sum(rests, form.columns)


@_inner
def _best(aim, upper, passing, form, near, last, steps, offsets, scales, lows, losses, keep, kept, found, codes):
    """Take the first `near` candidates and the TRIED best others by `losses`; keep the best compensated one.

    Writes its step, offset, scale and low to found (4), its codes to `codes`; `losses` is overwritten.
    """
    tried, errors, least_loss = local(PART), local(PART), spread(_INFINITE)
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
        loss = _compensated(aim, upper, passing, form, step, offset, keep, kept, errors, tried)
        if turn == 0:
            least_loss = loss
            found[0], found[1], found[2], found[3] = step, offset, scale, low
            for column in range(form.columns):
                codes[column] = tried[column]
        else:
            better = less(loss, least_loss)
            least_loss = where(better, loss, least_loss)
            found[0], found[1] = where(better, step, found[0]), where(better, offset, found[1])
            found[2], found[3] = where(better, scale, found[2]), where(better, low, found[3])
            for column in range(form.columns):
                codes[column] = where(better, tried[column], codes[column])


@_inner
def _descended(aim, metric, form, found, keep, kept, codes, values):
    """Set each code to its best given the others, LOCAL_ROUNDS times."""
    slope, error = local(PART), local(PART)
    for column in range(form.columns):
        error[column] = aim[column] - values[column]
    _product(slope, metric, error, form.columns)
    step, offset, per_step = found[0], found[1], inverse(found[0])
    for _ in range(LOCAL_ROUNDS):
        for column in range(form.columns):
            aimed = fused(_ONE / at(metric, column, column), slope[column], values[column])
            code = _nearest((aimed - offset) * per_step, form.lowest, form.highest)
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
def _choose_tile(form, row, count, columns, wanted, upper, totals, step, low, block):
    """Choose the 16-bit numbers of a block from the best scales of its parts.

    wanted (columns, rows): what the block is rounded towards; upper (columns, columns): R of its metric; totals (parts,):
    sums of the squares of each part's diagonal. Writes row `block` of step and low (blocks, rows).
    """
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
        store(step, block, row, count, half(most / form.most))
        store(low, block, row, count, half(lowest / form.most))
    else:
        store(step, block, row, count, half(most / form.least))


@_inner
def _visit_tile(form, row, count, first, low, target, owed, more, upper, passing, totals, keep, kept, values, codes, errors,
                left, step, lowest, scale, lows, block, part):
    """Round a part for the first time.

    The part starts at column `low` of target, keep, values, codes and errors (d_in, rows), of which it writes the last
    three. owed (columns, rows): what earlier columns leave to it; more (columns, rows from `first`): what earlier rows do,
    unused where `first` is 0; upper, passing (columns, columns): R of its metric, and its rows divided by the diagonal;
    totals (parts,): sums of the squares of each part's diagonal. Writes left (columns, rows), upper · errors + owed, and
    the scales of the part.
    """
    aim, held, new, error, found = local(PART), local(PART), local(PART), local(PART), local(4)
    steps, offsets, scales, minima, losses = local(_MOST), local(_MOST), local(_MOST), local(_MOST), local(_MOST)
    columns = form.columns
    for column in range(columns):
        aim[column] = load(owed, column, row, count)
        if first > 0:
            aim[column] = aim[column] + load(more, column, row - first, count)
        if kept:
            held[column] = load(keep, low + column, row, count)
    _solve_upper(upper, aim, columns)
    for column in range(columns):
        aim[column] = load(target, low + column, row, count) + aim[column]
    last = _ranges(aim, upper, totals[part], 0, form, steps, offsets, 0)
    _stored(form, 0, last, steps, offsets, scales, minima, load(step, block, row, count), load(lowest, block, row, count))
    for place in range(last):
        losses[place] = _cheap_loss(aim, upper, 0, form, steps[place], offsets[place])
    _best(aim, upper, passing, form, 0, last, steps, offsets, scales, minima, losses, held, kept, found, new)
    for column in range(columns):
        value = new[column] * found[0] + found[1]
        if kept:
            value *= held[column]
        error[column] = load(target, low + column, row, count) - value
        store(codes, low + column, row, count, new[column])
        store(values, low + column, row, count, value)
        store(errors, low + column, row, count, error[column])
    for column in range(columns):
        rest = load(owed, column, row, count)
        for other in range(column, columns):
            rest = fused(at(upper, column, other), error[other], rest)
        store(left, column, row, count, rest)
    store(scale, part, row, count, found[2])
    store(lows, part, row, count, found[3])
    if not form.several:
        store(step, part, row, count, found[0])
        store(lowest, part, row, count, found[1])


@_inner
def _neighbours(form, unit, low, scale, minimum, steps, offsets, scales, minima):
    """Write the current scales of a part and those with neighbouring integers, and return their number.

    unit and low: the 16-bit numbers of the block; scale and minimum: the stored integers of the part.
    """
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
def _propose_tile(form, row, count, first, low, pull, upper, passing, totals, metric, keep, kept, values, codes, step,
                  lowest, scale, lows, block, part, new_codes, new_scales, change, rises):
    """Find codes and scales of a part that lower the error of each row with all others fixed.

    pull (columns, rows from `first`): Rᵀ · residual at the part's columns, with other rows mixed in; the rest as in
    `_visit_tile`. Writes the proposal, which repeats what there is where nothing is better: new_codes and rises = metric ·
    change − 2 pull (columns, rows from `first`), new_scales (4, rows from `first`) and change (columns, rows) of the values.
    """
    aim, before, held, new, value = local(PART), local(PART), local(PART), local(PART), local(PART)
    error, moved, found = local(PART), local(PART), local(4)
    steps, offsets, scales, minima, losses = local(_MOST), local(_MOST), local(_MOST), local(_MOST), local(_MOST)
    columns = form.columns
    for column in range(columns):
        aim[column] = load(pull, column, row - first, count)
        before[column] = load(values, low + column, row, count)
        if kept:
            held[column] = load(keep, low + column, row, count)
    _solve_lower(upper, aim, columns)
    _solve_upper(upper, aim, columns)
    for column in range(columns):
        aim[column] = before[column] + aim[column]
    unit, less_than = load(step, block, row, count), load(lowest, block, row, count)
    near = _neighbours(form, unit, less_than, load(scale, part, row, count), load(lows, part, row, count), steps, offsets,
                       scales, minima)
    last = _ranges(aim, upper, totals[part], 0, form, steps, offsets, near)
    _stored(form, near, last, steps, offsets, scales, minima, unit, less_than)
    for place in range(near, last):
        losses[place] = _cheap_loss(aim, upper, 0, form, steps[place], offsets[place])
    _best(aim, upper, passing, form, near, last, steps, offsets, scales, minima, losses, held, kept, found, new)
    for column in range(columns):
        value[column] = new[column] * found[0] + found[1]
        if kept:
            value[column] = value[column] * held[column]
    _descended(aim, metric, form, found, held, kept, new, value)
    for column in range(columns):
        error[column] = aim[column] - before[column]
    worse = _loss(metric, error, columns, moved)
    for column in range(columns):
        error[column] = aim[column] - value[column]
    better = less(spread(_ZERO), worse - _loss(metric, error, columns, moved))
    for column in range(columns):
        store(new_codes, column, row - first, count, where(better, new[column], load(codes, low + column, row, count)))
        value[column] = where(better, value[column] - before[column], spread(_ZERO))
        store(change, column, row, count, value[column])
    _product(moved, metric, value, columns)
    for column in range(columns):
        pulled = load(pull, column, row - first, count)
        store(rises, column, row - first, count, moved[column] - (pulled + pulled))
    store(new_scales, 0, row - first, count, where(better, found[0], steps[0]))
    store(new_scales, 1, row - first, count, where(better, found[1], offsets[0]))
    store(new_scales, 2, row - first, count, where(better, found[2], scales[0]))
    store(new_scales, 3, row - first, count, where(better, found[3], minima[0]))


@_inner
def _settle_tile(form, row, count, first, low, metric, values, codes, step, lowest, scale, lows, part, new_codes,
                 new_scales, change, pulls, place):
    """Carry out what `_propose_tile` wrote; rows `place` and following of pulls (·, rows) lose metric · change."""
    moved, changed = local(PART), local(PART)
    for column in range(form.columns):
        store(codes, low + column, row, count, load(new_codes, column, row - first, count))
        changed[column] = load(change, column, row, count)
        store(values, low + column, row, count, load(values, low + column, row, count) + changed[column])
    _product(moved, metric, changed, form.columns)
    for column in range(form.columns):
        store(pulls, place + column, row, count, load(pulls, place + column, row, count) - moved[column])
    store(scale, part, row, count, load(new_scales, 2, row - first, count))
    store(lows, part, row, count, load(new_scales, 3, row - first, count))
    if not form.several:
        store(step, part, row, count, load(new_scales, 0, row - first, count))
        store(lowest, part, row, count, load(new_scales, 1, row - first, count))


@_inner
def _shift_tile(row, count, first, numbers, block, low, columns, direction, moved, mixed, values):
    """Set a 16-bit number of a block where the error of each row is smallest with everything else fixed.

    numbers (blocks, rows), values (d_in, rows), all others (columns, rows from `first`): direction, the change of its
    values with a number; moved, metric · direction, which becomes metric · change; mixed, Rᵀ · residual with other rows
    mixed in.
    """
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
            _choose_tile(form, row, min(LANES, rows - row), *more)

    @compiled
    def visit(form, first, last, *more):
        """Round a part of rows `first` to `last` for the first time; see `_visit_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _visit_tile(form, row, min(LANES, last - row), first, *more)

    @compiled
    def propose(form, first, last, *more):
        """Find better codes and scales of a part for rows `first` to `last`; see `_propose_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _propose_tile(form, row, min(LANES, last - row), first, *more)

    @compiled
    def settle(form, first, last, *more):
        """Carry out for rows `first` to `last` what `propose` wrote; see `_settle_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _settle_tile(form, row, min(LANES, last - row), first, *more)

    @compiled
    def shift(first, last, *more):
        """Improve a 16-bit number of a block for rows `first` to `last`; see `_shift_tile`."""
        assert stamp >= 0
        for row in range(first, last, LANES):
            _shift_tile(row, min(LANES, last - row), first, *more)

    return choose, visit, propose, settle, shift


choose, visit, propose, settle, shift = _on_all_rows(zlib.crc32(b"".join(
    Path(__file__).with_name(name).read_bytes() for name in ("compiled.py", "rounding.py", "vectors.py"))))
