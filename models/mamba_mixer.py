"""Our scan inside Hugging Face's Mamba: the same mixer, without the (B, E, L, N) tensors.

    hidden [B, L, D] → in_proj → x, z [B, E, L] → causal conv, SiLU → Δ, B, C → scan · SiLU(z) → out_proj

``transformers`` 5.23 falls back to a Python loop over L that materialises every state where no CUDA
kernels are installed. Everything around the mixer (hub, weights, cache, ``generate``) stays theirs.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MambaForCausalLM
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaMixer

from models.selective_scan import selective_scan, selective_state_update


def use_our_scan(model: MambaForCausalLM) -> int:
    """Replace the forward of every mixer in place; returns how many there were."""
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:
        mixer.forward = MethodType(_mixer_forward, mixer)
    return len(mixers)


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden if mask is None else hidden * mask[:, :, None].to(hidden.dtype)


def _mixer_forward(
    self: MambaMixer,
    hidden_states: Tensor,
    cache_params: Cache | None = None,
    attention_mask: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Same contract as ``MambaMixer.forward``; a prefill in pieces continues from the cached state."""
    L, dtype = hidden_states.shape[1], hidden_states.dtype
    state = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
    x, z = self.in_proj(_masked(hidden_states, attention_mask)).transpose(1, 2).chunk(2, dim=1)  # (B, E, L)
    x = _masked(_convolve(self, x, cache_params).transpose(1, 2), attention_mask)  # (B, L, E)

    dt, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    delta = F.linear(dt, self.dt_proj.weight)  # the scan adds the bias, in float32
    A, skip, bias = -torch.exp(self.A_log.float()), self.D.float(), self.dt_proj.bias.float()

    if state is not None and L == 1:
        y = selective_state_update(
            state,
            x[:, 0],
            delta[:, 0],
            A,
            B[:, 0],
            C[:, 0],
            D=skip,
            z=z[..., 0],
            delta_bias=bias,
            delta_softplus=True,
        )[:, None]
        return self.out_proj(y.to(dtype))

    y, last_state = selective_scan(
        x.transpose(1, 2),
        delta.transpose(1, 2),
        A,
        B.transpose(1, 2),
        C.transpose(1, 2),
        D=skip,
        z=z,
        delta_bias=bias,
        delta_softplus=True,
        initial_state=None if state is None else state.float(),
        return_last_state=True,
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(last_state, self.layer_idx)
    return self.out_proj(y.transpose(1, 2).to(dtype))


def _convolve(mixer: MambaMixer, x: Tensor, cache_params: Cache | None) -> Tensor:
    """Causal depthwise convolution and SiLU, (B, E, L) → (B, E, L), after the cached inputs if any."""
    L, kernel = x.shape[-1], mixer.conv_kernel_size
    if cache_params is not None:
        x = cache_params.update_conv_state(x, mixer.layer_idx, conv_kernel_size=kernel)
    x = F.pad(x, (kernel - 1, 0))[..., -(L + kernel - 1) :]
    return F.silu(F.conv1d(x, mixer.conv1d.weight, mixer.conv1d.bias, groups=x.shape[1]))
