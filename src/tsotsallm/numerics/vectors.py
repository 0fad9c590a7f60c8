"""Vectors of LANES floats as a type of Numba's, so that compiled functions use vector registers whatever the optimiser does.

Compiled functions add, subtract, multiply and divide them, also by a float32; local arrays are pointers to them.
"""

from __future__ import annotations

import operator

import numba
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.typing.templates import ConcreteTemplate
from numba.extending import intrinsic, lower_builtin, register_model

LANES = 16

_FLOAT = ir.FloatType()
_VECTOR = ir.VectorType(_FLOAT, LANES)
_WHOLE = ir.VectorType(ir.IntType(32), LANES)


class _Lanes(types.Type):
    """LANES float32."""


class _Mask(types.Type):
    """LANES truth values."""


lanes, mask = _Lanes(name="Lanes"), _Mask(name="Mask")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VECTOR)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), LANES))


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [ir.Constant(_FLOAT, float(value))] * LANES)


def _spread(builder, value):
    """A scalar in every lane."""
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_WHOLE, [0] * LANES))


def _called(builder, name: str, *values):
    """A vector intrinsic of LLVM's."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * len(values)),
                                              f"llvm.{name}.v{LANES}f32")
    return builder.call(function, values)


def _register(operators, instruction):
    """Let an operator and its in-place form apply to vectors, and to a vector and a scalar."""
    pairs = [(lanes, lanes), (lanes, types.float32), (types.float32, lanes)]

    def lower(_context, builder, signature, values):
        spread = [value if kind is lanes else _spread(builder, value)
                  for kind, value in zip(signature.args, values, strict=True)]
        return getattr(builder, instruction)(*spread)

    for one in operators:
        cases = [lanes(*pair) for pair in pairs]
        template = type(f"Lanes_{one.__name__}", (ConcreteTemplate,), {"key": one, "cases": cases})
        numba.core.typing.templates.infer_global(one)(template)
        for pair in pairs:
            lower_builtin(one, *pair)(lower)


_register((operator.add, operator.iadd), "fadd")
_register((operator.sub, operator.isub), "fsub")
_register((operator.mul, operator.imul), "fmul")
_register((operator.truediv, operator.itruediv), "fdiv")


@intrinsic
def spread(_context, value):
    """A float32 in every lane."""
    return lanes(types.float32), lambda _context, builder, _signature, values: _spread(builder, values[0])


@intrinsic
def fused(_context, left, right, more):
    """left · right + more, rounded once where the processor can; `left` is a float32."""
    def lower(_context, builder, _signature, values):
        return _called(builder, "fmuladd", _spread(builder, values[0]), *values[1:])

    return lanes(types.float32, lanes, lanes), lower


@intrinsic
def less(_context, left, right):
    """Where left < right."""
    return mask(lanes, lanes), lambda _context, builder, _signature, values: builder.fcmp_ordered("<", *values)


@intrinsic
def where(_context, condition, yes, no):
    """`yes` where a condition holds, else `no`."""
    return lanes(mask, lanes, lanes), lambda _context, builder, _signature, values: builder.select(*values)


@intrinsic
def absolute(_context, value):
    """Absolute values."""
    return lanes(lanes), lambda _context, builder, _signature, values: _called(builder, "fabs", *values)


@intrinsic
def whole(_context, value):
    """Values rounded to integers, half to even."""
    return lanes(lanes), lambda _context, builder, _signature, values: _called(builder, "rint", *values)


def nearest_of(levels):
    """An intrinsic that gives the nearest of some rising levels, in each lane; of two equally near ones the higher."""
    def chosen(builder, value, low, high):
        if high - low == 1:
            return _constant(levels[low])
        middle = (low + high) // 2
        below = builder.fcmp_ordered("<", value, _constant((levels[middle - 1] + levels[middle]) / 2))
        return builder.select(below, chosen(builder, value, low, middle), chosen(builder, value, middle, high))

    @intrinsic
    def nearest(_context, value):
        return lanes(lanes), lambda _context, builder, _signature, values: chosen(builder, values[0], 0, len(levels))

    return nearest


@intrinsic
def inverse(_context, value):
    """1 / value, or 0 for 0."""
    def lower(_context, builder, _signature, values):
        zero = builder.fcmp_ordered("==", values[0], _constant(0))
        return builder.select(zero, _constant(0), builder.fdiv(_constant(1), values[0]))

    return lanes(lanes), lower


@intrinsic
def half(_context, value):
    """Values rounded to half precision: added to and taken from one whose last bit is that of the result."""
    def lower(_context, builder, _signature, values):
        bits = builder.and_(builder.bitcast(values[0], _WHOLE),
                            ir.Constant(_WHOLE, [ir.Constant(ir.IntType(32), 0x7F800000)] * LANES))
        large = builder.fmul(builder.bitcast(bits, _VECTOR), _constant(1.5 * 2 ** 13))
        small = _constant(1.5 * 2 ** -1)           # below, halves are multiples of 2**-24
        large = builder.select(builder.fcmp_ordered(">", large, small), large, small)
        near = builder.fsub(builder.fadd(values[0], large), large)
        for sign, sense in ((1, ">="), (-1, "<=")):
            near = builder.select(builder.fcmp_ordered(sense, values[0], _constant(sign * 65520)),
                                  _constant(sign * float("inf")), near)
        return near

    return lanes(lanes), lower


# -- memory -----------------------------------------------------------------------------------------------------------


@intrinsic(prefer_literal=True)
def local(_context, count):
    """So many vectors on the stack, which overlap nothing else."""
    size = count.literal_value

    def lower(_context, builder, _signature, _values):
        place = cgutils.alloca_once(builder, ir.ArrayType(_VECTOR, size))
        place.align = 4 * LANES
        return builder.bitcast(place, ir.PointerType(_VECTOR))

    return types.CPointer(lanes)(count), lower


def _place(context, builder, kind, array, row, column):
    """The address of a number of a contiguous matrix."""
    made = context.make_array(kind)(context, builder, array)
    _, columns = cgutils.unpack_tuple(builder, made.shape, 2)
    return builder.gep(made.data, [builder.add(builder.mul(row, columns), column)])


@intrinsic
def at(_context, array, row, column):
    """A number of a contiguous matrix, not checked."""
    def lower(context, builder, signature, values):
        return builder.load(_place(context, builder, signature.args[0], *values))

    return types.float32(array, types.intp, types.intp), lower


@intrinsic
def _load(_context, array, row, column):
    def lower(context, builder, signature, values):
        place = builder.bitcast(_place(context, builder, signature.args[0], *values), ir.PointerType(_VECTOR))
        return builder.load(place, align=4, typ=_VECTOR)

    return lanes(array, types.intp, types.intp), lower


@intrinsic
def _store(_context, array, row, column, value):
    def lower(context, builder, signature, values):
        place = builder.bitcast(_place(context, builder, signature.args[0], *values[:3]), ir.PointerType(_VECTOR))
        builder.store(values[3], place, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, lanes), lower


@intrinsic
def _insert(_context, vector, lane, value):
    return lanes(lanes, types.intp, types.float32), \
        lambda _context, builder, _signature, values: builder.insert_element(values[0], values[2], values[1])


@intrinsic
def _extract(_context, vector, lane):
    return types.float32(lanes, types.intp), \
        lambda _context, builder, _signature, values: builder.extract_element(*values)


@njit(forceinline=True)
def load(array, row, column, count):
    """array[row, column:column + count] of a contiguous matrix; further lanes are zero."""
    if count == LANES:
        return _load(array, row, column)
    value = spread(np.float32(0))
    for lane in range(count):
        value = _insert(value, lane, at(array, row, column + lane))
    return value


@njit(forceinline=True)
def store(array, row, column, count, value):
    """Write the first `count` lanes to array[row, column:column + count]."""
    if count == LANES:
        _store(array, row, column, value)
    else:
        for lane in range(count):
            array[row, column + lane] = _extract(value, lane)
