"""Compiled kernels of the selective scan on CPU, for ``scan_numba``.

Letters: B batch, E channels, L tokens, N state. A tile is CHUNK tokens × LANES channels, float32, flat.
A task is one sample × one block of LANES channels. The innermost loops run over lanes, so that the compiler makes
vector instructions of them for any N, E and strides, and a task's tiles stay in the first-level cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit

CHUNK = 64
LANES = 16
TILE = CHUNK * LANES
LOG2E = np.float32(1.4426950408889634)
LN2 = np.float32(0.6931471805599453)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)

# No assumption about NaN or infinity: a NaN that comes in must come out.
FAST = {"contract", "reassoc", "nsz"}

F1, F2, F3, F4 = "float32[:]", "float32[:,:]", "float32[:,:,:]", "float32[:,:,:,:]"


@njit(fastmath={"contract"})
def _exp2(x):
    """2**x, relative error 1e-7; written without calls or branches so that loops over it become vector code."""
    low, high = np.float32(-126.0), np.float32(127.5)
    clamped = low if x < low else x
    clamped = high if clamped > high else clamped
    k = np.int32(clamped + np.float32(127.5))  # nearest integer + 127: the exponent field
    k = np.int32(254) if k > np.int32(254) else k
    f = clamped - (np.float32(k) - np.float32(127.0))
    # (2**f - 1) / f on [-1/2, 1/2], interpolated at Chebyshev nodes; 2**0 is 1 exactly.
    p = np.float32(0.00015453162941980736)
    p = p * f + np.float32(0.0013390863364174759)
    p = p * f + np.float32(0.00961808255728395)
    p = p * f + np.float32(0.055503571142201544)
    p = p * f + np.float32(0.24022650760568132)
    p = p * f + np.float32(0.6931471880262287)
    p = p * f + ONE
    y = p * np.int32(k << np.int32(23)).view(np.float32)
    y = ZERO if x < low else y
    return np.float32(np.inf) if x > high else y


@njit(fastmath={"contract"})
def _softplus(x):
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|); above 20 the second term is below float32's resolution."""
    w = _exp2(-abs(x) * LOG2E)
    s = w / (w + np.float32(2.0))
    v = s * s
    # 2 artanh(s) / s on s**2 in [0, 1/9], interpolated at Chebyshev nodes.
    p = np.float32(0.28157778313522575)
    p = p * v + np.float32(0.2796515775679465)
    p = p * v + np.float32(0.4002459522981895)
    p = p * v + np.float32(0.6666632164140144)
    p = p * v + np.float32(2.000000007681758)
    return (x if x > ZERO else ZERO) + s * p


@njit(fastmath={"contract"})
def _sigmoid(x):
    return ONE / (ONE + _exp2(-x * LOG2E))


@njit
def _load(tile, source, e0, width, t0, steps, reverse):
    """Copy source[e0 + lane, t] to tile[step * LANES + lane], steps in the order of the walk; spare lanes zero."""
    length = source.shape[1]
    for lane in range(width, LANES):
        for i in range(steps):
            tile[i * LANES + lane] = ZERO
    for lane in range(width):
        row = source[e0 + lane]
        if reverse:
            for i in range(steps):
                tile[i * LANES + lane] = row[length - 1 - t0 - i]
        else:
            for i in range(steps):
                tile[i * LANES + lane] = row[t0 + i]


@njit
def _store(target, tile, e0, width, t0, steps, reverse):
    length = target.shape[1]
    for lane in range(width):
        row = target[e0 + lane]
        if reverse:
            for i in range(steps):
                row[length - 1 - t0 - i] = tile[i * LANES + lane]
        else:
            for i in range(steps):
                row[t0 + i] = tile[i * LANES + lane]


