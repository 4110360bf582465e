"""Few rows of activations times a frozen matrix on a CPU, at the speed of reading the matrix: kernels and threads.

    out[k, r] = scale[r] · Σ_i W[r, i] · x[k, i]    W (O, I): float32, int8 or bfloat16 (as uint16)

``x`` is float32, for a bfloat16 ``W`` bfloat16 too: half the first-level cache. One row of W at a time for one or two
rows of x: a single stream of memory per core is read fastest. More rows of x are bound by arithmetic, so several
rows of W share the loads of x. Weights are widened in registers; two bfloat16 come out of each 32-bit word; sums are
float32's.

An int8 ``W`` meets ``x`` rounded to at most 16 bits of its row's largest value, fewer in a row so long that a sum could
overflow (AVX2, 5120 columns: 2**-15.7; bfloat16 rounds to 2**-9 of each value). Pairs of products are summed exactly in
32 bits (vpmaddwd; LLVM makes VNNI's vpdpwssd of it where there is one): a third of the instructions of widening to
float32, which took longer than reading the weights. Where there is no vpmaddwd int8 is widened too.

Several threads run the same kernel and take items of work from a shared counter until none is left; a phase is over
when all its items are done. A thread that comes late finds nothing to do, so none ever waits for one that has not
started. A vector is one register of AVX-512, or one of AVX2, which has half as many, half as long: a tile's sums fit
them. Reference: ``torch.nn.functional.linear`` (int8: of the widened matrix, then times the scales).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

from models.selective_scan.backend_numba import array
from models.selective_scan.kernels_numba import CONTRACT, FLOAT, INT, digest_of, sum_lanes, target_features, widen

Array = np.ndarray

WIDE = target_features().get("avx512f", False)
# Int8 by pairs of 16-bit products.
HAS_PAIRS = target_features().get("avx512bw" if WIDE else "avx2", False)
# Rows up to which our kernels were faster than torch's own product (bfloat16: oneDNN with AVX-512 BF16) or gemm.py's.
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 4, torch.int8: 4 if HAS_PAIRS else 8}
LANES = 16 if WIDE else 8
VECTOR, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(INT, LANES)
PAIR = 2 * LANES  # bfloat16 values in one vector of 32-bit words
ITEM = 32  # rows of W in one item of work
TAKES = 8  # a thread takes its items in so many portions: an atomic operation interrupts the stream of memory
LEAST_BYTES = 2**20  # of weights that a further thread is worth
SLOT = 8  # int64 between two counters: a cache line of 64 bytes each
# Rows of W in a tile with one or two, four, and eight rows of x; independent sums of a tile.
ONE_ROW, FOUR, EIGHT = ((0,), (0, 0, 0, 0), (0, 0)) if WIDE else ((0,), (0, 0), (0,))
SUMS = 8 if WIDE else 4
SUM_PAIRS = {32: "llvm.x86.avx512.pmaddw.d.512", 16: "llvm.x86.avx2.pmadd.wd"}  # by the 16-bit numbers in a vector
SHORTS, BYTES = ir.VectorType(ir.IntType(16), PAIR), ir.VectorType(ir.IntType(8), PAIR)
LEVELS = 32767  # of 16 bits
LEAST_BITS = np.float32(1e-30).view(np.int32)  # of a row's largest value, at least

LONG = ir.IntType(64)


def _long(value: int) -> ir.Constant:
    return ir.Constant(LONG, value)


def address(context: Any, builder: ir.IRBuilder, array_type: types.Array, array: ir.Value, row: ir.Value) -> ir.Value:
    """Pointer to ``array[row, 0]``; C-contiguous."""
    proxy = cgutils.create_struct_proxy(array_type)(context, builder, value=array)
    columns = builder.extract_value(proxy.shape, 1)
    return builder.gep(proxy.data, [builder.mul(row, columns)])


def load(builder: ir.IRBuilder, pointer: ir.Value, vector: ir.VectorType, align: int) -> ir.Value:
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=align)


def _widened(builder: ir.IRBuilder, pointer: ir.Value, kind: str) -> list[ir.Value]:
    """LANES values as one vector, PAIR bfloat16 ones as two (even places, odd places), PAIR for pairs as one."""
    if kind == "float32":
        return [load(builder, pointer, VECTOR, 4)]
    if kind == "int16":
        return [load(builder, pointer, SHORTS, 2)]
    if kind == "pairs":
        return [builder.sext(load(builder, pointer, BYTES, 1), SHORTS)]
    if kind == "int8":
        small = load(builder, pointer, ir.VectorType(ir.IntType(8), LANES), 1)
        return [builder.sitofp(builder.sext(small, INTS), VECTOR)]
    words = load(builder, pointer, INTS, 2)
    even = builder.shl(words, ir.Constant(INTS, [16] * LANES))
    odd = builder.and_(words, ir.Constant(INTS, [0xFFFF0000] * LANES))
    return [builder.bitcast(even, VECTOR), builder.bitcast(odd, VECTOR)]


def add_product(builder: ir.IRBuilder, cell: ir.Value, weights: ir.Value, inputs: ir.Value) -> None:
    """Add weights · inputs to a vector of sums: float32, or two neighbours of 16 bits each to one of 32."""
    if inputs.type.element == FLOAT:
        product = builder.fmul(weights, inputs, flags=CONTRACT)
        builder.store(builder.fadd(builder.load(cell), product, flags=CONTRACT), cell)
    else:
        sums = builder.load(cell)
        kind = ir.FunctionType(sums.type, [inputs.type, inputs.type])
        pairs = cgutils.get_or_insert_function(builder.module, kind, SUM_PAIRS[inputs.type.count])
        builder.store(builder.add(sums, builder.call(pairs, [weights, inputs])), cell)


@intrinsic
def dot(typing_context, W, row, x, out, at, rows, batch):
    """out[k, at + r] = W[row + r] · x[k] over whole vectors; R and B are the lengths of ``rows`` and ``batch``."""
    R, B, kind, inputs_kind = rows.count, batch.count, str(W.dtype), str(x.dtype)
    exact = inputs_kind == "int16"
    step, vectors = (PAIR if kind == "uint16" or exact else LANES), (2 if kind == "uint16" else 1)
    unroll = {1: 8, 2: 4}.get(B, 2) // vectors
    chains = max(1, SUMS // (R * B))  # independent sums, so that one addition need not wait for the one before
    sums = INTS if exact else VECTOR

    def codegen(context, builder, signature, args):
        W_type, _, x_type, out_type, _, _, _ = signature.args
        weights = [address(context, builder, W_type, args[0], builder.add(args[1], _long(r))) for r in range(R)]
        inputs = [address(context, builder, x_type, args[2], _long(k)) for k in range(B)]
        zero = ir.Constant(sums, [0] * LANES)
        cells = [cgutils.alloca_once_value(builder, zero) for _ in range(R * B * chains)]
        parts = [[cells[(r * B + k) * chains :][:chains] for k in range(B)] for r in range(R)]

        def add(column: ir.Value, piece: int) -> None:
            name = "pairs" if exact else kind
            matrix = [_widened(builder, builder.gep(pointer, [column]), name) for pointer in weights]
            for k in range(B):
                for half, value in enumerate(_widened(builder, builder.gep(inputs[k], [column]), inputs_kind)):
                    for r in range(R):
                        add_product(builder, parts[r][k][(piece * vectors + half) % chains], matrix[r][half], value)

        columns = builder.extract_value(cgutils.create_struct_proxy(W_type)(context, builder, value=args[0]).shape, 1)
        unrolled, whole = builder.and_(columns, _long(-step * unroll)), builder.and_(columns, _long(-step))
        with cgutils.for_range_slice(builder, _long(0), unrolled, _long(step * unroll), LONG) as (start, _):
            for piece in range(unroll):
                add(builder.add(start, _long(piece * step)), piece)
        with cgutils.for_range_slice(builder, unrolled, whole, _long(step), LONG) as (start, _):
            add(start, 0)

        for k in range(B):
            target = builder.gep(address(context, builder, out_type, args[3], _long(k)), [args[4]])
            for r in range(R):
                total = builder.load(parts[r][k][0])
                for part in parts[r][k][1:]:
                    total = (builder.add if exact else builder.fadd)(total, builder.load(part))
                total = builder.sitofp(total, VECTOR) if exact else total
                builder.store(sum_lanes(builder, total), builder.gep(target, [_long(r)]))
        return context.get_dummy_value()

    return types.void(W, types.intp, x, out, types.intp, rows, batch), codegen


@intrinsic
def add_to(typing_context, counters, index, amount):
    """Add ``amount`` to counters[index] atomically; the value before."""

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
def work(counters, phase, items, count):
    """The items of a phase that fall to this thread, ``count`` taken at a time; ends when all threads' are done.

    counters: zeros (2 · phases · SLOT,): of each phase the items taken and the items done.
    """
    place, done = 2 * phase * SLOT, 0
    start = add_to(counters, place, count)
    while start < items:
        for item in range(start, min(items, start + count)):
            yield item
            done += 1
        start = add_to(counters, place, count)
    add_to(counters, place + SLOT, done)
    while value_now(counters, place + SLOT) < items:
        pass


@njit
def portion(items, threads):
    """How many items a thread takes at a time."""
    return max(1, items // (threads * TAKES))


@njit(cache=True)
def rounded(x, levels):
    """x (B, I) float32 → 16 bits and the size (B,) of a level; of a row with an infinity or NaN that is one too."""
    small, steps = np.empty(x.shape, np.int16), np.empty(len(x), np.float32)
    bits = x.view(np.int32)
    for b in range(len(x)):
        largest = np.int32(0)  # bits order as sizes do, NaN above infinity
        for i in range(x.shape[1]):
            largest = max(largest, bits[b, i] & np.int32(0x7FFFFFFF))
        size = max(largest, LEAST_BITS)
        steps[b] = np.int32(size).view(np.float32) / np.float32(levels)
        factor = np.float32(1.0) / steps[b]
        for i in range(x.shape[1]):
            small[b, i] = np.int16(np.rint(x[b, i] * factor))
    return small, steps


def meeting(W, x):
    """x (B, I) as W meets it, and a factor (B,) of the sums."""


@overload(meeting)
def _meeting(W, x):
    if W.dtype == types.int8 and HAS_PAIRS:  # few enough levels that no sum of 32 bits overflows
        return lambda W, x: rounded(x, min(LEVELS, (2**31 - 1) * LANES // (max(1, x.shape[1]) * 128)))
    return lambda W, x: (x, np.ones(len(x), np.float32))


@njit
def rows_product(W, scale, low, high, x, steps, out, batch):
    """out[k, r - low] for rows low..high of W; x (B, I) and steps (B,) by :func:`meeting`, out (B, ≥ high - low)."""
    row = low
    if len(batch) == 4:
        while row + len(FOUR) <= high:
            dot(W, row, x, out, row - low, FOUR, batch)
            row += len(FOUR)
    elif len(batch) == 8:
        while row + len(EIGHT) <= high:
            dot(W, row, x, out, row - low, EIGHT, batch)
            row += len(EIGHT)
    while row < high:
        dot(W, row, x, out, row - low, ONE_ROW, batch)
        row += 1
    columns = W.shape[1]
    step = PAIR if x.itemsize == 2 else LANES
    whole = columns // step * step
    for k in range(len(batch)):
        for r in range(high - low):
            total = out[k, r]
            for i in range(whole, columns):
                total += widen(W[low + r, i]) * widen(x[k, i])
            out[k, r] = total * steps[k] * scale[low + r]


def _compiled(sources: int) -> Callable[..., None]:
    """``sources`` is a part of the kernel for numba's cache alone."""

    @njit(nogil=True, cache=True)
    def product_kernel(W, scale, bias, x, out, counters, threads, batch):
        """out (B, O) = x (B, I) · Wᵀ · scale + bias; every thread of the group calls it with the same arguments."""
        sources  # noqa: B018
        rows = W.shape[0]
        B = len(batch)
        part = np.empty((B, ITEM), np.float32)
        items = (rows + ITEM - 1) // ITEM
        inputs, steps = meeting(W, x)
        for item in work(counters, 0, items, portion(items, threads)):
            low, high = item * ITEM, min(rows, (item + 1) * ITEM)
            rows_product(W, scale, low, high, inputs, steps, part, batch)
            for k in range(B):
                for r in range(high - low):
                    out[k, low + r] = part[k, r] + bias[low + r]

    return product_kernel


