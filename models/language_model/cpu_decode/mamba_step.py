"""One token through one block of Hugging Face's Mamba on a CPU, compiled as a whole: norm, mixer, residual.

    hidden [B, 1, D] → hidden [B, 1, D]; the cache's convolution inputs and recurrent state change in place

Letters: B rows, D width, E inner width, N state, K taps of the convolution, R rank of Δ. Four phases, each a product
with frozen weights and what can be done with its rows at once; in between, the threads wait for each other:

    0  in_proj rows      → x: convolution, SiLU;  z
    1  x_proj rows       → Δ (rank R), B, C
    2  dt_proj rows      → Δ: state update, + D·x, · SiLU(z) → y
    3  out_proj rows     → + residual

A kernel call per phase would cost as much as reading the weights of a small layer. Values between the phases are
float32. The reference is the block itself (``hf_patch``, ``MambaBlock.forward``). It computes what is not a frozen
layer in float32, bfloat16 or our int8: adapters, other quantisations, float16, another device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaBlock

from models.language_model.cpu_decode import gemv
from models.language_model.cpu_decode.frozen_linear import FrozenLinear, has_hooks
from models.language_model.cpu_decode.gemv import (
    ITEM,
    Array,
    array,
    meeting,
    portion,
    rows_product,
    vector,
    work,
)
from models.selective_scan.kernels_numba import (
    LANES,
    digest_of,
    exp2,
    load,
    narrow,
    sigmoid,
    softplus,
    splat,
    store,
    total,
    widen,
)

MOST_ROWS = 4
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
    inputs, steps = meeting(W, normed)
    for item in work(counters, 0, 2 * blocks, portion(2 * blocks, threads)):
        first = item % blocks * ITEM
        last = min(E, first + ITEM)
        shift = E if item >= blocks else 0
        rows_product(W, scale, shift + first, shift + last, inputs, steps, part, batch)
        for b in range(window.shape[0]):
            for e in range(first, last):
                part[b, e - first] += bias[shift + e]
                if shift:
                    gate[b, e] = part[b, e - first]
            if not shift:
                _convolve(conv, window[b], inner[b], part[b], first, last)


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
    inputs, steps = meeting(W, inner)
    for item in work(counters, 1, items, 1):
        first, last = item * FEW, min(outputs, (item + 1) * FEW)
        rows_product(W, scale, first, last, inputs, steps, part, batch)
        for b in range(inner.shape[0]):
            for r in range(first, last):
                value = part[b, r - first] + bias[r]
                if r < R:
                    low_rank[b, r] = narrow(low_rank, value)
                elif r < R + N:
                    B[b, r - R] = value
                else:
                    C[b, r - R - N] = value


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
    inputs, steps = meeting(W, low_rank)
    for item in work(counters, 2, items, portion(items, threads)):
        first, last = item * ITEM, min(E, (item + 1) * ITEM)
        rows_product(W, scale, first, last, inputs, steps, part, batch)
        for b in range(state.shape[0]):
            line, B_at, C_at = part[b], b * vectors, (len(batch) + b) * vectors
            for e in range(first, last):
                line[e - first] += bias[e]
            _soft(line)
            for e in range(first, last):
                x, step, own, at = widen(inner[b, e]), line[e - first], b * E + e, e * vectors
                if decay.shape[1] == N:
                    y = _advance(states, own * vectors, step, step * x, decays, at, flat_BC, B_at, C_at, vectors)
                else:
                    padded[0, :N] = flat[own * N : (own + 1) * N]
                    y = _advance(states, 0, step, step * x, decays, at, flat_BC, B_at, C_at, vectors)
                    flat[own * N : (own + 1) * N] = padded[0, :N]
                line[e - first] = y + skip[e] * x
            _open_gate(line, gate[b], ys[b], first, last)


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
    inputs, steps = meeting(W, ys)
    for item in work(counters, 3, items, portion(items, threads)):
        first, last = item * ITEM, min(D, (item + 1) * ITEM)
        rows_product(W, scale, first, last, inputs, steps, part, batch)
        for b in range(out.shape[0]):
            for d in range(first, last):
                out[b, d] = hidden[b, d] + (part[b, d - first] + bias[d])


def _compiled(sources: int) -> Callable[..., None]:
    """``sources`` is a part of the kernel for numba's cache alone."""

    @njit(nogil=True, cache=True)
    def block_kernel(
        hidden, norm, in_proj, conv, x_proj, dt_proj, ssm, out_proj, window, state, shared, BC, out, counters, threads,
        batch,
    ):  # fmt: skip
        """out (B, D) = hidden + mixer(norm(hidden)); every thread of the group calls it with the same arguments.

        norm: weight (D,), epsilon. in_proj, x_proj, dt_proj, out_proj: W, scale, bias. conv: taps (E, K), bias (E,).
        ssm: decay = -e**A_log · log2(e) (E, N padded to vectors), D (E,). window (B', E, K) and state (B', E, N) of the
        B' ≤ B real rows change in place. shared: scratch of the kinds that meet the weights: what normed (B, D)
        is like, inner (B, E), low_rank (B, R), ys (B, E); then gate (B, E) float32. BC: zeros (2, B, N padded).
        """
        sources  # noqa: B018
        like, inner, low_rank, ys, gate = shared
        weight, epsilon = norm
        normed, part = np.empty_like(like), np.zeros((len(batch), ITEM), np.float32)
        _normalise(hidden, weight, epsilon, normed)  # in every thread: quicker than waiting for one
        _read_in(normed, in_proj, conv, window, inner, gate, counters, threads, part, batch)
        _select(inner, x_proj, low_rank, BC[0], BC[1], state.shape[2], counters, threads, part, batch)
        _scan_step(low_rank, dt_proj, inner, state, ssm, BC, gate, ys, counters, threads, part, batch)
        _write_out(ys, out_proj, hidden, out, counters, threads, part, batch)

    return block_kernel


