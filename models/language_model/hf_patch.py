"""Our scan inside Hugging Face's Mamba: the same mixer, without the (B, E, L, N) tensors.

    hidden [B, L, D] → in_proj → x, z [B, L, E] → causal conv, SiLU → Δ, B, C → scan · SiLU(z) → out_proj

``transformers`` 5.23 falls back to a Python loop over L that materialises every state where no CUDA
kernels are installed. Everything around the mixer (hub, weights, cache, ``generate``) stays theirs.
The channels are the last axis throughout: as the projections read and write them, so nothing is transposed.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaForCausalLM
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaMixer

from models.language_model.mamba_backbone import run_in_blocks
from models.selective_scan import selective_scan, selective_state_update


def use_our_scan(model: MambaForCausalLM) -> int:
    """Replace the forward of every mixer in place, and how the backbone runs them; returns how many there were."""
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:
        mixer.forward = MethodType(_mixer_forward, mixer)
    run_in_blocks(model)
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
    x, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, dim=-1)  # (B, L, E)
    before = _remember(self, x, cache_params)
    x = _masked(causal_conv_silu(x, self.conv1d.weight[:, 0], self.conv1d.bias, before), attention_mask)

    dt, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    delta, bias = _project_delta(self.dt_proj, dt)
    A, skip = -torch.exp(self.A_log.float()), self.D.float()

    if state is not None and L == 1:
        y = selective_state_update(
            state,
            x[:, 0],
            delta[:, 0],
            A,
            B[:, 0],
            C[:, 0],
            D=skip,
            z=z[:, 0],
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
        z=z.transpose(1, 2),
        delta_bias=bias,
        delta_softplus=True,
        initial_state=None if state is None else state.float(),
        return_last_state=True,
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(last_state, self.layer_idx)
    return self.out_proj(y.transpose(1, 2).to(dtype))


def _project_delta(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """Δ before its bias, and the bias for the scan to add in float32; an adapter or a quantised layer adds its own."""
    if not isinstance(dt_proj, nn.Linear) or not dt_proj.weight.is_floating_point():
        return dt_proj(dt), None
    bias = None if dt_proj.bias is None else dt_proj.bias.float()
    # As a matrix product: for a strided (B, L, R) torch would repeat the weights for every sample.
    return F.linear(dt.flatten(0, 1), dt_proj.weight).unflatten(0, dt.shape[:2]), bias


def _remember(mixer: MambaMixer, x: Tensor, cache_params: Cache | None) -> Tensor | None:
    """The K - 1 inputs of the convolution before ``x`` (B, K-1, E), if any; the cache then ends with ``x``."""
    if cache_params is None:
        return None
    kernel = mixer.conv_kernel_size
    kept = cache_params.get_conv_state(mixer.layer_idx)
    before = None if kept is None else kept[..., 1:].transpose(1, 2).clone()  # the update overwrites it in place
    cache_params.update_conv_state(x[:, -kernel:].transpose(1, 2), mixer.layer_idx, conv_kernel_size=kernel)
    return before


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """SiLU of the causal depthwise convolution along L, as a sum of K shifted products in float32.

    Equals ``silu(conv1d(...))`` of the transposed sequence, which on a CPU takes a second per thousand tokens in
    bfloat16 and needs the transposition.

    Args:
        x: (B, L, E). weight: (E, K), its last column meets the present token. bias: (E,).
        before: (B, K-1, E), what precedes ``x``; zeros if absent.

    Returns:
        (B, L, E) in the dtype of ``x``.
    """
    B, L, E = x.shape
    first, *taps = weight.float().unbind(1)
    padding = x.new_zeros(B, len(taps), E) if before is None else before.to(x.dtype)
    # Half precision is widened once, not in each product.
    inputs = torch.cat([padding, x], dim=1).float()
    out = inputs[:, :L] * first
    for k, tap in enumerate(taps, start=1):
        out.addcmul_(inputs[:, k : k + L], tap)
    if bias is not None:
        out += bias
    return F.silu(out, inplace=not out.requires_grad).to(x.dtype)
