"""Compiled kernels of the selective scan on CPU, for ``scan_numba``.

Letters: B batch, E channels, L tokens, N state. A tile is CHUNK tokens × LANES channels, (CHUNK, LANES) float32.
A task is one sample × one block of LANES channels; a vector holds one token (and one state index) of a block, so
that the recurrence runs in registers, for any N and E. A task's tiles stay in the first-level cache.
B and C come contiguous and in the order of the walk; everything else may have any strides.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from models.scan_numba_simd import LANES, LOG2E, exp2, load, sigmoid, softplus, splat, store, total

CHUNK = 32
ONE, ZERO = np.float32(1.0), np.float32(0.0)
# Rows between tiles: without them all tiles would start in the same cache set and evict each other.
PADDED = CHUNK + 1

F1, F2, F3 = "float32[:]", "float32[:,:]", "float32[:,:,:]"
C3, C4 = "float32[:,:,::1]", "float32[:,:,:,::1]"
NUMBERS = "i8,i8,b1,b1,b1"


@njit
def _load_tile(tile, source, e0, width, t0, steps, reverse):
    """tile[step, lane] = source[e0 + lane, token], steps in the order of the walk; zero in spare lanes."""
    first, direction = (source.shape[1] - 1 - t0, -1) if reverse else (t0, 1)
    if width < LANES:
        tile[:] = ZERO
    for lane in range(width):
        row = source[e0 + lane]
        for i in range(steps):
            tile[i, lane] = row[np.uint64(first + direction * i)]


@njit
def _store_tile(target, tile, e0, width, t0, steps, reverse):
    first, direction = (target.shape[1] - 1 - t0, -1) if reverse else (t0, 1)
    for lane in range(width):
        row = target[e0 + lane]
        for i in range(steps):
            row[np.uint64(first + direction * i)] = tile[i, lane]


@njit
def _open_gate(dy, gate, steps):
    """dy becomes dy · silu(gate); gate becomes dy · silu'(gate), which times y is the gate's gradient."""
    one = splat(ONE)
    for i in range(steps):
        grad, value = load(dy, i), load(gate, i)
        s = sigmoid(value)
        store(gate, i, grad * s * (one + value * (one - s)))
        store(dy, i, grad * value * s)


@njit
def _load_block(block, D, bias, A, e0, width):
    """Fill row 0 and 1 of ``block`` with D and bias, and the rows from 2 with A."""
    block[:] = ZERO
    for lane in range(width):
        block[0, lane], block[1, lane] = D[e0 + lane], bias[e0 + lane]
        for n in range(A.shape[1]):
            block[2 + n, lane] = A[e0 + lane, n]


@njit(
    f"void({F3},{F3},{F2},{C3},{C3},{F1},{F3},{F1},{F3},{F3},{C3},{C4},{NUMBERS},b1)",
    nogil=True, cache=True,
)  # fmt: skip
def forward_kernel(
    u, delta, A, B, C, D, z, bias, y, first, last, entries, low, high, has_z, has_softplus, reverse, keep
):
    """Tasks low..high of y and of the last state; if ``keep``, also entries (tasks, chunks, N, LANES)."""
    channels, length = u.shape[1], u.shape[2]
    states = A.shape[1]
    blocks = (channels + LANES - 1) // LANES
    constants, h = np.empty((2 + states, LANES), np.float32), np.empty((states, LANES), np.float32)
    tiles = np.zeros((4, PADDED, LANES), np.float32)
    step, drive, out, gate = tiles[0], tiles[1], tiles[2], tiles[3]
    for task in range(low, high):
        sample, e0 = task // blocks, (task % blocks) * LANES
        width = min(LANES, channels - e0)
        _load_block(constants, D, bias, A, e0, width)
        h[:] = ZERO
        for lane in range(width):
            h[:, lane] = first[sample, e0 + lane]
        skip, shift = load(constants, 0), load(constants, 1)
        for t0 in range(0, length, CHUNK):
            steps = min(CHUNK, length - t0)
            if keep:
                entries[task, t0 // CHUNK] = h
            _load_tile(drive, u[sample], e0, width, t0, steps, reverse)
            _load_tile(step, delta[sample], e0, width, t0, steps, reverse)
            for i in range(steps):
                dt, x = load(step, i) + shift, load(drive, i)
                if has_softplus:
                    dt = softplus(dt)
                store(step, i, dt)
                store(drive, i, dt * x)
                store(out, i, skip * x)
            for n in range(states):
                a, state = load(constants, 2 + n) * splat(LOG2E), load(h, n)
                b, c = B[sample, n, t0:], C[sample, n, t0:]
                for i in range(steps):
                    state = exp2(load(step, i) * a) * state + load(drive, i) * splat(b[i])
                    store(out, i, load(out, i) + state * splat(c[i]))
                store(h, n, state)
            if has_z:
                _load_tile(gate, z[sample], e0, width, t0, steps, reverse)
                for i in range(steps):
                    s = load(gate, i)
                    store(out, i, load(out, i) * s * sigmoid(s))
            _store_tile(y[sample], out, e0, width, t0, steps, reverse)
        for lane in range(width):
            last[sample, e0 + lane] = h[:, lane]


@njit(
    f"void({F3},{F3},{F2},{C3},{C3},{F1},{F3},{F1},{F3},{C3},{C4},"
    f"{F3},{F3},{C3},{F2},{F3},{F2},{C3},{C3},{NUMBERS})",
    nogil=True, cache=True,
)  # fmt: skip
def backward_kernel(
    u, delta, A, B, C, D, z, bias, grad_y, carry, entries,
    grad_u, grad_delta, grad_A, grad_D, grad_z, grad_bias, grad_B, grad_C, low, high, has_z, has_softplus, reverse,
):  # fmt: skip
    """Tasks low..high. carry (B, E, N): in, the gradient of the last state; out, that of the initial state.

    grad_A (B, E, N), grad_D and grad_bias (B, E) are per sample. grad_B and grad_C (samples of this range, N, L),
    in the order of the walk, must come zeroed and take the sums over this range's channels.
    """
    channels, length = u.shape[1], u.shape[2]
    states = A.shape[1]
    blocks = (channels + LANES - 1) // LANES
    constants, sums = np.empty((2, 2 + states, LANES), np.float32)  # D, bias, A and their gradients
    adjoint = np.empty((states, LANES), np.float32)
    tiles = np.zeros((11, PADDED, LANES), np.float32)
    x, raw, step, drive, gate, out = tiles[0], tiles[1], tiles[2], tiles[3], tiles[4], tiles[5]
    dy, decay, h, d_step, d_drive = tiles[6], tiles[7], tiles[8], tiles[9], tiles[10]
    for task in range(low, high):
        sample, e0 = task // blocks, (task % blocks) * LANES
        local = sample - low // blocks
        width = min(LANES, channels - e0)
        _load_block(constants, D, bias, A, e0, width)
        sums[:], adjoint[:] = ZERO, ZERO
        for lane in range(width):
            adjoint[:, lane] = carry[sample, e0 + lane]
        skip, shift = load(constants, 0), load(constants, 1)
        for t0 in range((length - 1) // CHUNK * CHUNK, -1, -CHUNK):
            steps = min(CHUNK, length - t0)
            _load_tile(x, u[sample], e0, width, t0, steps, reverse)
            _load_tile(raw, delta[sample], e0, width, t0, steps, reverse)
            _load_tile(dy, grad_y[sample], e0, width, t0, steps, reverse)
            if has_z:
                _load_tile(gate, z[sample], e0, width, t0, steps, reverse)
                _open_gate(dy, gate, steps)
            for i in range(steps):
                dt = load(raw, i) + shift
                store(raw, i, dt)
                if has_softplus:
                    dt = softplus(dt)
                store(step, i, dt)
                store(drive, i, dt * load(x, i))
                store(out, i, skip * load(x, i))
                store(d_step, i, splat(ZERO))
                store(d_drive, i, splat(ZERO))
            for n in range(states):
                a = load(constants, 2 + n)
                b, c = B[sample, n, t0:], C[sample, n, t0:]
                state = load(entries[task, t0 // CHUNK], n)
                store(h, 0, state)
                for i in range(steps):
                    factor = exp2(load(step, i) * a * splat(LOG2E))
                    state = factor * state + load(drive, i) * splat(b[i])
                    store(decay, i, factor)
                    store(h, i + 1, state)
                    if has_z:
                        store(out, i, load(out, i) + state * splat(c[i]))
                grad_b, grad_c = grad_B[local, n, t0:], grad_C[local, n, t0:]
                back, d_a = load(adjoint, n), load(sums, 2 + n)
                for i in range(steps - 1, -1, -1):
                    g = back + load(dy, i) * splat(c[i])  # gradient of the state after step i
                    back = load(decay, i) * g
                    exponent = back * load(h, i)  # gradient of Δ A
                    grad_c[i] += total(load(dy, i) * load(h, i + 1))
                    grad_b[i] += total(load(drive, i) * g)
                    store(d_drive, i, load(d_drive, i) + g * splat(b[i]))
                    store(d_step, i, load(d_step, i) + exponent * a)
                    d_a = d_a + exponent * load(step, i)
                store(adjoint, n, back)
                store(sums, 2 + n, d_a)
            for i in range(steps):
                slope = load(d_step, i) + load(d_drive, i) * load(x, i)
                if has_softplus:
                    slope = slope * sigmoid(load(raw, i))
                store(sums, 0, load(sums, 0) + load(dy, i) * load(x, i))
                store(sums, 1, load(sums, 1) + slope)
                store(d_step, i, slope)
                store(d_drive, i, load(d_drive, i) * load(step, i) + load(dy, i) * skip)
                store(gate, i, load(gate, i) * load(out, i))
            _store_tile(grad_delta[sample], d_step, e0, width, t0, steps, reverse)
            _store_tile(grad_u[sample], d_drive, e0, width, t0, steps, reverse)
            if has_z:
                _store_tile(grad_z[sample], gate, e0, width, t0, steps, reverse)
        for lane in range(width):
            grad_D[sample, e0 + lane], grad_bias[sample, e0 + lane] = sums[0, lane], sums[1, lane]
            grad_A[sample, e0 + lane] = sums[2:, lane]
            carry[sample, e0 + lane] = adjoint[:, lane]
