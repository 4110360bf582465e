"""Triton kernels of :mod:`models.language_model.gpu_decode`, which has the letters and the order of the launches.

A program multiplies ROWS rows of a matrix. With one row of activations (ONE) it walks over PIECEs of the columns, all
loads in flight; with more it holds the rows as one tile in registers, and meets each row of activations in turn. Values
between the kernels have the dtype of the model's weights, sums are float32, int8 weights are widened in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.selective_scan.kernels_triton import _softplus


@triton.jit
def _weights(W, row, column, here, COLUMNS: tl.constexpr):
    return tl.load(W + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=here, other=0)


@triton.jit
def _activations(x, norm, column, here, kind: tl.constexpr, NORM: tl.constexpr):
    """A piece of a row of activations in float32, times the norm's weight; and the piece's squares."""
    values = tl.load(x + column, mask=here, other=0.0)
    if NORM:
        values = values.to(kind).to(tl.float32)
        return values * tl.load(norm + column, mask=here, other=0.0).to(tl.float32), values * values
    values = values.to(tl.float32)
    return values, values


@triton.jit
def _one_product(
    W, x, norm, row, in_rows, kind: tl.constexpr,
    COLUMNS: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """W[row] · (x · norm), piece by piece of the columns, and the sum of the squares of x."""
    total = tl.zeros((ROWS, PIECE), tl.float32)
    squares = tl.zeros((PIECE,), tl.float32)
    for start in tl.static_range(0, COLUMNS, PIECE):
        column = start + tl.arange(0, PIECE)
        here = column < COLUMNS
        weights = _weights(W, row, column, in_rows[:, None] & here[None, :], COLUMNS)
        values, square = _activations(x, norm, column, here, kind, NORM)
        total += weights.to(tl.float32) * values[None, :]
        squares += square
    return tl.sum(total, axis=1), tl.sum(squares, axis=0)


@triton.jit
def enter_kernel(
    hidden,  # (B, D)
    norm,  # (D,)
    W, scale, bias,  # (2E, D), (2E,), (2E,)
    taps, conv_bias,  # (E, K), (E,)
    window,  # (B, E, K), shifted in place
    inner, gate,  # (B, E)
    batch, epsilon,
    D: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
    ONE: tl.constexpr, ROWS: tl.constexpr,
    PIECE: tl.constexpr,  # of the columns of one row of activations
    COLUMNS: tl.constexpr,  # D as a power of two
):  # fmt: skip
    """gate = z; x enters the window; inner = SiLU(convolution of x), for (x, z) = in_proj(RMSNorm(hidden))."""
    blocks = tl.cdiv(E, ROWS)
    block = tl.program_id(0) % blocks
    is_gate = tl.program_id(0) >= blocks
    e = block * ROWS + tl.arange(0, ROWS)
    in_e = e < E
    row = e + tl.where(is_gate, E, 0)
    kind = inner.dtype.element_ty
    if not ONE:
        column = tl.arange(0, COLUMNS)
        in_d = column < D
        weights = _weights(W, row, column, in_e[:, None] & in_d[None, :], D)
    for b in range(1 if ONE else batch):
        # The norm's factor is the same for all columns: the product need not wait for it.
        if ONE:
            value, squares = _one_product(W, hidden, norm, row, in_e, kind, D, PIECE, ROWS, True)
        else:
            normed, square = _activations(hidden + b * D, norm, column, in_d, kind, True)
            value, squares = tl.sum(weights.to(tl.float32) * normed[None, :], axis=1), tl.sum(square, axis=0)
        value *= 1.0 / tl.sqrt_rn(squares / D + epsilon)
        if HAS_SCALE:
            value *= tl.load(scale + row, mask=in_e, other=0.0)
        if HAS_BIAS:
            value += tl.load(bias + row, mask=in_e, other=0.0).to(tl.float32)
        place = b * E + e
        if is_gate:
            tl.store(gate + place, value.to(kind), mask=in_e)
        else:
            slots = window + place.to(tl.int64) * K
            x = value.to(window.dtype.element_ty)
            out = x.to(tl.float32) * tl.load(taps + e * K + K - 1, mask=in_e, other=0.0).to(tl.float32)
            for k in tl.static_range(K - 1):
                past = tl.load(slots + k + 1, mask=in_e, other=0.0).to(tl.float32)
                out += past * tl.load(taps + e * K + k, mask=in_e, other=0.0).to(tl.float32)
            if HAS_CONV_BIAS:
                out += tl.load(conv_bias + e, mask=in_e, other=0.0).to(tl.float32)
            tl.store(inner + place, (out * tl.sigmoid(out)).to(kind), mask=in_e)
            tl.debug_barrier()  # every lane has read its slots
            for k in tl.static_range(K - 1):
                tl.store(slots + k, tl.load(slots + k + 1, mask=in_e, other=0.0), mask=in_e)
            tl.store(slots + K - 1, x, mask=in_e)


@triton.jit
def rows_kernel(
    x,  # (B, I)
    W, scale, bias,  # (O, I), (O,), (O,)
    residual, out,  # (B, O)
    batch,
    I: tl.constexpr, O: tl.constexpr,  # noqa: E741
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, PIECE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = x · Wᵀ · scale + bias + residual."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_o = row < O
    if not ONE:
        column = tl.arange(0, COLUMNS)
        in_i = column < I
        weights = _weights(W, row, column, in_o[:, None] & in_i[None, :], I)
    for b in range(1 if ONE else batch):
        if ONE:
            value, _ = _one_product(W, x, x, row, in_o, tl.float32, I, PIECE, ROWS, False)
        else:
            values = tl.load(x + b * I + column, mask=in_i, other=0.0).to(tl.float32)
            value = tl.sum(weights.to(tl.float32) * values[None, :], axis=1)
        if HAS_SCALE:
            value *= tl.load(scale + row, mask=in_o, other=0.0)
        if HAS_BIAS:
            value += tl.load(bias + row, mask=in_o, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            value += tl.load(residual + b * O + row, mask=in_o, other=0.0).to(tl.float32)
        tl.store(out + b * O + row, value.to(out.dtype.element_ty), mask=in_o)


@triton.jit
def state_kernel(
    low,  # (B, R + 2N): Δ, B, C
    W, bias,  # (E, R), (E,)
    A_log, skip,  # (E, N), (E,)
    inner, gate, y,  # (B, E)
    state,  # (B, E, N), float32, overwritten
    batch,
    E: tl.constexpr, R: tl.constexpr, N: tl.constexpr, HAS_BIAS: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, RANK: tl.constexpr, STATES: tl.constexpr,  # RANK, STATES: R and N as powers of two
):  # fmt: skip
    """y = (<C, h> + D·x) · SiLU(z) of the next state h = e**(Δ·A) · h + Δ·B·x, which stays."""
    e = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r, n = tl.arange(0, RANK), tl.arange(0, STATES)
    in_e, in_r, in_n = e < E, r < R, n < N
    both = in_e[:, None] & in_n[None, :]
    weights = _weights(W, e, r, in_e[:, None] & in_r[None, :], R)
    rate = -tl.exp(tl.load(A_log + e[:, None] * N + n[None, :], mask=both, other=0.0).to(tl.float32))
    for b in range(1 if ONE else batch):
        place = (b * E + e).to(tl.int64)
        slots = state + place[:, None] * N + n[None, :]
        h = tl.load(slots, mask=both, other=0.0)
        line = low + b * (R + 2 * N)
        x = tl.load(inner + place, mask=in_e, other=0.0).to(tl.float32)
        z = tl.load(gate + place, mask=in_e, other=0.0).to(tl.float32)
        step = tl.sum(weights.to(tl.float32) * tl.load(line + r, mask=in_r, other=0.0).to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            step += tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)
        step = _softplus(step)
        B = tl.load(line + R + n, mask=in_n, other=0.0).to(tl.float32)
        C = tl.load(line + R + N + n, mask=in_n, other=0.0).to(tl.float32)
        h = h * tl.exp(step[:, None] * rate) + (step * x)[:, None] * B[None, :]
        tl.store(slots, h, mask=both)
        value = tl.sum(h * C[None, :], axis=1) + tl.load(skip + e, mask=in_e, other=0.0).to(tl.float32) * x
        tl.store(y + place, (value * z * tl.sigmoid(z)).to(y.dtype.element_ty), mask=in_e)
