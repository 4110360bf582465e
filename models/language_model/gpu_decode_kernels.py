"""Triton kernels of :mod:`models.language_model.gpu_decode`, which has the letters and the order of the launches.

A program holds ROWS rows of a matrix as a tile in registers, all its loads in flight at once, and multiplies it with
each row of activations in turn; ONE says that there is one, and the tile need not stay. Values between the kernels have
the dtype of the model's weights, sums are float32, and int8 weights are widened in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from models.selective_scan.kernels_triton import _softplus


@triton.jit
def _weights(W, row, column, here, COLUMNS: tl.constexpr):
    return tl.load(W + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=here, other=0)


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
    COLUMNS: tl.constexpr, TAPS: tl.constexpr,  # COLUMNS, TAPS: D and K as powers of two
):  # fmt: skip
    """gate = z; x enters the window; inner = SiLU(convolution of x), for (x, z) = in_proj(RMSNorm(hidden))."""
    blocks = tl.cdiv(E, ROWS)
    block = tl.program_id(0) % blocks
    is_gate = tl.program_id(0) >= blocks
    e = block * ROWS + tl.arange(0, ROWS)
    in_e = e < E
    row = e + tl.where(is_gate, E, 0)
    column = tl.arange(0, COLUMNS)
    in_d = column < D
    weights = _weights(W, row, column, in_e[:, None] & in_d[None, :], D)
    kind = inner.dtype.element_ty
    size = tl.load(norm + column, mask=in_d, other=0.0).to(tl.float32)
    for b in range(1 if ONE else batch):
        h = tl.load(hidden + b * D + column, mask=in_d, other=0.0).to(kind).to(tl.float32)
        # The norm's factor is the same for all columns: the product need not wait for it.
        value = tl.sum(weights.to(tl.float32) * (h * size)[None, :], axis=1)
        value *= 1.0 / tl.sqrt_rn(tl.sum(h * h, axis=0) / D + epsilon)
        if HAS_SCALE:
            value *= tl.load(scale + row, mask=in_e, other=0.0)
        if HAS_BIAS:
            value += tl.load(bias + row, mask=in_e, other=0.0).to(tl.float32)
        place = b * E + e
        if is_gate:
            tl.store(gate + place, value.to(kind), mask=in_e)
        else:
            k = tl.arange(0, TAPS)
            slots = window + place.to(tl.int64)[:, None] * K + k[None, :]
            present = (k < K)[None, :] & in_e[:, None]
            past = tl.load(slots + 1, mask=present & (k < K - 1)[None, :], other=0.0)
            new = tl.where((k == K - 1)[None, :], value.to(past.dtype)[:, None], past)
            tap = tl.load(taps + e[:, None] * K + k[None, :], mask=present, other=0.0)
            x = tl.sum(new.to(tl.float32) * tap.to(tl.float32), axis=1)
            if HAS_CONV_BIAS:
                x += tl.load(conv_bias + e, mask=in_e, other=0.0).to(tl.float32)
            tl.store(inner + place, (x * tl.sigmoid(x)).to(kind), mask=in_e)
            tl.debug_barrier()  # every lane has read its slots
            tl.store(slots, new, mask=present)


@triton.jit
def rows_kernel(
    x,  # (B, I)
    W, scale, bias,  # (O, I), (O,), (O,)
    residual, out,  # (B, O)
    batch,
    I: tl.constexpr, O: tl.constexpr,  # noqa: E741
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ONE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = x · Wᵀ · scale + bias + residual."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_o, in_i = row < O, column < I
    weights = _weights(W, row, column, in_o[:, None] & in_i[None, :], I)
    for b in range(1 if ONE else batch):
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
