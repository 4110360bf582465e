"""One token through one block of Mamba on CPU, compiled as a whole: norm, mixer, residual.

Letters: B rows, D width, E inner width, N state, K taps of the convolution, R rank of Δ. Four phases, each a product
with frozen weights and what can be done with its rows at once; in between, the threads wait for each other:

    0  in_proj rows      → x: convolution, SiLU;  z
    1  x_proj rows       → Δ (rank R), B, C
    2  dt_proj rows      → Δ: state update, + D·x, · SiLU(z) → y
    3  out_proj rows     → + residual

A kernel call per phase would cost as much as reading the weights of a small layer. Values between the phases are
float32. The arithmetic is that of ``mamba_mixer`` and ``selective_scan.plain_state_update``.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from models.language_model.cpu_decode.gemv_kernels import (
    ITEM,
    finish,
    inputs_for,
    narrow,
    portion,
    rows_product,
    take,
    widen,
)
from models.selective_scan.kernels_numba import LANES, exp2, load, sigmoid, softplus, splat, store, total

PHASES = 4
TILES = ITEM // LANES
FEW = ITEM // 4  # rows of x_proj in one item: it has few, and every thread should get some
ZERO, ONE = np.float32(0.0), np.float32(1.0)


@njit
def _normalise(hidden, weight, epsilon, out):
    """out (B, D) = hidden / rms · weight."""
    D = hidden.shape[1]
    for b in range(hidden.shape[0]):
        squares = ZERO
        for i in range(D):
            squares += hidden[b, i] * hidden[b, i]
        factor = ONE / np.sqrt(squares / np.float32(D) + epsilon)
        for i in range(D):
            out[b, i] = narrow(out, hidden[b, i] * factor * weight[i])


@njit
def _read_in(normed, in_proj, conv, window, inner, gate, counters, threads, part, batch):
    """Phase 0: gate (B, E) = z; x enters window (B, E, K); inner (B, E) = SiLU(convolution)."""
    W, scale, bias = in_proj
    E = window.shape[1]
    blocks = (E + ITEM - 1) // ITEM
    count = portion(2 * blocks, threads)
    done = 0
    start = take(counters, 0, count)
    while start < 2 * blocks:
        for item in range(start, min(2 * blocks, start + count)):
            first = item % blocks * ITEM
            last = min(E, first + ITEM)
            shift = E if item >= blocks else 0
            rows_product(W, scale, shift + first, shift + last, normed, part, batch)
            for b in range(window.shape[0]):
                for e in range(first, last):
                    part[b, e - first] += bias[shift + e]
                    if shift:
                        gate[b, e] = part[b, e - first]
                if not shift:
                    _convolve(conv, window[b], inner[b], part[b], first, last)
            done += 1
        start = take(counters, 0, count)
    finish(counters, 0, done, 2 * blocks)


@njit
def _convolve(conv, window, inner, line, first, last):
    """Inputs ``line`` (ITEM,) of channels first..last enter window (E, K); inner (E,) = SiLU of the convolution."""
    taps, bias = conv
    K = taps.shape[1]
    for e in range(first, last):
        past = window[e]
        for k in range(K - 1):
            past[k] = past[k + 1]
        past[K - 1] = narrow(past, line[e - first])
        value = bias[e]
        for k in range(K):
            value += widen(past[k]) * taps[e, k]
        line[e - first] = value
    tiles = line.reshape(-1, LANES)
    for t in range(TILES):
        values = load(tiles, t)
        store(tiles, t, values * sigmoid(values))
    for e in range(first, last):
        inner[e] = narrow(inner, line[e - first])


@njit
def _select(inner, x_proj, low_rank, B, C, N, counters, threads, part, batch):
    """Phase 1: low_rank (B, R); B and C (B, N padded to vectors)."""
    W, scale, bias = x_proj
    outputs = W.shape[0]
    R = outputs - 2 * N
    items = (outputs + FEW - 1) // FEW
    done = 0
    item = take(counters, 1, 1)
    while item < items:
        first, last = item * FEW, min(outputs, (item + 1) * FEW)
        rows_product(W, scale, first, last, inner, part, batch)
        for b in range(inner.shape[0]):
            for r in range(first, last):
                value = part[b, r - first] + bias[r]
                if r < R:
                    low_rank[b, r] = narrow(low_rank, value)
                elif r < R + N:
                    B[b, r - R] = value
                else:
                    C[b, r - R - N] = value
        done += 1
        item = take(counters, 1, 1)
    finish(counters, 1, done, items)


@njit
def _advance(states, at, step, drive, decays, decay_at, BC, B_at, C_at, vectors):
    """h = 2**(Δ·decay) · h + Δ·x·B of one channel in place, and <C, h>; arrays are seen as rows of one vector."""
    y = splat(ZERO)
    for n in range(vectors):
        h = exp2(splat(step) * load(decays, decay_at + n)) * load(states, at + n)
        h = h + splat(drive) * load(BC, B_at + n)
        store(states, at + n, h)
        y = y + h * load(BC, C_at + n)
    return total(y)


@njit
def _scan_step(low_rank, dt_proj, inner, state, ssm, BC, gate, ys, counters, threads, part, batch):
    """Phase 2: Δ, the state (B, E, N) in place, ys (B, E) = (<C, h> + D·x) · SiLU(z)."""
    W, scale, bias = dt_proj
    decay, skip = ssm
    E, N = state.shape[1:]
    vectors = decay.shape[1] // LANES
    decays, flat_BC, flat = decay.reshape(-1, LANES), BC.reshape(-1, LANES), state.reshape(-1)
    padded = np.zeros((1, decay.shape[1]), np.float32)  # one state, where N is no whole number of vectors
    states = (flat if decay.shape[1] == N else padded[0]).reshape(-1, LANES)
    items = (E + ITEM - 1) // ITEM
    count = portion(items, threads)
    done = 0
    start = take(counters, 2, count)
    while start < items:
        for item in range(start, min(items, start + count)):
            first, last = item * ITEM, min(E, (item + 1) * ITEM)
            rows_product(W, scale, first, last, low_rank, part, batch)
            for b in range(state.shape[0]):
                line, B_at, C_at = part[b], b * vectors, (len(batch) + b) * vectors
                for e in range(first, last):
                    line[e - first] += bias[e]
                _soft(line)
                for e in range(first, last):
                    x, step, own = widen(inner[b, e]), line[e - first], b * E + e
                    if decay.shape[1] == N:
                        y = _advance(
                            states, own * vectors, step, step * x, decays, e * vectors, flat_BC, B_at, C_at, vectors
                        )
                    else:
                        padded[0, :N] = flat[own * N : (own + 1) * N]
                        y = _advance(states, 0, step, step * x, decays, e * vectors, flat_BC, B_at, C_at, vectors)
                        flat[own * N : (own + 1) * N] = padded[0, :N]
                    line[e - first] = y + skip[e] * x
                _open_gate(line, gate[b], ys[b], first, last)
            done += 1
        start = take(counters, 2, count)
    finish(counters, 2, done, items)


@njit
def _soft(line):
    tiles = line.reshape(-1, LANES)
    for t in range(TILES):
        store(tiles, t, softplus(load(tiles, t)))


@njit
def _open_gate(line, gate, ys, first, last):
    """ys[first:last] = line · SiLU(gate[first:last])."""
    tiles, opening = line.reshape(-1, LANES), np.zeros((1, LANES), np.float32)
    for t in range(TILES):
        for lane in range(min(LANES, last - first - t * LANES)):
            opening[0, lane] = gate[first + t * LANES + lane]
        z = load(opening, 0)
        store(tiles, t, load(tiles, t) * z * sigmoid(z))
    for e in range(first, last):
        ys[e] = narrow(ys, line[e - first])


@njit
def _write_out(ys, out_proj, hidden, out, counters, threads, part, batch):
    """Phase 3: out (B, D) = hidden + out_proj(y)."""
    W, scale, bias = out_proj
    D = W.shape[0]
    items = (D + ITEM - 1) // ITEM
    count = portion(items, threads)
    done = 0
    start = take(counters, 3, count)
    while start < items:
        for item in range(start, min(items, start + count)):
            first, last = item * ITEM, min(D, (item + 1) * ITEM)
            rows_product(W, scale, first, last, ys, part, batch)
            for b in range(out.shape[0]):
                for d in range(first, last):
                    out[b, d] = hidden[b, d] + (part[b, d - first] + bias[d])
            done += 1
        start = take(counters, 3, count)
    finish(counters, 3, done, items)


@njit(nogil=True, cache=True)
def block_kernel(
    hidden, norm, in_proj, conv, x_proj, dt_proj, ssm, out_proj, window, state, shared, BC, out, counters, threads,
    batch,
):  # fmt: skip
    """out (B, D) = hidden + mixer(norm(hidden)); every thread of the group calls it with the same arguments.

    norm: weight (D,), epsilon. in_proj, x_proj, dt_proj, out_proj: W, scale, bias. conv: taps (E, K), bias (E,).
    ssm: decay = -e**A_log · log2(e) (E, N padded to vectors), D (E,). window (B', E, K) and state (B', E, N) of the
    B' ≤ B real rows change in place. shared: scratch of the kinds that meet the weights, inner, ys (B, E) and
    low_rank (B, R), and gate (B, E) float32. BC: zeros (2, B, N padded).
    """
    inner, low_rank, ys, gate = shared
    weight, epsilon = norm
    normed, part = inputs_for(in_proj[0], len(batch)), np.zeros((len(batch), ITEM), np.float32)
    _normalise(hidden, weight, epsilon, normed)  # in every thread: quicker than waiting for one
    _read_in(normed, in_proj, conv, window, inner, gate, counters, threads, part, batch)
    _select(inner, x_proj, low_rank, BC[0], BC[1], state.shape[2], counters, threads, part, batch)
    _scan_step(low_rank, dt_proj, inner, state, ssm, BC, gate, ys, counters, threads, part, batch)
    _write_out(ys, out_proj, hidden, out, counters, threads, part, batch)
