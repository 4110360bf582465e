"""Decoding on CPU: a block of Hugging Face's Mamba advanced by one token in one compiled call.

    hidden [B, 1, D] → hidden [B, 1, D]; the cache's convolution inputs and recurrent state change in place

The plain reference is the block itself (``mamba_mixer``, ``MambaBlock.forward``); what is not a plain frozen layer in
float32, bfloat16 or our int8 (adapters, other quantisations, float16, another device) takes that path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaBlock

from models.language_model.cpu_decode.frozen_linear import FrozenLinear, is_watched
from models.language_model.cpu_decode.gemv_numba import array, counters, padded_rows, together, vector
from models.language_model.cpu_decode.step_kernels import PHASES, block_kernel
from models.selective_scan.kernels_numba import LANES

Array = np.ndarray
MOST_ROWS = 4


@dataclass(frozen=True)
class StepPlan:
    """A block's frozen weights as the kernel takes them, and what must not have changed since.

    Large matrices are shared with the kernel; what is derived from small ones (A, widened biases) is a copy.
    """

    layers: tuple[FrozenLinear, ...]
    watched: tuple[tuple[dict[str, Tensor], str, Tensor, int, int], ...]  # where it hangs, the tensor, address, version
    weights: tuple[object, ...]
    read_between: tuple[Array, ...]  # x_proj, dt_proj, out_proj: what is between them is of the kind that meets them

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
            (held, name)
            for module in block.modules()
            for held in (module._parameters, module._buffers)
            for name in held
        ]
        watched = [(held, name, t, t.data_ptr(), t._version) for held, name in places if (t := held[name]) is not None]
        between = tuple(weights[place][0] for place in (3, 4, 6))
        return cls(_layers(mixer), tuple(watched), weights, between)

    def holds(self, mixer: nn.Module) -> bool:
        """Whether the block still is what the plan was made from: nothing replaced, moved, or changed in place."""
        if any(one is not other or is_watched(one) for one, other in zip(self.layers, _layers(mixer), strict=True)):
            return False
        for held, name, tensor, address, version in self.watched:
            if held[name] is not tensor or tensor.data_ptr() != address or tensor._version != version:
                return False
        return True

    def __deepcopy__(self, memo: dict) -> None:
        return None  # a copied block makes its own


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
    plan = _plan(block, mixer)
    if plan is None or not _usable(window, state, hidden.shape[0]):
        return None
    return _advance(block, plan, hidden, window, state)


def _plan(block: MambaBlock, mixer: nn.Module) -> StepPlan | None:
    plan: StepPlan | None = block.step_plan
    if is_watched(mixer):
        return None
    if plan is None or not plan.holds(mixer):
        ready = all(isinstance(layer, FrozenLinear) and layer.is_ready() for layer in _layers(mixer))
        plan = block.step_plan = StepPlan.of(block) if ready else None
    return plan


def _usable(window: Tensor | None, state: Tensor | None, rows: int) -> bool:
    if window is None or state is None or window.shape[0] != rows:
        return False
    kinds = window.dtype in (torch.float32, torch.bfloat16) and state.dtype is torch.float32
    return kinds and window.is_contiguous() and state.is_contiguous()


def _advance(block: MambaBlock, plan: StepPlan, hidden: Tensor, window: Tensor, state: Tensor) -> Tensor:
    B, E, N = state.shape
    inputs = padded_rows(hidden[:, 0].float()).numpy()
    rows = len(inputs)
    out = np.empty((B, inputs.shape[1]), np.float32)
    # Spare rows are computed like the others: they must start as numbers.
    shared = (*(np.zeros((rows, W.shape[1]), W.dtype if W.itemsize > 1 else np.float32) for W in plan.read_between),
              np.empty((rows, E), np.float32))  # fmt: skip
    BC = np.zeros((2, rows, -(-N // LANES) * LANES), np.float32)
    together(
        block_kernel, inputs, *plan.weights, array(window), array(state), shared, BC, out, counters(PHASES),
        torch.get_num_threads(), (0,) * rows,
    )  # fmt: skip
    dtype = torch.float32 if block.residual_in_fp32 else hidden.dtype
    return torch.from_numpy(out)[:, None].to(dtype)
