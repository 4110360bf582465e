"""Compiled pieces of decoding on CPU: few rows of activations times a frozen matrix, at the speed of reading it.

    out[k, r] = scale[r] · Σ_i W[r, i] · x[k, i]    W (O, I): float32, int8 or bfloat16 (as uint16); sums in float32

``x`` is float32, for a bfloat16 ``W`` bfloat16 too: half the first-level cache. One row of W at a time for one or two
rows of x: a single stream of memory per core is read fastest. More rows of x are bound by arithmetic, so four (two)
rows of W share the loads of x. Weights are widened in registers; two bfloat16 come out of each 32-bit word.

Several threads run the same kernel and take items of work from a shared counter until none is left; a phase is over
when all its items are done. A thread that comes late finds nothing to do, so none ever waits for one that has not
started. Vectors are those of ``scan_numba_kernels``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from models.selective_scan.kernels_numba import LANES

PAIR = 2 * LANES  # bfloat16 values in one vector of 32-bit words
ITEM = 32  # rows of W in one item of work
TAKES = 8  # a thread takes its share in so many portions: an atomic operation interrupts the stream of memory
SLOT = 8  # int64 between two counters: a cache line of 64 bytes each
ONE_ROW, TWO_ROWS, FOUR_ROWS = (0,), (0, 0), (0, 0, 0, 0)

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_CONTRACT = ("contract",)


def _long(value: int) -> ir.Constant:
    return ir.Constant(_LONG, value)


def _address(context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value, row: ir.Value) -> ir.Value:
    """Pointer to ``array[row, 0]``; C-contiguous."""
    proxy = cgutils.create_struct_proxy(array_type)(context, builder, value=array)
    columns = builder.extract_value(proxy.shape, 1)
    return builder.gep(proxy.data, [builder.mul(row, columns)])


def _load(builder: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType, align: int) -> ir.Value:
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=align)


def _widened(builder: ir.IRBuilder, pointer: ir.Value, kind: str) -> list[ir.Value]:
    """The next 16 values as one vector, or the next 32 bfloat16 ones as two: even places, odd places."""
    if kind == "float32":
        return [_load(builder, pointer, _VECTOR, 4)]
    if kind == "int8":
        small = _load(builder, pointer, ir.VectorType(ir.IntType(8), LANES), 1)
        return [builder.sitofp(builder.sext(small, _INTS), _VECTOR)]
    words = _load(builder, pointer, _INTS, 2)
    even = builder.shl(words, ir.Constant(_INTS, [16] * LANES))
    odd = builder.and_(words, ir.Constant(_INTS, [0xFFFF0000] * LANES))
    return [builder.bitcast(even, _VECTOR), builder.bitcast(odd, _VECTOR)]


@intrinsic
def dot(typing_context, W, row, x, out, at, rows, batch):
    """out[k, at + r] = W[row + r] · x[k] over whole vectors; R and B are the lengths of ``rows`` and ``batch``."""
    R, B, kind, inputs_kind = rows.count, batch.count, str(W.dtype), str(x.dtype)
    step = PAIR if kind == "uint16" else LANES
    unroll = {1: 8, 2: 4}.get(B, 2) * LANES // step
    chains = max(1, 8 // (R * B))  # independent sums, so that one addition need not wait for the one before

    def codegen(context, builder, signature, args):
        W_type, _, x_type, out_type, _, _, _ = signature.args
        weights = [_address(context, builder, W_type, args[0], builder.add(args[1], _long(r))) for r in range(R)]
        inputs = [_address(context, builder, x_type, args[2], _long(k)) for k in range(B)]
        zero = ir.Constant(_VECTOR, [0.0] * LANES)
        cells = [cgutils.alloca_once_value(builder, zero) for _ in range(R * B * chains)]
        parts = [[cells[(r * B + k) * chains :][:chains] for k in range(B)] for r in range(R)]

        def add(column: ir.Value, piece: int) -> None:
            vectors = [_widened(builder, builder.gep(pointer, [column]), kind) for pointer in weights]
            for k in range(B):
                for half, value in enumerate(_widened(builder, builder.gep(inputs[k], [column]), inputs_kind)):
                    for r in range(R):
                        part = parts[r][k][(piece * step // LANES + half) % chains]
                        product = builder.fmul(vectors[r][half], value, flags=_CONTRACT)
                        builder.store(builder.fadd(builder.load(part), product, flags=_CONTRACT), part)

        columns = builder.extract_value(cgutils.create_struct_proxy(W_type)(context, builder, value=args[0]).shape, 1)
        unrolled, whole = builder.and_(columns, _long(-step * unroll)), builder.and_(columns, _long(-step))
        with cgutils.for_range_slice(builder, _long(0), unrolled, _long(step * unroll), _LONG) as (start, _):
            for piece in range(unroll):
                add(builder.add(start, _long(piece * step)), piece)
        with cgutils.for_range_slice(builder, unrolled, whole, _long(step), _LONG) as (start, _):
            add(start, 0)

        reduce_type = ir.FunctionType(_FLOAT, [_FLOAT, _VECTOR])
        reduce = cgutils.get_or_insert_function(builder.module, reduce_type, f"llvm.vector.reduce.fadd.v{LANES}f32")
        for k in range(B):
            target = builder.gep(_address(context, builder, out_type, args[3], _long(k)), [args[4]])
            for r in range(R):
                total = builder.load(parts[r][k][0])
                for part in parts[r][k][1:]:
                    total = builder.fadd(total, builder.load(part))
                scalar = builder.call(reduce, [ir.Constant(_FLOAT, -0.0), total], fastmath=("reassoc",))
                builder.store(scalar, builder.gep(target, [_long(r)]))
        return context.get_dummy_value()

    return types.void(W, types.intp, x, out, types.intp, rows, batch), codegen


@intrinsic
def bits_to_float(typing_context, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.uint32), codegen


@intrinsic
def float_to_bits(typing_context, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], _INT)

    return types.uint32(types.float32), codegen


@intrinsic
def add_to(typing_context, counters, index, amount):
    """counters[index] as it was; then more by ``amount``, for all threads to see."""

    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "acq_rel")

    return types.int64(counters, types.intp, types.int64), codegen


@intrinsic
def value_now(typing_context, counters, index):
    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, value=args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "acquire", 8)

    return types.int64(counters, types.intp), codegen


@njit
def portion(items, threads):
    """How many items a thread takes at a time."""
    return max(1, items // (threads * TAKES))


@njit
def take(counters, phase, count):
    """The first of the next ``count`` items of a phase; counters (2 · phases · SLOT,)."""
    return add_to(counters, 2 * phase * SLOT, count)


@njit
def finish(counters, phase, done, items):
    """Report ``done`` items and wait until all are done."""
    place = (2 * phase + 1) * SLOT
    add_to(counters, place, done)
    while value_now(counters, place) < items:
        pass


def widen(value):
    """One weight as float32."""


@overload(widen)
def _widen(value):
    if value == types.uint16:
        return lambda value: bits_to_float(np.uint32(np.uint32(value) << np.uint32(16)))
    return lambda value: np.float32(value)


def narrow(like, value):
    """A float32 as an element of ``like``: itself, or rounded to bfloat16 as PyTorch does."""


@overload(narrow)
def _narrow(like, value):
    if like.dtype == types.float32:
        return lambda like, value: value

    def rounded(like, value):
        if np.isnan(value):
            return np.uint16(0x7FC0)
        bits = float_to_bits(value)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    return rounded


def inputs_for(W, rows):
    """An array (rows, I) of the kind that meets ``W``."""


@overload(inputs_for)
def _inputs_for(W, rows):
    if W.dtype == types.uint16:
        return lambda W, rows: np.empty((rows, W.shape[1]), np.uint16)
    return lambda W, rows: np.empty((rows, W.shape[1]), np.float32)


@njit
def rows_product(W, scale, low, high, x, out, batch):
    """out[k, r - low] for rows low..high of W; x (B, I), out (B, ≥ high - low)."""
    row = low
    if len(batch) == 4:
        while row + 4 <= high:
            dot(W, row, x, out, row - low, FOUR_ROWS, batch)
            row += 4
    elif len(batch) == 8:
        while row + 2 <= high:
            dot(W, row, x, out, row - low, TWO_ROWS, batch)
            row += 2
    while row < high:
        dot(W, row, x, out, row - low, ONE_ROW, batch)
        row += 1
    columns = W.shape[1]
    whole = columns // (PAIR if W.itemsize == 2 else LANES) * (PAIR if W.itemsize == 2 else LANES)
    for k in range(len(batch)):
        for r in range(high - low):
            total = out[k, r]
            for i in range(whole, columns):
                total += widen(W[low + r, i]) * widen(x[k, i])
            out[k, r] = total * scale[low + r]


@njit(nogil=True, cache=True)
def product_kernel(W, scale, bias, x, out, counters, threads, batch):
    """out (B, O) = x (B, I) · Wᵀ · scale + bias; every thread of the group calls it with the same arguments."""
    rows = W.shape[0]
    B = len(batch)
    part = np.empty((B, ITEM), np.float32)
    items = (rows + ITEM - 1) // ITEM
    count = portion(items, threads)
    done = 0
    start = take(counters, 0, count)
    while start < items:
        for item in range(start, min(items, start + count)):
            low, high = item * ITEM, min(rows, (item + 1) * ITEM)
            rows_product(W, scale, low, high, x, part, batch)
            for k in range(B):
                for r in range(high - low):
                    out[k, low + r] = part[k, r] + bias[low + r]
            done += 1
        start = take(counters, 0, count)
    finish(counters, 0, done, items)
