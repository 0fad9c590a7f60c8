"""The inner loops of `rounding`, compiled by Numba: LANES rows at a time, one row in each lane of a vector register.

Every function does for a part (16 or 32 columns) what the functions of `rounding` with the same words do, in the same
order and in float32; only sums of products may be fused, as they are in torch. Rows are independent of each other, so
that the number of threads changes no bit. Arrays are as in `rounding`: columns or parts as rows, in reversed visiting
order. Import this module only where `machine.compiler()` names a version.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from tsotsallm.numerics.rounding import LOCAL_ROUNDS, SPANS, TRIED

Floats = npt.NDArray[np.float32]

LANES = 16
PART = 32
"""Columns of the widest part."""
_SPANS = np.array(SPANS, dtype=np.float32)
_WIDE = np.array([(left, right) for left in SPANS[1:] for right in SPANS[1:] if abs(left - right) < 0.13], dtype=np.float32)
_NEAR = 5
_MOST = _NEAR + 2 * max(2 * len(SPANS), len(_WIDE))
_FOUR, _TILE, _LIST = 4 * LANES, PART * LANES, _MOST * LANES
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


@intrinsic(prefer_literal=True)
def _stack(_context: Any, size: Any) -> Any:
    """Floats on the stack, which the compiler knows to overlap nothing else."""
    count = size.literal_value

    def generate(_context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        place = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), count))
        place.align = 64
        return builder.bitcast(place, ir.PointerType(ir.FloatType()))

    return types.CPointer(types.float32)(size), generate


_inlined = njit(inline="always")
_exact = njit(forceinline=True, error_model="numpy")
_fused = njit(forceinline=True, error_model="numpy", fastmath={"contract"})
_over_rows = njit(parallel=True, cache=True, nogil=True, error_model="numpy")


@_inlined
def _row():                                                                             # type: ignore[no-untyped-def]
    return carray(_stack(LANES), (LANES,), np.float32)


@_inlined
def _four():                                                                            # type: ignore[no-untyped-def]
    return carray(_stack(_FOUR), (4, LANES), np.float32)


@_inlined
def _tile():                                                                            # type: ignore[no-untyped-def]
    return carray(_stack(_TILE), (PART, LANES), np.float32)


@_inlined
def _list():                                                                            # type: ignore[no-untyped-def]
    return carray(_stack(_LIST), (_MOST, LANES), np.float32)


# -- numbers ----------------------------------------------------------------------------------------------------------


@_exact
def _half(value):                                                                       # type: ignore[no-untyped-def]
    """A number rounded to half precision: added to and taken from one whose last bit is that of the result."""
    exponent = np.int32(np.float32(value).view(np.int32) & np.int32(0x7F800000)).view(np.float32)
    large = max(exponent * np.float32(12288), np.float32(0.75))
    near = (value + large) - large
    if value >= np.float32(65520):
        near = _INFINITE
    if value <= np.float32(-65520):
        near = -_INFINITE
    return near


@_exact
def _nearest(value, lowest, highest):                                                   # type: ignore[no-untyped-def]
    whole = np.rint(value)
    whole = lowest if whole < lowest else whole
    return highest if whole > highest else whole


@_exact
def _inverse(value):                                                                    # type: ignore[no-untyped-def]
    return _ONE / value if value != _ZERO else _ZERO


# -- vectors of lanes -------------------------------------------------------------------------------------------------


@_exact
def _load(to, source, low, columns, row, count):                                        # type: ignore[no-untyped-def]
    """Rows `row` to `row + count` of some columns; lanes without a row are zero."""
    if count == LANES:
        for column in range(columns):
            for lane in range(LANES):
                to[column, lane] = source[low + column, row + lane]
    else:
        for column in range(columns):
            for lane in range(LANES):
                to[column, lane] = _ZERO
            for lane in range(count):
                to[column, lane] = source[low + column, row + lane]


@_exact
def _store(to, low, columns, row, count, source):                                       # type: ignore[no-untyped-def]
    if count == LANES:
        for column in range(columns):
            for lane in range(LANES):
                to[low + column, row + lane] = source[column, lane]
    else:
        for column in range(columns):
            for lane in range(count):
                to[low + column, row + lane] = source[column, lane]


@_fused
def _add(to, place, factor, values, other):                                             # type: ignore[no-untyped-def]
    for lane in range(LANES):
        to[place, lane] += factor * values[other, lane]


@_fused
def _solve_upper(upper, values, columns):                                               # type: ignore[no-untyped-def]
    """Replace values y by x with upper · x = y."""
    for column in range(columns - 1, -1, -1):
        inverse = _ONE / upper[column, column]
        for lane in range(LANES):
            values[column, lane] *= inverse
        for other in range(column):
            _add(values, other, -upper[other, column], values, column)


@_fused
def _solve_lower(upper, values, columns):                                               # type: ignore[no-untyped-def]
    """Replace values y by x with upperᵀ · x = y."""
    for column in range(columns):
        inverse = _ONE / upper[column, column]
        for lane in range(LANES):
            values[column, lane] *= inverse
        for other in range(column + 1, columns):
            _add(values, other, -upper[column, other], values, column)


@_fused
def _product(to, matrix, values, columns):                                              # type: ignore[no-untyped-def]
    """to = matrix · values, for a symmetric matrix."""
    for column in range(columns):
        for lane in range(LANES):
            to[column, lane] = _ZERO
    for other in range(columns):
        for column in range(columns):
            _add(to, column, matrix[other, column], values, other)


# -- candidates for scales --------------------------------------------------------------------------------------------


@_exact
def _ranges_of_symmetric(aim, upper, form, steps, offsets):                             # type: ignore[no-untyped-def]
    most, largest = _row(), _row()
    power, pull = _row(), _row()
    inverse = _row()
    for lane in range(LANES):
        most[lane], largest[lane] = aim[0, lane], abs(aim[0, lane])
    for column in range(1, form.columns):
        for lane in range(LANES):
            size = abs(aim[column, lane])
            most[lane] = aim[column, lane] if size > largest[lane] else most[lane]
            largest[lane] = size if size > largest[lane] else largest[lane]
    spans = len(_SPANS)
    for place in range(2 * spans):
        span = _SPANS[place % spans]
        for lane in range(LANES):
            step = (most[lane] if place < spans else -most[lane]) * span / form.lowest
            steps[place, lane], inverse[lane] = step, _inverse(step)
            power[lane], pull[lane] = _ZERO, _ZERO
        for column in range(form.columns):
            weight = upper[column, column] * upper[column, column]
            for lane in range(LANES):
                code = _nearest(aim[column, lane] * inverse[lane], form.lowest, form.highest)
                weighted = code * weight
                power[lane] += weighted * code
                pull[lane] += weighted * aim[column, lane]
        for lane in range(LANES):
            steps[2 * spans + place, lane] = (pull[lane] / max(power[lane], _TINY) if power[lane] > _ZERO
                                              else steps[place, lane])
    for place in range(4 * spans):
        for lane in range(LANES):
            offsets[place, lane] = _ZERO
    return 4 * spans


@_exact
def _ranges_with_minimum(aim, upper, form, steps, offsets):                             # type: ignore[no-untyped-def]
    lowest, highest = _row(), _row()
    first, second = _row(), _row()
    plain, product = _row(), _row()
    inverse = _row()
    total = _ZERO
    for lane in range(LANES):
        lowest[lane] = highest[lane] = aim[0, lane]
        plain[lane] = _ZERO
    for column in range(form.columns):
        weight = upper[column, column] * upper[column, column]
        total += weight
        for lane in range(LANES):
            value = aim[column, lane]
            lowest[lane] = value if value < lowest[lane] else lowest[lane]
            highest[lane] = value if value > highest[lane] else highest[lane]
            plain[lane] += weight * value
    if form.several:
        for lane in range(LANES):
            lowest[lane] = lowest[lane] if lowest[lane] < _ZERO else _ZERO
            highest[lane] = highest[lane] if highest[lane] > _ZERO else _ZERO
    count = len(_WIDE)
    for place in range(count):
        left, right = _WIDE[place, 0], _WIDE[place, 1]
        for lane in range(LANES):
            middle = (lowest[lane] + highest[lane]) * _HALF if not form.several else _ZERO
            offset = middle + (lowest[lane] - middle) * left
            step = max((middle + (highest[lane] - middle) * right - offset) / form.highest, _SMALL)
            steps[place, lane], offsets[place, lane], inverse[lane] = step, offset, _ONE / step
            first[lane], second[lane], product[lane] = _ZERO, _ZERO, _ZERO
        for column in range(form.columns):
            weight = upper[column, column] * upper[column, column]
            for lane in range(LANES):
                code = _nearest((aim[column, lane] - offsets[place, lane]) * inverse[lane], _ZERO, form.highest)
                weighted = code * weight
                first[lane] += weighted
                second[lane] += weighted * code
                product[lane] += weighted * aim[column, lane]
        for lane in range(LANES):
            spread = max(total * second[lane] - first[lane] * first[lane], _TINY)
            step = (total * product[lane] - first[lane] * plain[lane]) / spread
            offset = (second[lane] * plain[lane] - first[lane] * product[lane]) / spread
            if form.several and offset > _ZERO:
                step, offset = product[lane] / max(second[lane], _TINY), _ZERO
            steps[count + place, lane] = step if step > _ZERO else steps[place, lane]
            offsets[count + place, lane] = offset if step > _ZERO else offsets[place, lane]
    return 2 * count


@_exact
def _ranges(aim, upper, form, steps, offsets):                                          # type: ignore[no-untyped-def]
    """Write the candidates of `rounding._ranges` and return their number."""
    if form.minimum:
        return _ranges_with_minimum(aim, upper, form, steps, offsets)
    return _ranges_of_symmetric(aim, upper, form, steps, offsets)


@_exact
def _cheap_losses(aim, upper, form, count, steps, offsets, losses):                     # type: ignore[no-untyped-def]
    inverse = _row()
    for place in range(count):
        for lane in range(LANES):
            losses[place, lane], inverse[lane] = _ZERO, _inverse(steps[place, lane])
        for column in range(form.columns):
            weight = upper[column, column] * upper[column, column]
            for lane in range(LANES):
                code = _nearest((aim[column, lane] - offsets[place, lane]) * inverse[lane], form.lowest, form.highest)
                error = code * steps[place, lane] + offsets[place, lane] - aim[column, lane]
                losses[place, lane] += error * error * weight


@_exact
def _stored(form, count, steps, offsets, scales, lows, unit, low):                      # type: ignore[no-untyped-def]
    """Round candidates to what a block can store; unit and low (lanes) are its 16-bit numbers."""
    if not form.several:
        for place in range(count):
            for lane in range(LANES):
                steps[place, lane], offsets[place, lane] = _half(steps[place, lane]), _half(offsets[place, lane])
                scales[place, lane], lows[place, lane] = _ONE, _ZERO
        return
    for place in range(count):
        for lane in range(LANES):
            scale = _nearest(steps[place, lane] * _inverse(unit[lane]), form.least, form.most)
            less = _nearest(-offsets[place, lane] * _inverse(low[lane]), form.least, form.most) if form.minimum else _ZERO
            scales[place, lane], lows[place, lane] = scale, less
            steps[place, lane], offsets[place, lane] = unit[lane] * scale, -(low[lane] * less)


# -- codes ------------------------------------------------------------------------------------------------------------


@_exact
def _compensated(aim, upper, passing, form, step, offset, keep, kept, wanted, codes, loss):  # type: ignore[no-untyped-def]
    """Round a part with one candidate (lanes), each error compensated; `wanted` is overwritten."""
    inverse, error = _row(), _four()
    for lane in range(LANES):
        inverse[lane], loss[lane] = _inverse(step[lane]), _ZERO
    for column in range(form.columns):
        for lane in range(LANES):
            wanted[column, lane] = aim[column, lane]
    for column in range(form.columns - 1, -1, -1):
        weight = upper[column, column]
        for lane in range(LANES):
            code = _nearest((wanted[column, lane] - offset[lane]) * inverse[lane], form.lowest, form.highest)
            value = code * step[lane] + offset[lane]
            if kept:
                code *= keep[column, lane]
                value *= keep[column, lane]
            codes[column, lane] = code
            rest = (wanted[column, lane] - value) * weight
            loss[lane] += rest * rest
            error[0, lane] = aim[column, lane] - value
        for other in range(column):
            _add(wanted, other, passing[column, other], error, 0)


@_exact
def _best(aim, upper, passing, form, count, steps, offsets, scales, lows, losses, keep, kept, near, found, codes
          ):                                                                            # type: ignore[no-untyped-def]
    """Take the `near` candidates that come first and the TRIED best others by `losses`; keep the best compensated one.

    Writes its step, offset, scale and low to found (4, lanes), its codes to `codes`; `losses` is overwritten.
    """
    wanted, tried = _tile(), _tile()
    taken, loss = _four(), _row()
    least, which = _row(), _row()
    best = _row()
    for lane in range(LANES):
        best[lane] = _INFINITE
    for turn in range(near + TRIED):
        if turn < near:
            for lane in range(LANES):
                taken[0, lane], taken[1, lane] = steps[turn, lane], offsets[turn, lane]
                taken[2, lane], taken[3, lane] = scales[turn, lane], lows[turn, lane]
        else:
            for lane in range(LANES):
                least[lane], which[lane] = _INFINITE, np.float32(near)
                taken[0, lane], taken[1, lane] = steps[near, lane], offsets[near, lane]
                taken[2, lane], taken[3, lane] = scales[near, lane], lows[near, lane]
            for place in range(near, count):
                number = np.float32(place)
                for lane in range(LANES):
                    less = losses[place, lane] < least[lane]
                    least[lane] = losses[place, lane] if less else least[lane]
                    which[lane] = number if less else which[lane]
                    taken[0, lane] = steps[place, lane] if less else taken[0, lane]
                    taken[1, lane] = offsets[place, lane] if less else taken[1, lane]
                    taken[2, lane] = scales[place, lane] if less else taken[2, lane]
                    taken[3, lane] = lows[place, lane] if less else taken[3, lane]
            for place in range(near, count):
                number = np.float32(place)
                for lane in range(LANES):
                    losses[place, lane] = _INFINITE if which[lane] == number else losses[place, lane]
        _compensated(aim, upper, passing, form, taken[0], taken[1], keep, kept, wanted, tried, loss)
        for lane in range(LANES):
            which[lane] = _ONE if turn == 0 or loss[lane] < best[lane] else _ZERO
            best[lane] = loss[lane] if which[lane] != _ZERO else best[lane]
        for place in range(4):
            for lane in range(LANES):
                found[place, lane] = taken[place, lane] if which[lane] != _ZERO else found[place, lane]
        for column in range(form.columns):
            for lane in range(LANES):
                codes[column, lane] = tried[column, lane] if which[lane] != _ZERO else codes[column, lane]


@_exact
def _valued(codes, found, form, keep, kept, values):                                    # type: ignore[no-untyped-def]
    for column in range(form.columns):
        for lane in range(LANES):
            value = codes[column, lane] * found[0, lane] + found[1, lane]
            values[column, lane] = value * keep[column, lane] if kept else value


@_exact
def _descended(aim, metric, form, found, keep, kept, codes, values):                    # type: ignore[no-untyped-def]
    """Set each code to its best given the others, LOCAL_ROUNDS times."""
    slope, error = _tile(), _tile()
    inverse = _row()
    for column in range(form.columns):
        for lane in range(LANES):
            error[column, lane] = aim[column, lane] - values[column, lane]
    _product(slope, metric, error, form.columns)
    for lane in range(LANES):
        inverse[lane] = _inverse(found[0, lane])
    for _ in range(LOCAL_ROUNDS):
        for column in range(form.columns):
            power = _ONE / metric[column, column]
            for lane in range(LANES):
                aimed = values[column, lane] + slope[column, lane] * power
                code = _nearest((aimed - found[1, lane]) * inverse[lane], form.lowest, form.highest)
                new = code * found[0, lane] + found[1, lane]
                if kept:
                    code *= keep[column, lane]
                    new *= keep[column, lane]
                codes[column, lane] = code
                error[0, lane] = values[column, lane] - new
                values[column, lane] = new
            for other in range(form.columns):
                _add(slope, other, metric[column, other], error, 0)


# -- what a tile of rows goes through ---------------------------------------------------------------------------------


@_exact
def _numbers(form, step, low, block, row, count, unit, less):                           # type: ignore[no-untyped-def]
    """The 16-bit numbers of a block (lanes), where it has several parts."""
    for lane in range(LANES):
        unit[lane], less[lane] = _ZERO, _ZERO
    if form.several:
        for lane in range(count):
            unit[lane], less[lane] = step[block, row + lane], low[block, row + lane]


@njit(error_model="numpy")
def _choose_tile(form, row, count, columns, wanted, upper, step, low, block):           # type: ignore[no-untyped-def]
    aim = _tile()
    steps, offsets = _list(), _list()
    losses = _list()
    most, lowest = _row(), _row()
    least, liked = _row(), _row()
    less = _row()
    for lane in range(LANES):
        most[lane], lowest[lane] = _ZERO, _ZERO
    for part in range(columns // form.columns):
        first = part * form.columns
        inner = upper[first:first + form.columns, first:first + form.columns]
        _load(aim, wanted, first, form.columns, row, count)
        candidates = _ranges(aim, inner, form, steps, offsets)
        _cheap_losses(aim, inner, form, candidates, steps, offsets, losses)
        for lane in range(LANES):
            least[lane], liked[lane], less[lane] = losses[0, lane], steps[0, lane], -offsets[0, lane]
        for place in range(1, candidates):
            for lane in range(LANES):
                better = losses[place, lane] < least[lane]
                least[lane] = losses[place, lane] if better else least[lane]
                liked[lane] = steps[place, lane] if better else liked[lane]
                less[lane] = -offsets[place, lane] if better else less[lane]
        for lane in range(LANES):
            if form.minimum:
                most[lane] = liked[lane] if part == 0 or liked[lane] > most[lane] else most[lane]
                lowest[lane] = less[lane] if less[lane] > lowest[lane] else lowest[lane]
            else:
                most[lane] = liked[lane] if part == 0 or abs(liked[lane]) > abs(most[lane]) else most[lane]
    for lane in range(count):
        if form.minimum:
            step[block, row + lane] = _half(most[lane] / form.most)
            low[block, row + lane] = _half(lowest[lane] / form.most)
        else:
            step[block, row + lane] = _half(most[lane] / form.least)


@njit(error_model="numpy")
def _visit_tile(form, row, count, first, low, target, owed, more, upper, passing, keep, kept, values, codes, errors, left,
                step, lowest, scale, lows, block, part):                                # type: ignore[no-untyped-def]
    aim, here = _tile(), _tile()
    rest, held = _tile(), _tile()
    new, found = _tile(), _four()
    steps, offsets = _list(), _list()
    scales, less = _list(), _list()
    losses = _list()
    unit, minimum = _row(), _row()
    columns = form.columns
    _load(here, target, low, columns, row, count)
    _load(rest, owed, 0, columns, row, count)
    if kept:
        _load(held, keep, low, columns, row, count)
    if first > 0:
        _load(aim, more, 0, columns, row - first, count)
        for column in range(columns):
            for lane in range(LANES):
                aim[column, lane] = rest[column, lane] + aim[column, lane]
    else:
        for column in range(columns):
            for lane in range(LANES):
                aim[column, lane] = rest[column, lane]
    _solve_upper(upper, aim, columns)
    for column in range(columns):
        for lane in range(LANES):
            aim[column, lane] = here[column, lane] + aim[column, lane]
    _numbers(form, step, lowest, block, row, count, unit, minimum)
    candidates = _ranges(aim, upper, form, steps, offsets)
    _stored(form, candidates, steps, offsets, scales, less, unit, minimum)
    _cheap_losses(aim, upper, form, candidates, steps, offsets, losses)
    _best(aim, upper, passing, form, candidates, steps, offsets, scales, less, losses, held, kept, 0, found, new)
    _store(codes, low, columns, row, count, new)
    _valued(new, found, form, held, kept, aim)
    _store(values, low, columns, row, count, aim)
    for column in range(columns):
        for lane in range(LANES):
            here[column, lane] = here[column, lane] - aim[column, lane]
    _store(errors, low, columns, row, count, here)
    for column in range(columns):
        for other in range(column, columns):
            _add(rest, column, upper[column, other], here, other)
    _store(left, 0, columns, row, count, rest)
    for lane in range(count):
        scale[part, row + lane], lows[part, row + lane] = found[2, lane], found[3, lane]
        if not form.several:
            step[part, row + lane], lowest[part, row + lane] = found[0, lane], found[1, lane]


@_exact
def _neighbours(form, row, count, block, part, step, lowest, scale, lows, unit, less, steps, offsets, scales, minima
                ):                                                                      # type: ignore[no-untyped-def]
    """Write the current scales of a part and those with neighbouring integers, and return their number."""
    for lane in range(LANES):
        steps[0, lane], offsets[0, lane], scales[0, lane], minima[0, lane] = _ZERO, _ZERO, _ONE, _ZERO
    for lane in range(count):
        scales[0, lane], minima[0, lane] = scale[part, row + lane], lows[part, row + lane]
    if not form.several:
        for lane in range(count):
            steps[0, lane], offsets[0, lane] = step[block, row + lane], lowest[block, row + lane]
        return 1
    near = 5 if form.minimum else 3
    for place in range(near - 1, -1, -1):
        more = _ONE if place == 1 else -_ONE if place == 2 else _ZERO
        below = _ONE if place == 3 else -_ONE if place == 4 else _ZERO
        for lane in range(LANES):
            scales[place, lane] = _nearest(scales[0, lane] + more, form.least, form.most)
            minima[place, lane] = _nearest(minima[0, lane] + below, form.least, form.most)
            steps[place, lane], offsets[place, lane] = unit[lane] * scales[place, lane], -(less[lane] * minima[place, lane])
    return near


@njit(error_model="numpy")
def _propose_tile(form, row, count, first, low, pull, upper, passing, metric, keep, kept, values, codes, step, lowest,
                  scale, lows, block, part, new_codes, new_scales, change, rises):      # type: ignore[no-untyped-def]
    aim, before = _tile(), _tile()
    pulled, held = _tile(), _tile()
    new, value = _tile(), _tile()
    error, moved = _tile(), _tile()
    found, gain = _four(), _row()
    steps, offsets = _list(), _list()
    scales, less = _list(), _list()
    losses = _list()
    unit, minimum = _row(), _row()
    columns = form.columns
    _load(before, values, low, columns, row, count)
    _load(pulled, pull, 0, columns, row - first, count)
    if kept:
        _load(held, keep, low, columns, row, count)
    for column in range(columns):
        for lane in range(LANES):
            aim[column, lane] = pulled[column, lane]
    _solve_lower(upper, aim, columns)
    _solve_upper(upper, aim, columns)
    for column in range(columns):
        for lane in range(LANES):
            aim[column, lane] = before[column, lane] + aim[column, lane]
    _numbers(form, step, lowest, block, row, count, unit, minimum)
    near = _neighbours(form, row, count, block, part, step, lowest, scale, lows, unit, minimum, steps, offsets, scales, less)
    candidates = _ranges(aim, upper, form, steps[near:], offsets[near:])
    _stored(form, candidates, steps[near:], offsets[near:], scales[near:], less[near:], unit, minimum)
    _cheap_losses(aim, upper, form, candidates, steps[near:], offsets[near:], losses[near:])
    _best(aim, upper, passing, form, near + candidates, steps, offsets, scales, less, losses, held, kept, near, found, new)
    _valued(new, found, form, held, kept, value)
    _descended(aim, metric, form, found, held, kept, new, value)
    for column in range(columns):
        for lane in range(LANES):
            error[column, lane] = aim[column, lane] - before[column, lane]
    _product(moved, metric, error, columns)
    for lane in range(LANES):
        gain[lane] = _ZERO
    for column in range(columns):
        for lane in range(LANES):
            gain[lane] += moved[column, lane] * error[column, lane]
            error[column, lane] = aim[column, lane] - value[column, lane]
    _product(moved, metric, error, columns)
    for lane in range(LANES):
        unit[lane] = _ZERO
    for column in range(columns):
        for lane in range(LANES):
            unit[lane] += moved[column, lane] * error[column, lane]
    for lane in range(LANES):
        gain[lane] -= unit[lane]
    _load(error, codes, low, columns, row, count)
    for column in range(columns):
        for lane in range(LANES):
            better = gain[lane] > _ZERO
            new[column, lane] = new[column, lane] if better else error[column, lane]
            value[column, lane] = value[column, lane] - before[column, lane] if better else _ZERO
    for lane in range(LANES):
        better = gain[lane] > _ZERO
        found[0, lane] = found[0, lane] if better else steps[0, lane]
        found[1, lane] = found[1, lane] if better else offsets[0, lane]
        found[2, lane] = found[2, lane] if better else scales[0, lane]
        found[3, lane] = found[3, lane] if better else less[0, lane]
    _product(moved, metric, value, columns)
    for column in range(columns):
        for lane in range(LANES):
            moved[column, lane] -= (pulled[column, lane] + pulled[column, lane])
    _store(new_codes, 0, columns, row - first, count, new)
    _store(new_scales, 0, 4, row - first, count, found)
    _store(change, 0, columns, row, count, value)
    _store(rises, 0, columns, row - first, count, moved)


@njit(error_model="numpy")
def _settle_tile(form, row, count, first, low, metric, values, codes, step, lowest, scale, lows, part, new_codes,
                 new_scales, change, pulls, place):                                     # type: ignore[no-untyped-def]
    value, moved = _tile(), _tile()
    old = _tile()
    columns = form.columns
    _load(value, new_codes, 0, columns, row - first, count)
    _store(codes, low, columns, row, count, value)
    _load(value, change, 0, columns, row, count)
    _load(old, values, low, columns, row, count)
    _product(moved, metric, value, columns)
    for column in range(columns):
        for lane in range(LANES):
            value[column, lane] += old[column, lane]
    _store(values, low, columns, row, count, value)
    _load(old, pulls, place, columns, row, count)
    for column in range(columns):
        for lane in range(LANES):
            old[column, lane] -= moved[column, lane]
    _store(pulls, place, columns, row, count, old)
    for lane in range(count):
        scale[part, row + lane], lows[part, row + lane] = new_scales[2, row - first + lane], new_scales[3, row - first + lane]
        if not form.several:
            step[part, row + lane] = new_scales[0, row - first + lane]
            lowest[part, row + lane] = new_scales[1, row - first + lane]


@njit(error_model="numpy")
def _shift_tile(row, count, first, numbers, block, low, columns, direction, moved, mixed, values
                ):                                                                      # type: ignore[no-untyped-def]
    power, pull = _row(), _row()
    for lane in range(LANES):
        power[lane], pull[lane] = _ZERO, _ZERO
    for column in range(columns):
        for lane in range(count):
            along = direction[column, row - first + lane]
            power[lane] += along * moved[column, row - first + lane]
            pull[lane] += along * mixed[column, row - first + lane]
    for lane in range(count):
        number = numbers[block, row + lane]
        step = pull[lane] / max(power[lane], _TINY) if power[lane] > _ZERO else _ZERO
        shift = _half(number + step) - number
        shift = shift if shift * (shift * power[lane] - (pull[lane] + pull[lane])) < _ZERO else _ZERO
        numbers[block, row + lane] = number + shift
        power[lane] = shift
    for column in range(columns):
        for lane in range(count):
            values[low + column, row + lane] += power[lane] * direction[column, row - first + lane]
            moved[column, row - first + lane] *= power[lane]


# -- rows on several threads ------------------------------------------------------------------------------------------


@_over_rows
def choose(form, rows, columns, wanted, upper, step, low, block):                       # type: ignore[no-untyped-def]
    """Choose the 16-bit numbers of a block for all rows from the best scales of its parts.

    wanted (columns, rows): what the block is rounded towards; upper (columns, columns): R of its metric; writes row `block`
    of step and low (blocks, rows).
    """
    for tile in prange((rows + LANES - 1) // LANES):
        row = tile * LANES
        _choose_tile(form, row, min(LANES, rows - row), columns, wanted, upper, step, low, block)


@_over_rows
def visit(form, first, last, low, target, owed, more, upper, passing, keep, kept, values, codes, errors, left, step,
          lowest, scale, lows, block, part):                                            # type: ignore[no-untyped-def]
    """Round a part of rows `first` to `last` for the first time.

    The part starts at column `low` of target, keep, values, codes and errors (d_in, rows). owed (columns, rows) is what
    earlier columns leave to it, more (columns, last − first) what earlier rows leave (unused where `first` is 0); upper and
    passing (columns, columns): R of its metric, and its columns divided by the diagonal. Writes the part's rows of values,
    codes, errors and left (columns, rows), and its scales.
    """
    for tile in prange((last - first + LANES - 1) // LANES):
        row = first + tile * LANES
        _visit_tile(form, row, min(LANES, last - row), first, low, target, owed, more, upper, passing, keep, kept, values,
                    codes, errors, left, step, lowest, scale, lows, block, part)


@_over_rows
def propose(form, first, last, low, pull, upper, passing, metric, keep, kept, values, codes, step, lowest, scale, lows,
            block, part, new_codes, new_scales, change, rises):                         # type: ignore[no-untyped-def]
    """Find codes and scales of a part that lower the error of each of rows `first` to `last` with all others fixed.

    pull (columns, last − first): Rᵀ · residual at the part's columns, with other rows mixed in. Writes the proposal:
    new_codes and rises = metric · change − 2 pull (columns, last − first), new_scales (4, last − first), and columns
    `first` to `last` of change (columns, rows); they say what stands where nothing is better.
    """
    for tile in prange((last - first + LANES - 1) // LANES):
        row = first + tile * LANES
        _propose_tile(form, row, min(LANES, last - row), first, low, pull, upper, passing, metric, keep, kept, values, codes,
                      step, lowest, scale, lows, block, part, new_codes, new_scales, change, rises)


@_over_rows
def settle(form, first, last, low, metric, values, codes, step, lowest, scale, lows, part, new_codes, new_scales, change,
           pulls, place):                                                               # type: ignore[no-untyped-def]
    """Carry out what `propose` wrote; rows `place` and following of pulls (·, rows) lose metric · change."""
    for tile in prange((last - first + LANES - 1) // LANES):
        row = first + tile * LANES
        _settle_tile(form, row, min(LANES, last - row), first, low, metric, values, codes, step, lowest, scale, lows, part,
                     new_codes, new_scales, change, pulls, place)


@_over_rows
def shift(first, last, numbers, block, low, columns, direction, moved, mixed, values
          ):                                                                            # type: ignore[no-untyped-def]
    """Set a 16-bit number of a block where the error of each row is smallest with everything else fixed.

    numbers (blocks, rows); direction (columns, last − first): the change of the block's values with its number; moved: metric
    · direction; mixed: Rᵀ · residual, with other rows mixed in. Values change, and `moved` becomes metric · change.
    """
    for tile in prange((last - first + LANES - 1) // LANES):
        row = first + tile * LANES
        _shift_tile(row, min(LANES, last - row), first, numbers, block, low, columns, direction, moved, mixed,
                    values)