@njit(fastmath=FAST)
def _step_sizes(raw, step, bias, count, softplus):
    """raw += bias; step = softplus(raw) or raw."""
    for i in range(count // LANES):
        for lane in range(LANES):
            raw[i * LANES + lane] += bias[lane]
    if softplus:
        for i in range(count):
            step[i] = _softplus(raw[i])
    else:
        for i in range(count):
            step[i] = raw[i]


@njit(fastmath=FAST)
def _decays(decay, step, a, count):
    """decay = 2**(step · a), a per lane."""
    for i in range(count // LANES):
        for lane in range(LANES):
            decay[i * LANES + lane] = step[i * LANES + lane] * a[lane]
    for i in range(count):
        decay[i] = _exp2(decay[i])


@njit(fastmath=FAST)
def _recur(states, decay, drive, b, steps):
    """states[i + 1] = decay[i] · states[i] + drive[i] · b[i]."""
    for i in range(steps):
        row = i * LANES
        bt = b[i]
        for lane in range(LANES):
            states[row + LANES + lane] = decay[row + lane] * states[row + lane] + drive[row + lane] * bt


@njit(fastmath=FAST)
def _project(y, states, c, steps):
    """y[i] += c[i] · states[i + 1]."""
    for i in range(steps):
        row = i * LANES
        ct = c[i]
        for lane in range(LANES):
            y[row + lane] += ct * states[row + LANES + lane]


@njit(f"void({F3},{F3},{F2},{F3},{F3},{F1},{F3},{F1},{F3},{F3},{F3},{F4},i8,i8,b1,b1,b1,b1)",
      nogil=True, cache=True, fastmath=FAST)  # fmt: skip
def forward_kernel(
    u, delta, A, B, C, D, z, bias, y, first, last, entries, lo, hi, has_z, softplus, reverse, keep
):
    """Tasks lo..hi. B, C come in the order of the walk. entries: (tasks, chunks, N, LANES), filled if keep."""
    channels, length = u.shape[1], u.shape[2]
    states_n = A.shape[1]
    blocks = (channels + LANES - 1) // LANES
    a, h = np.zeros((states_n, LANES), np.float32), np.zeros((states_n, LANES), np.float32)
    d, shift = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
    ut, raw, step, out = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    gate, decay, states = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE + LANES, np.float32),
    )
    for task in range(lo, hi):
        sample, e0 = task // blocks, (task % blocks) * LANES
        width = min(LANES, channels - e0)
        a[:], h[:], d[:], shift[:] = ZERO, ZERO, ZERO, ZERO
        for lane in range(width):
            d[lane], shift[lane] = D[e0 + lane], bias[e0 + lane]
            for n in range(states_n):
                a[n, lane], h[n, lane] = A[e0 + lane, n] * LOG2E, first[sample, e0 + lane, n]
        for t0 in range(0, length, CHUNK):
            steps = min(CHUNK, length - t0)
            count = steps * LANES
            if keep:
                entries[task, t0 // CHUNK] = h
            _load(ut, u[sample], e0, width, t0, steps, reverse)
            _load(raw, delta[sample], e0, width, t0, steps, reverse)
            _step_sizes(raw, step, shift, count, softplus)
            for i in range(steps):
                for lane in range(LANES):
                    out[i * LANES + lane] = d[lane] * ut[i * LANES + lane]
            for i in range(count):
                ut[i] *= step[i]
            for n in range(states_n):
                _decays(decay, step, a[n], count)
                states[:LANES] = h[n]
                _recur(states, decay, ut, B[sample, n, t0:], steps)
                _project(out, states, C[sample, n, t0:], steps)
                h[n] = states[count : count + LANES]
            if has_z:
                _load(gate, z[sample], e0, width, t0, steps, reverse)
                for i in range(count):
                    out[i] *= gate[i] * _sigmoid(gate[i])
            _store(y[sample], out, e0, width, t0, steps, reverse)
        for lane in range(width):
            for n in range(states_n):
                last[sample, e0 + lane, n] = h[n, lane]


@njit(fastmath=FAST)
def _adjoint(g, carry, decay, dy, c, steps):
    """g[i] = dy[i] · c[i] + decay[i + 1] · g[i + 1], entered from and left to ``carry`` = decay · g of the later step."""
    for i in range(steps - 1, -1, -1):
        row = i * LANES
        ct = c[i]
        for lane in range(LANES):
            value = carry[lane] + dy[row + lane] * ct
            g[row + lane] = value
            carry[lane] = decay[row + lane] * value


@njit(fastmath=FAST)
def _sum_products(total, left, right, offset, steps):
    """total[i] += sum over lanes of left[i] · right[i + offset]."""
    for i in range(steps):
        s = ZERO
        for lane in range(LANES):
            s += left[i * LANES + lane] * right[(i + offset) * LANES + lane]
        total[i] += s


@njit(fastmath=FAST)
def _through_state(d_drive, d_step, d_a, g, decay, states, step, a, b, steps):
    """Carry the state's gradient g on to Δu (d_drive), to Δ by way of the decay (d_step) and to A (d_a)."""
    for i in range(steps):
        row = i * LANES
        bt = b[i]
        for lane in range(LANES):
            d_drive[row + lane] += g[row + lane] * bt
    for i in range(steps):
        row = i * LANES
        for lane in range(LANES):
            exponent = g[row + lane] * decay[row + lane] * states[row + lane]
            d_step[row + lane] += exponent * a[lane]
            d_a[lane] += exponent * step[row + lane]


@njit(f"void({F3},{F3},{F2},{F3},{F3},{F1},{F3},{F1},{F3},{F3},{F4},"
      f"{F3},{F3},{F3},{F2},{F3},{F2},{F3},{F3},i8,i8,b1,b1,b1)",
      nogil=True, cache=True, fastmath=FAST)  # fmt: skip
def backward_kernel(
    u, delta, A, B, C, D, z, bias, grad_y, carry, entries,
    grad_u, grad_delta, grad_A, grad_D, grad_z, grad_bias, grad_B, grad_C, lo, hi, has_z, softplus, reverse,
):  # fmt: skip
    """Tasks lo..hi. carry (B, E, N): in, the gradient of the last state; out, that of the initial state.

    grad_A (B, E, N), grad_D and grad_bias (B, E) are per sample; grad_B and grad_C (samples of this range, N, L),
    zeroed, take the sum over this range's channels.
    """
    channels, length = u.shape[1], u.shape[2]
    states_n = A.shape[1]
    blocks = (channels + LANES - 1) // LANES
    a, g_in, d_a = np.zeros((3, states_n, LANES), np.float32)
    d, shift, d_d, d_shift = np.zeros((4, LANES), np.float32)
    ut, raw, step, drive, gate, dy, out, decay, g, d_step, d_drive = np.empty((11, TILE), np.float32)
    states = np.empty(TILE + LANES, np.float32)
    for task in range(lo, hi):
        sample, e0 = task // blocks, (task % blocks) * LANES
        local = sample - lo // blocks
        width = min(LANES, channels - e0)
        a[:], g_in[:], d_a[:], d[:], shift[:], d_d[:], d_shift[:] = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        for lane in range(width):
            d[lane], shift[lane] = D[e0 + lane], bias[e0 + lane]
            for n in range(states_n):
                a[n, lane], g_in[n, lane] = A[e0 + lane, n], carry[sample, e0 + lane, n]
        for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
            steps = min(CHUNK, length - t0)
            count = steps * LANES
            _load(ut, u[sample], e0, width, t0, steps, reverse)
            _load(raw, delta[sample], e0, width, t0, steps, reverse)
            _load(dy, grad_y[sample], e0, width, t0, steps, reverse)
            _step_sizes(raw, step, shift, count, softplus)
            if has_z:
                _load(gate, z[sample], e0, width, t0, steps, reverse)
                for i in range(count):
                    s = _sigmoid(gate[i])
                    slope = s * (ONE + gate[i] * (ONE - s))
                    d_drive[i] = dy[i] * slope  # kept until y is known
                    dy[i] *= gate[i] * s
                    gate[i] = d_drive[i]
            for i in range(count):
                drive[i] = ut[i] * step[i]
                d_step[i] = ZERO
                d_drive[i] = ZERO
            for i in range(steps):
                for lane in range(LANES):
                    out[i * LANES + lane] = d[lane] * ut[i * LANES + lane]
            for n in range(states_n):
                b, c = B[sample, n, t0:], C[sample, n, t0:]
                _decays(decay, step, a[n] * LOG2E, count)
                states[:LANES] = entries[task, t0 // CHUNK, n]
                _recur(states, decay, drive, b, steps)
                if has_z:
                    _project(out, states, c, steps)
                _adjoint(g, g_in[n], decay, dy, c, steps)
                _sum_products(grad_C[local, n, t0:], dy, states, 1, steps)
                _sum_products(grad_B[local, n, t0:], drive, g, 0, steps)
                _through_state(d_drive, d_step, d_a[n], g, decay, states, step, a[n], b, steps)
            if has_z:
                for i in range(count):
                    gate[i] *= out[i]
                _store(grad_z[sample], gate, e0, width, t0, steps, reverse)
            for i in range(count):
                d_step[i] += d_drive[i] * ut[i]
            if softplus:
                for i in range(count):
                    d_step[i] *= _sigmoid(raw[i])
            for i in range(steps):
                for lane in range(LANES):
                    d_d[lane] += dy[i * LANES + lane] * ut[i * LANES + lane]
                    d_shift[lane] += d_step[i * LANES + lane]
                    d_drive[i * LANES + lane] = (
                        d_drive[i * LANES + lane] * step[i * LANES + lane] + dy[i * LANES + lane] * d[lane]
                    )
            _store(grad_delta[sample], d_step, e0, width, t0, steps, reverse)
            _store(grad_u[sample], d_drive, e0, width, t0, steps, reverse)
        for lane in range(width):
            grad_D[sample, e0 + lane], grad_bias[sample, e0 + lane] = d_d[lane], d_shift[lane]
            for n in range(states_n):
                carry[sample, e0 + lane, n], grad_A[sample, e0 + lane, n] = g_in[n, lane], d_a[n, lane]