block_kernel = _compiled(digest_of(gemv.__file__))


@dataclass(frozen=True)
class StepPlan:
    """A block's frozen weights as the kernel takes them, and what must not have changed since.

    Large matrices are shared with the kernel; what is derived from small ones (A, widened biases) is a copy.
    """

    layers: tuple[FrozenLinear, ...]
    watched: tuple[tuple[dict[str, Tensor], str, Tensor, int, int], ...]  # where it hangs, the tensor, address, version
    weights: tuple[object, ...]
    projections: tuple[Array, ...]  # in_proj, x_proj, dt_proj, out_proj

    @classmethod
    def of(cls, block: MambaBlock) -> StepPlan:
        mixer, E = block.mixer, block.mixer.intermediate_size
        decay = -torch.exp(mixer.A_log.float()) * math.log2(math.e)
        padded = nn.functional.pad(decay, (0, -decay.shape[1] % LANES)).contiguous().numpy()
        weights = (
            (vector(block.norm.weight, 0, 1), np.float32(block.norm.variance_epsilon)),
            _projection(mixer.in_proj),
            (mixer.conv1d.weight[:, 0].float().contiguous().numpy(), vector(mixer.conv1d.bias, E, 0)),
            _projection(mixer.x_proj),
            _projection(mixer.dt_proj),
            (padded, vector(mixer.D, E, 1)),
            _projection(mixer.out_proj),
        )
        places = [
            (held, name) for part in block.modules() for held in (part._parameters, part._buffers) for name in held
        ]
        watched = [(held, name, t, t.data_ptr(), _version(t)) for held, name in places if (t := held[name]) is not None]
        return cls(_layers(mixer), tuple(watched), weights, tuple(weights[place][0] for place in (1, 3, 4, 6)))

    def holds(self, mixer: nn.Module) -> bool:
        """Whether the block still is what the plan was made from: nothing replaced, moved, or changed in place."""
        if any(one is not other or has_hooks(one) for one, other in zip(self.layers, _layers(mixer), strict=True)):
            return False
        for held, name, tensor, address, version in self.watched:
            if held[name] is not tensor or tensor.data_ptr() != address or _version(tensor) != version:
                return False
        return True

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copied block makes its own


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; a tensor made in inference mode does not tell."""
    return 0 if tensor.is_inference() else tensor._version


def _projection(layer: FrozenLinear) -> tuple[Array, Array, Array]:
    weight, scale = layer.stored()
    rows = weight.shape[0]
    return array(weight), vector(scale, rows, 1), vector(layer.bias, rows, 0)


def _layers(mixer: nn.Module) -> tuple[nn.Module, ...]:
    held = mixer._modules
    return held["in_proj"], held["x_proj"], held["dt_proj"], held["out_proj"]


def step(block: MambaBlock, hidden: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor | None:
    """One token per row, (B, 1, D) → (B, 1, D); None, and nothing changed, where the block has to do it itself.

    That is: no state to go on from, more than :data:`MOST_ROWS` rows, a mask, gradients, or layers of another kind.
    """
    if cache is None or mask is not None or hidden.shape[1] != 1 or hidden.shape[0] > MOST_ROWS:
        return None
    if hidden.device.type != "cpu" or torch.is_grad_enabled():
        return None
    mixer = block.mixer
    window, state = cache.get_conv_state(mixer.layer_idx), cache.get_recurrent_state(mixer.layer_idx)
    if window is None or state is None or window.shape[0] != hidden.shape[0] or has_hooks(mixer):
        return None
    kinds = window.dtype in (torch.float32, torch.bfloat16) and state.dtype is torch.float32
    plan = _plan(block, mixer) if kinds and window.is_contiguous() and state.is_contiguous() else None
    return None if plan is None else _run_block(block, plan, hidden, window, state)


def _plan(block: MambaBlock, mixer: nn.Module) -> StepPlan | None:
    plan: StepPlan | None = block.step_plan
    if plan is None or not plan.holds(mixer):
        ready = all(isinstance(layer, FrozenLinear) and layer.is_ready() for layer in _layers(mixer))
        plan = block.step_plan = StepPlan.of(block) if ready else None
    return plan


def _run_block(block: MambaBlock, plan: StepPlan, hidden: Tensor, window: Tensor, state: Tensor) -> Tensor:
    B, E, N = state.shape
    inputs = gemv.padded_rows(hidden[:, 0].float()).numpy()
    rows = len(inputs)
    out = np.empty((B, inputs.shape[1]), np.float32)
    # Spare rows are computed like the others: they must start as numbers.
    shared = (*(np.zeros((rows, W.shape[1]), W.dtype if W.itemsize > 1 else np.float32) for W in plan.projections),
              np.empty((rows, E), np.float32))  # fmt: skip
    BC = np.zeros((2, rows, -(-N // LANES) * LANES), np.float32)
    threads = gemv.threads_for(sum(weight.nbytes for weight in plan.projections))
    gemv.together(
        threads, block_kernel, inputs, *plan.weights, array(window), array(state), shared, BC, out,
        gemv.counters(PHASES), threads, (0,) * rows,
    )  # fmt: skip
    dtype = torch.float32 if block.residual_in_fp32 else hidden.dtype
    return torch.from_numpy(out)[:, None].to(dtype)
