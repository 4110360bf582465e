"""One token through all blocks of Hugging Face's Mamba on a CPU, compiled as a whole: norm, mixer, residual of each.

    hidden [B, 1, D] → hidden [B, 1, D]; the cache's convolution inputs and recurrent states change in place

Letters: B rows, D width, E inner width, N state, K taps of the convolution, R rank of Δ. Four phases, each a product
with frozen weights and what can be done with its rows at once; in between, the threads wait for each other:

    0  in_proj rows      → x: convolution, SiLU;  z
    1  x_proj rows       → Δ (rank R), B, C
    2  dt_proj rows      → Δ: state update, + D·x, · SiLU(z) → y
    3  out_proj rows     → + residual

A kernel call per phase would cost as much as reading the weights of a small layer, one per block a seventh of a token
of Mamba-2.8B in int8. So the kernel has the first block's arrays, and the addresses of the others'. Values between the
phases are float32. The reference is the blocks themselves (``hf_patch``, ``MambaBlock.forward``). They compute where
any holds what is not a frozen layer in float32, bfloat16 or our int8: adapters, other quantisations, float16, hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numba import njit, typeof, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaModel

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


@njit
def _advance_block(
    hidden, norm, in_proj, conv, x_proj, dt_proj, ssm, out_proj, window, state, shared, BC, out, counters, threads,
    batch,
):  # fmt: skip
    """out (B, D) = hidden + mixer(norm(hidden)); every thread of the group calls it with the same arguments.

    norm: weight (D,), epsilon. in_proj, x_proj, dt_proj, out_proj: W, scale, bias. conv: taps (E, K), bias (E,).
    ssm: decay = -e**A_log · log2(e) (E, N padded to vectors), D (E,). window (B', E, K) and state (B', E, N) of the
    B' ≤ B real rows change in place. shared: scratch of the kinds that meet the weights: what normed (B, D)
    is like, inner (B, E), low_rank (B, R), ys (B, E); then gate (B, E) float32. BC: zeros (2, B, N padded).
    """
    like, inner, low_rank, ys, gate = shared
    weight, epsilon = norm
    normed, part = np.empty_like(like), np.zeros((len(batch), ITEM), np.float32)
    _normalise(hidden, weight, epsilon, normed)  # in every thread: quicker than waiting for one
    _read_in(normed, in_proj, conv, window, inner, gate, counters, threads, part, batch)
    _select(inner, x_proj, low_rank, BC[0], BC[1], state.shape[2], counters, threads, part, batch)
    _scan_step(low_rank, dt_proj, inner, state, ssm, BC, gate, ys, counters, threads, part, batch)
    _write_out(ys, out_proj, hidden, out, counters, threads, part, batch)


@intrinsic
def _at(typing_context, array, address):
    """An array like ``array`` that lies at ``address``."""

    def codegen(context, builder, signature, args):
        proxy = cgutils.create_struct_proxy(signature.args[0])
        other = proxy(context, builder, value=args[0])
        other.data = builder.inttoptr(args[1], other.data.type)
        other.meminfo = cgutils.get_null_value(other.meminfo.type)  # whoever calls the kernel keeps it alive
        other.parent = cgutils.get_null_value(other.parent.type)
        return other._getvalue()

    return array(array, types.int64), codegen


@njit
def _layer_at(layer, places):
    """A linear layer's W, scale and bias at three addresses."""
    W, scale, bias = layer
    return _at(W, places[0]), _at(scale, places[1]), _at(bias, places[2])


def _compiled(sources: int) -> Callable[..., None]:
    """``sources`` is a part of the kernel for numba's cache alone."""

    @njit(nogil=True, cache=True)
    def model_kernel(weights, places, hidden, shared, BC, counters, threads, batch):
        """hidden (2, B, D): the first is advanced by the first block to the second, that by the next to the first, …

        weights: of the first block, in the order of :func:`_advance_block`, its window and its state last. places
        (blocks, arrays): where each block has them. counters: of each block.
        """
        sources  # noqa: B018
        norm, in_proj, conv, x_proj, dt_proj, ssm, out_proj, window, state = weights
        for n in range(len(places)):
            p = places[n]
            _advance_block(
                hidden[n % 2], (_at(norm[0], p[0]), norm[1]), _layer_at(in_proj, p[1:]),
                (_at(conv[0], p[4]), _at(conv[1], p[5])), _layer_at(x_proj, p[6:]), _layer_at(dt_proj, p[9:]),
                (_at(ssm[0], p[12]), _at(ssm[1], p[13])), _layer_at(out_proj, p[14:]), _at(window, p[17]),
                _at(state, p[18]), shared, BC, hidden[(n + 1) % 2], counters[n], threads, batch,
            )  # fmt: skip

    return model_kernel


model_kernel = _compiled(digest_of(gemv.__file__))


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