product_kernel = _compiled(digest_of())


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`product` is the way to compute x · weightᵀ: on a CPU, few rows, nothing to differentiate."""
    rows = x.numel() // weight.shape[1]
    return (
        weight.device.type == "cpu"
        and 0 < rows <= MOST_ROWS.get(weight.dtype, 0)
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype in (x.dtype, torch.int8)
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """x (…, I) · weightᵀ · scale + bias → (…, O) in the dtype of ``x``, summed in float32.

    Args:
        weight: (O, I), contiguous, on the CPU: float32, bfloat16 or int8. scale, bias: (O,).
    """
    rows = x.numel() // x.shape[-1]
    # What meets a bfloat16 matrix is bfloat16; everything else is widened.
    kind = torch.bfloat16 if weight.dtype is torch.bfloat16 else torch.float32
    inputs = array(padded_rows(x.reshape(rows, -1).to(kind)))
    out = np.empty((len(inputs), weight.shape[0]), np.float32)
    threads = threads_for(weight.nbytes)
    together(
        threads, product_kernel, array(weight), vector(scale, len(weight), 1), vector(bias, len(weight), 0), inputs,
        out, counters(1), threads, (0,) * len(inputs),
    )  # fmt: skip
    return torch.from_numpy(out[:rows]).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def padded_rows(x: Tensor) -> Tensor:
    """(B, I), contiguous, with B a size that is compiled: 1, 2, 4 or 8."""
    rows = 1 << (len(x) - 1).bit_length()
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x))) if rows > len(x) else x.contiguous()


def vector(tensor: Tensor | None, length: int, default: float) -> Array:
    return np.full(length, default, np.float32) if tensor is None else tensor.detach().float().contiguous().numpy()


def counters(phases: int) -> Array:
    return np.zeros(2 * phases * SLOT, np.int64)


_work: SimpleQueue = SimpleQueue()
_helpers: list[threading.Thread] = []


def threads_for(nbytes: int) -> int:
    """How many threads share the reading of a matrix, or of all of a block's: few for a small one. On two cores a block
    of 0.5 MB takes two threads as long as one, and 60 times as long where another program takes a core: a thread that
    has begun an item and waits for a core holds up the others at the end of each phase."""
    return max(1, min(torch.get_num_threads(), nbytes // LEAST_BYTES))


def together(threads: int, kernel: Callable[..., None], *args: object) -> None:
    """Run ``kernel(*args)`` here and in ``threads`` - 1 other threads; back when the work is done.

    The kernel itself ends only then. Threads that are late find nothing left, so nobody waits for them; an executor's
    futures would cost more than a small layer.
    """
    while len(_helpers) < threads - 1:
        _helpers.append(threading.Thread(target=_help, name=f"gemv-{len(_helpers)}", daemon=True))
        _helpers[-1].start()
    for _ in range(threads - 1):
        _work.put((kernel, args))
    kernel(*args)


def _help() -> None:
    while True:
        kernel, args = _work.get()
        kernel(*args)
        del kernel, args  # or the weights would live until the next call


def _start_anew() -> None:
    global _work
    _work = SimpleQueue()
    _helpers.clear()


# A forked child inherits the list of threads but not the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
