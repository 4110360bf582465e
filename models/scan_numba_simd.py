"""Sixteen float32 lanes as one value inside numba functions: the vocabulary of ``scan_numba_kernels``.

Numba's automatic vectorisation gives up where it cannot prove that arrays do not overlap, which is everywhere in
the scan. Here a vector is a value of its own, with + - * /, and LLVM lowers it to whatever the processor has
(one AVX-512 register, two AVX2, four SSE or NEON). Operations may be contracted to fused multiply-adds but assume
nothing about NaN or infinity: a NaN that comes in comes out.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
LOG2E = np.float32(1.4426950408889634)

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_CONTRACT = ("contract",)

# (2**f - 1) / f on [-1/2, 1/2], highest power first, interpolated at Chebyshev nodes; relative error of 2**f 5e-9.
_EXP2 = (
    0.00015453162941980736,
    0.0013390863364174759,
    0.00961808255728395,
    0.055503571142201544,
    0.24022650760568132,
    0.6931471880262287,
)
# 2 artanh(s) / s as a polynomial in s**2 on [0, 1/9], made alike; relative error of log1p 4e-9.
_LOG1P = (0.28157778313522575, 0.2796515775679465, 0.4002459522981895, 0.6666632164140144, 2.000000007681758)


class LanesType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


lanes = LanesType()


@register_model(LanesType)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: types.Type) -> None:
        super().__init__(manager, numba_type, _VECTOR)


def _constant(value: float) -> ir.Constant:
    # LLVM wants float constants exactly representable in the type.
    return ir.Constant(_VECTOR, [float(np.float32(value))] * LANES)


def _call(builder: ir.IRBuilder, name: str, *args: ir.Value) -> ir.Value:
    """Call an LLVM intrinsic on vectors."""
    function_type = ir.FunctionType(_VECTOR, [a.type for a in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, args)


def _row(
    context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value, row: ir.Value
) -> ir.Value:
    """Pointer to row ``row`` of a contiguous (rows, LANES) array."""
    data = cgutils.create_struct_proxy(array_type)(context, builder, value=array).data
    offset = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(data, [offset]), _VECTOR.as_pointer())


@intrinsic
def load(typing_context, tile, row):
    """tile[row], tile (rows, LANES) contiguous float32."""

    def codegen(context, builder, signature, args):
        return builder.load(_row(context, builder, signature.args[0], *args), align=4)

    return lanes(tile, types.intp), codegen


@intrinsic
def store(typing_context, tile, row, value):
    """tile[row] = value."""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _row(context, builder, signature.args[0], *args[:2]), align=4)
        return context.get_dummy_value()

    return types.void(tile, types.intp, lanes), codegen


@intrinsic
def splat(typing_context, value):
    """The float32 ``value`` in every lane."""

    def codegen(context, builder, signature, args):
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), args[0], ir.Constant(_INT, 0))
        return builder.shuffle_vector(
            first, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_INTS, [0] * LANES)
        )

    return lanes(types.float32), codegen


@intrinsic
def total(typing_context, value):
    """Sum over the lanes, float32."""

    def codegen(context, builder, signature, args):
        function_type = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        name = f"llvm.vector.reduce.fadd.v{LANES}f32"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return builder.call(function, [ir.Constant(_FLOAT, -0.0), args[0]], fastmath=("reassoc",))

    return types.float32(lanes), codegen


@intrinsic
def exp2(typing_context, value):
    """2**value, relative error 1e-7; 0 below -126 and infinity above 127.5."""

    def codegen(context, builder, signature, args):
        (x,) = args
        low, high = _constant(-126.0), _constant(127.5)
        too_low = builder.fcmp_ordered("<", x, low)
        too_high = builder.fcmp_ordered(">", x, high)
        clamped = builder.select(too_high, _constant(127.0), builder.select(too_low, low, x))
        # Nearest integer, at most 127: the largest exponent there is.
        whole = _call(builder, "floor", builder.fadd(clamped, _constant(0.5)))
        whole = builder.select(builder.fcmp_ordered(">", whole, _constant(127.0)), _constant(127.0), whole)
        f = builder.fsub(clamped, whole)
        p = _constant(_EXP2[0])
        for coefficient in (*_EXP2[1:], 1.0):
            p = _call(builder, "fmuladd", p, f, _constant(coefficient))
        bits = builder.add(builder.fptosi(whole, _INTS), ir.Constant(_INTS, [127] * LANES))
        power = builder.bitcast(builder.shl(bits, ir.Constant(_INTS, [23] * LANES)), _VECTOR)
        y = builder.fmul(p, power)
        y = builder.select(too_low, _constant(0.0), y)
        return builder.select(too_high, _constant(float("inf")), y)

    return lanes(lanes), codegen


@intrinsic
def magnitude(typing_context, value):
    """|value|."""

    def codegen(context, builder, signature, args):
        return _call(builder, "fabs", *args)

    return lanes(lanes), codegen


@intrinsic
def positive_part(typing_context, value):
    """max(value, 0), NaN kept."""

    def codegen(context, builder, signature, args):
        negative = builder.fcmp_ordered("<", args[0], _constant(0.0))
        return builder.select(negative, _constant(0.0), args[0])

    return lanes(lanes), codegen


def _define_operator(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    @intrinsic
    def apply(typing_context, left, right):
        def codegen(context, builder, signature, args):
            return getattr(builder, instruction)(*args, flags=_CONTRACT)

        return lanes(lanes, lanes), codegen

    @overload(symbol)
    def _(left, right):
        if left == lanes and right == lanes:
            return lambda left, right: apply(left, right)
        return None


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_operator(_symbol, _instruction)


@njit
def softplus(x):
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|); above 20 the second term is below float32's resolution."""
    w = exp2(magnitude(x) * splat(-LOG2E))
    s = w / (w + splat(np.float32(2.0)))
    v = s * s
    p = splat(np.float32(_LOG1P[0]))
    p = p * v + splat(np.float32(_LOG1P[1]))
    p = p * v + splat(np.float32(_LOG1P[2]))
    p = p * v + splat(np.float32(_LOG1P[3]))
    p = p * v + splat(np.float32(_LOG1P[4]))
    return positive_part(x) + s * p


@njit
def sigmoid(x):
    """1 / (1 + e**-x)."""
    one = splat(np.float32(1.0))
    return one / (one + exp2(x * splat(-LOG2E)))
