"""Several rows of activations times a frozen matrix on a CPU, from the weights as they lie in memory.

    out[k, r] = scale[r] · Σ_i W[r, i] · x[k, i]    W (O, I): int8 with x as int16, or bfloat16 (as uint16) with float32

Int8: as in ``gemv.py``, x rounded to 16 bits and pairs of products summed exactly in 32: twice the rate of float32. A
span of columns is so short that no sum overflows; the spans are added in float32.

Bfloat16: weights are widened in registers. For up to :data:`MOST_ROWS` rows that is faster than widening a block in
memory for PyTorch's product.

Tiles of 3 rows of W and 4 rows of x fill the 16 vector registers of AVX2, of 6 and 4 those of AVX-512. The rows of x of
a tile stay in the first-level cache while a group of rows of W passes, which stays in the second-level cache while all
of x passes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from models.language_model.cpu_decode import gemv
from models.language_model.cpu_decode.gemv import (
    LEVELS,
    LONG,
    add_product,
    address,
    array,
    load,
    portion,
    rounded,
    vector,
    work,
)
from models.selective_scan.kernels_numba import FLOAT, digest_of, sum_lanes, target_features, widen, widened

GROUP = 48  # rows of W in one item of work
WIDE = gemv.WIDE and gemv.HAS_PAIRS
LANES = 16 if WIDE else 8  # 32-bit numbers in a vector
PAIR = 2 * LANES  # 16-bit ones
SPAN = 160 * PAIR  # columns: 160 · 2 · 32767 · 127 < 2**31
STEP = 2 * PAIR  # columns at a time
W_ROWS, X_ROWS = (0,) * (6 if WIDE else 3), (0, 0, 0, 0)
LAST_ROW = (0,)
FEWEST_ROWS = {torch.int8: gemv.MOST_ROWS[torch.int8] + 1, torch.bfloat16: 3}
MOST_ROWS = 128  # of bfloat16
_VECTOR, _INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(ir.IntType(32), LANES)
_SHORTS, _BYTES = ir.VectorType(ir.IntType(16), PAIR), ir.VectorType(ir.IntType(8), PAIR)
_HALVES = ir.VectorType(ir.IntType(16), LANES)

HAS_INT8 = target_features().get("avx2", False)
HAS_BFLOAT16 = HAS_INT8 and not gemv.WIDE  # measured with AVX2 alone


def applies(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`product` computes x (R, I) · weightᵀ fastest: enough rows, of bfloat16 not too many."""
    fewest = FEWEST_ROWS.get(weight.dtype)
    if fewest is None or x.device.type != "cpu" or len(x) < fewest or not weight.is_contiguous():
        return False
    if weight.dtype is torch.int8:
        return HAS_INT8 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return HAS_BFLOAT16 and x.dtype is weight.dtype and len(x) <= MOST_ROWS


