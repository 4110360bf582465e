"""The selective scan as the recurrence is written on paper: one Python step per token.

Shapes: B batch, E channels (inner width), L tokens, N state. u, delta, z (B, E, L); A (E, N); B, C (B, N, L);
D, delta_bias (E,); states (B, E, N). Slow and obvious; every other backend is tested against it, and autograd
differentiates it without help.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.selective_scan import ScanInputs


def scan(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """See ``selective_scan.selective_scan``. Returns y (B, E, L) and the last state (B, E, N)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    dtype = torch.float64 if u.dtype is torch.float64 else torch.float32
    u_, delta_, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta_ = delta_ + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta_ = F.softplus(delta_, threshold=20)
    batch, channels, length = u.shape
    state = u_.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.to(dtype)
    # unbind, not indexing: autograd would answer each index with a gradient as large as the whole sequence.
    steps = list(zip(*(t.unbind(-1) for t in (delta_, u_, B, C)), strict=True))
    outputs = []
    for delta_t, u_t, B_t, C_t in reversed(steps) if reverse else steps:
        state = torch.exp(delta_t[..., None] * A) * state + (delta_t * u_t)[..., None] * B_t[:, None, :]
        outputs.append((state * C_t[:, None, :]).sum(-1))
    if reverse:
        outputs.reverse()
    y = torch.stack(outputs, -1) if length else torch.zeros_like(u_)
    if D is not None:
        y = y + u_ * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state