@dataclass(frozen=True)
class ModelPlan:
    """The blocks' plans, the states of a cache, and the arrays of both as the kernel takes them."""

    blocks: tuple[StepPlan, ...]
    states: tuple[Tensor, ...]  # of each block the window and the state
    weights: tuple[object, ...]  # of the first block, and its states
    places: Array  # (blocks, arrays): addresses

    @classmethod
    def of(cls, blocks: tuple[StepPlan, ...], states: tuple[Tensor, ...]) -> ModelPlan | None:
        """None for blocks that are not alike."""
        arrays = [array(state) for state in states]
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        all_weights = [(*plan.weights, *pair) for plan, pair in zip(blocks, pairs, strict=True)]
        flat = [_arrays(weights) for weights in all_weights]
        kinds = {(str(typeof(weights)), weights[0][1], *(a.shape for a in own))
                 for weights, own in zip(all_weights, flat, strict=True)}  # fmt: skip
        places = np.array([[one.ctypes.data for one in own] for own in flat], np.int64)
        return cls(blocks, states, all_weights[0], places) if len(kinds) == 1 else None

    def holds(self, blocks: tuple[StepPlan, ...], states: tuple[Tensor, ...]) -> bool:
        same = all(a is b for a, b in zip(self.blocks + self.states, blocks + states, strict=True))
        return same and all(t.data_ptr() == p for t, p in zip(states, self.places[:, -2:].flat, strict=True))

    def run(self, *arguments: object) -> None:
        """The kernel. A thread that comes late, when the blocks are done, still holds what it reads."""
        model_kernel(self.weights, self.places, *arguments)

    def __deepcopy__(self, memo: dict) -> None:
        return None


def _arrays(nested: object) -> list[Array]:
    """The arrays of nested tuples, in order."""
    if isinstance(nested, tuple):
        return [array for part in nested for array in _arrays(part)]
    return [nested] if isinstance(nested, np.ndarray) else []


def step(model: MambaModel, hidden: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor | None:
    """One token per row through all blocks, (B, 1, D) → (B, 1, D); None, and nothing changed, where the blocks have to
    do it themselves.

    That is: no state to go on from, more than :data:`MOST_ROWS` rows, a mask, gradients, or layers of another kind.
    """
    if cache is None or mask is not None or hidden.shape[1] != 1 or hidden.shape[0] > MOST_ROWS:
        return None
    if hidden.device.type != "cpu" or torch.is_grad_enabled():
        return None
    plan = _model_plan(model, hidden, cache)
    return None if plan is None else _run_blocks(plan, hidden)


def _model_plan(model: MambaModel, hidden: Tensor, cache: Cache) -> ModelPlan | None:
    states: list[Tensor] = []
    for block in model.layers:
        layer = block.mixer.layer_idx
        window, state = cache.get_conv_state(layer), cache.get_recurrent_state(layer)
        if window is None or state is None or window.shape[0] != hidden.shape[0]:
            return None
        if has_hooks(block) or has_hooks(block.mixer) or not (block.residual_in_fp32 or hidden.dtype is torch.float32):
            return None
        if window.dtype not in (torch.float32, torch.bfloat16) or state.dtype is not torch.float32:
            return None
        if not (window.is_contiguous() and state.is_contiguous()):
            return None
        states += [window, state]
    blocks = [_plan(block) for block in model.layers]
    if None in blocks:
        return None
    plan: ModelPlan | None = model.step_plan
    if plan is None or not plan.holds(tuple(blocks), tuple(states)):
        plan = model.step_plan = ModelPlan.of(tuple(blocks), tuple(states))
    return plan


def _plan(block: MambaBlock) -> StepPlan | None:
    plan: StepPlan | None = block.step_plan
    if plan is None or not plan.holds(block.mixer):
        ready = all(isinstance(layer, FrozenLinear) and layer.is_ready() for layer in _layers(block.mixer))
        plan = block.step_plan = StepPlan.of(block) if ready else None
    return plan


def _run_blocks(plan: ModelPlan, hidden: Tensor) -> Tensor:
    inputs = gemv.padded_rows(hidden[:, 0].float()).numpy()
    B, rows, projections = len(hidden), len(inputs), plan.blocks[0].projections
    E, N = plan.states[1].shape[1:]
    both = np.stack([inputs, inputs])
    # Spare rows are computed like the others: they must start as numbers.
    shared = (*(np.zeros((rows, W.shape[1]), W.dtype if W.itemsize > 1 else np.float32) for W in projections),
              np.empty((rows, E), np.float32))  # fmt: skip
    BC = np.zeros((2, rows, -(-N // LANES) * LANES), np.float32)
    threads = gemv.threads_for(sum(weight.nbytes for weight in projections))
    counters = np.stack([gemv.counters(PHASES)] * len(plan.blocks))
    gemv.together(threads, plan.run, both, shared, BC, counters, threads, (0,) * rows)
    return torch.from_numpy(both[len(plan.blocks) % 2, :B])[:, None]