def product(x: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """x (R, I) · weightᵀ · scale → (R, O) float32.

    Args:
        weight: (O, I), contiguous: int8 with ``scale`` (O,), or bfloat16.
    """
    rows, steps = len(x), None
    inputs = torch.nn.functional.pad(x.float(), (0, 0, 0, -rows % len(X_ROWS))).contiguous().numpy()
    if weight.dtype is torch.int8:
        inputs, steps = rounded(inputs, LEVELS)
    out = np.empty((len(inputs), len(weight)), np.float32)
    threads = gemv.threads_for(weight.nbytes * rows // FEWEST_ROWS[weight.dtype])  # as much work as reading so much
    gemv.together(
        threads, product_kernel, array(weight), vector(scale, len(weight), 1), inputs, out, gemv.counters(1),
        threads,
    )  # fmt: skip
    found = torch.from_numpy(out[:rows])
    return found if steps is None else found.mul_(torch.from_numpy(steps[:rows, None]))


@intrinsic
def tile(typing_context, W, row, x, x_row, out, at, first, last, rows, batch):
    """out[x_row + k, at + r] += W[row + r] · x[x_row + k] over columns first..last, a multiple of STEP."""
    R, B, exact = rows.count, batch.count, str(W.dtype) == "int8"

    def codegen(context, builder, signature, args):
        def pointers(place: int, start: int, count: int) -> list[ir.Value]:
            kind, places = (
                signature.args[place],
                [builder.add(args[start], ir.Constant(LONG, n)) for n in range(count)],
            )
            return [address(context, builder, kind, args[place], one) for one in places]

        weights, inputs, outputs = pointers(0, 1, R), pointers(2, 3, B), pointers(4, 3, B)
        sums = _INTS if exact else _VECTOR
        cells = [[cgutils.alloca_once(builder, sums) for _ in range(B)] for _ in range(R)]
        for cell in (cell for line in cells for cell in line):
            builder.store(ir.Constant(sums, [0] * LANES), cell)
        with cgutils.for_range_slice(builder, args[6], args[7], ir.Constant(LONG, STEP), LONG) as (column, _):
            for piece in range(0, STEP, PAIR if exact else LANES):
                here = builder.add(column, ir.Constant(LONG, piece))
                matrix = [_weights(builder, builder.gep(pointer, [here]), exact) for pointer in weights]
                for k in range(B):
                    value = load(builder, builder.gep(inputs[k], [here]), _SHORTS if exact else _VECTOR, 1)
                    for r in range(R):
                        add_product(builder, cells[r][k], matrix[r], value)
        for k in range(B):
            for r in range(R):
                total = builder.load(cells[r][k])
                total = builder.sitofp(total, _VECTOR) if exact else total
                target = builder.gep(outputs[k], [builder.add(args[5], ir.Constant(LONG, r))])
                builder.store(builder.fadd(builder.load(target), sum_lanes(builder, total)), target)
        return context.get_dummy_value()

    return types.void(W, types.intp, x, types.intp, out, types.intp, types.intp, types.intp, rows, batch), codegen


def _weights(builder: ir.IRBuilder, pointer: ir.Value, exact: bool) -> ir.Value:
    """The next PAIR int8 as int16, or the next LANES bfloat16 as float32."""
    if exact:
        return builder.sext(load(builder, pointer, _BYTES, 1), _SHORTS)
    return widened(builder, load(builder, pointer, _HALVES, 1))


def _compiled(sources: int, lanes: int) -> Callable[..., None]:
    """``sources`` and ``lanes`` are parts of the kernel for numba's cache alone."""

    @njit(nogil=True, cache=True)
    def product_kernel(W, scale, x, out, counters, threads):
        """out (B, O) = x (B, I) · Wᵀ · scale, B a multiple of len(X_ROWS); every thread of the group calls it."""
        sources, lanes  # noqa: B018
        rows, columns = W.shape
        batch, whole = x.shape[0], columns // STEP * STEP
        part = np.empty((batch, GROUP), np.float32)
        items = (rows + GROUP - 1) // GROUP
        for item in work(counters, 0, items, portion(items, threads)):
            low, high = item * GROUP, min(rows, (item + 1) * GROUP)
            part[:] = 0
            for first in range(0, whole, SPAN):
                last = min(whole, first + SPAN)
                for b in range(0, batch, len(X_ROWS)):
                    row = low
                    while row + len(W_ROWS) <= high:
                        tile(W, row, x, b, part, row - low, first, last, W_ROWS, X_ROWS)
                        row += len(W_ROWS)
                    while row < high:
                        tile(W, row, x, b, part, row - low, first, last, LAST_ROW, X_ROWS)
                        row += 1
            for b in range(batch):
                for r in range(high - low):
                    total = part[b, r]
                    for i in range(whole, columns):
                        total += widen(W[low + r, i]) * np.float32(x[b, i])
                    out[b, low + r] = total * scale[low + r]

    return product_kernel


product_kernel = _compiled(digest_of(gemv.__file__), LANES)
