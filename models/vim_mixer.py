"""The Vision Mamba mixer (Vim v2): one selective scan from each end of the sequence, summed.

Letters: B batch, L tokens, D width, E inner width (2 · D), N state, R rank of the step-size projection.

  x [B, L, D] → in_proj → x, z [B, E, L] each
  per direction:  x → causal depthwise conv → SiLU → Δ (rank R), B, C → scan → + D·x → · SiLU(z)
  (forward + backward) / 2 [B, E, L] → out_proj → [B, L, D]

Source: Zhu et al., "Vision Mamba" (arXiv 2401.09417) and github.com/hustvl/Vim, ``bimamba_type="v2"`` with
``if_divide_out=True``: the projections and the gate are shared, all else is one set per direction, the backward one
named with ``_b``. Parameter names are the official ones. One difference: there only ``dt_proj`` starts with step sizes
in STEP_SIZES; here ``dt_proj_b`` does too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.selective_scan import selective_scan

EXPAND, TAPS, STATE = 2, 4, 16  # E / D, of the depthwise convolution, N: those of Mamba and Vim
STEP_SIZES = 1e-3, 0.1  # at the start (Gu & Dao 2023, section 3.6)


class VimMixer(nn.Module):
    """Bidirectional selective-scan mixer, [B, L, D] -> [B, L, D].

    ``d_model``: D; E is twice as wide, and the rank R of the step size is D / 16, rounded up.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        inner, rank = EXPAND * d_model, math.ceil(d_model / 16)
        self.dt_rank = rank

        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        for suffix in ("", "_b"):
            log_A = torch.log(torch.arange(1.0, STATE + 1)).repeat(inner, 1)
            dt_proj = nn.Linear(rank, inner)
            init_step_size(dt_proj)
            setattr(self, f"conv1d{suffix}", nn.Conv1d(inner, inner, TAPS, groups=inner))
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, rank + 2 * STATE, bias=False))
            setattr(self, f"dt_proj{suffix}", dt_proj)
            setattr(self, f"A{suffix}_log", nn.Parameter(log_A))
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, d_model, bias=False)
        # The optimizer reads this: weight decay would pull the dynamics and the biases to zero.
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 or name.endswith("_log"):
                parameter._no_weight_decay = True

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        # z stays a transposed view of the projection: the scan reads any strides.
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        y = self._direction(x, z, "", reverse=False) + self._direction(x, z, "_b", reverse=True)
        return self.out_proj((y / 2).transpose(1, 2))

    def _direction(self, x: Tensor, z: Tensor, suffix: str, reverse: bool) -> Tensor:
        """One direction's conv, projections and scan over x, z [B, E, L]. Nothing is flipped in memory.

        The conv is causal in the order of the walk; backward that means padding on the right and taps mirrored.
        """
        conv, x_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"x_proj{suffix}")
        dt_proj, A_log = getattr(self, f"dt_proj{suffix}"), getattr(self, f"A{suffix}_log")
        weight = conv.weight.flip(-1) if reverse else conv.weight
        reach = weight.shape[-1] - 1
        x = F.pad(x, (0, reach) if reverse else (reach, 0))
        x = F.silu(F.conv1d(x, weight, conv.bias, groups=conv.groups))
        projected = x_proj(x.transpose(1, 2))
        dt, B, C = projected.split((self.dt_rank, STATE, STATE), dim=-1)
        return selective_scan(
            x,
            F.linear(dt, dt_proj.weight).transpose(1, 2),
            -torch.exp(A_log.float()),
            B.transpose(1, 2),
            C.transpose(1, 2),
            getattr(self, f"D{suffix}").float(),
            z=z,
            delta_bias=dt_proj.bias.float(),  # inside the scan, so that it is added in float32
            delta_softplus=True,
            reverse=reverse,
        )


class VimBlock(nn.Module):
    """Add → RMSNorm → VimMixer. The residual stream [B, L, D] is kept in float32 whatever the mixer runs in.

    The caller adds the last ``hidden`` to the last ``residual``.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.norm.weight._no_weight_decay = True
        self.mixer = VimMixer(d_model)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(hidden, residual) [B, L, D] -> (the mixer's output, hidden + residual in float32)."""
        residual = hidden.float() if residual is None else residual + hidden.float()
        normed = self.norm(residual).to(self.mixer.in_proj.weight.dtype)
        return self.mixer(normed), residual


def init_step_size(dt_proj: nn.Linear) -> None:
    """Start with softplus(bias) log-uniform in STEP_SIZES and weights uniform in ±1/√R."""
    bound = dt_proj.in_features**-0.5
    nn.init.uniform_(dt_proj.weight, -bound, bound)
    low, high = map(math.log, STEP_SIZES)
    dt = torch.exp(low + (high - low) * torch.rand(dt_proj.out_features))
    with torch.no_grad():
        # The inverse of softplus; expm1 keeps small steps exact.
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
