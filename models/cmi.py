"""Cross-Mamba Interaction: the question writes the parameters of an SSM that the image flows through.

    question  [B, Lq, D] → pooled [B, D] → Δ [B, E], B [B, N], C [B, N]
    visual    [B, L, D]  → x, z [B, E, L] → scan(x; Δ, A, B, C) · SiLU(z) → [B, L, D] + visual

Source: the users' manual ("the text prompt generates the SSM parameters"). CMI-MTL (arXiv 2511.01357) gates instead;
docs/ablations.md compares the two.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.selective_scan import selective_scan
from models.vim_mixer import STATE, init_step_size


class CMI(nn.Module):
    """Text-steered state-space mixing of visual tokens, residual, optionally compressed in length."""

    def __init__(self, width: int, *, compress_to: int | None = None) -> None:
        """
        Args:
            width: D of both streams; the inner width E equals it.
            compress_to: L' of the output when the input is longer; ``None`` keeps L.
        """
        super().__init__()
        self.compress_to = compress_to
        rank = math.ceil(width / 16)
        self.visual_norm = nn.RMSNorm(width, eps=1e-5)
        self.text_norm = nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, 2 * width, bias=False)
        self.text_proj = nn.Linear(width, rank + 2 * STATE, bias=False)
        self.dt_proj = nn.Linear(rank, width)
        self.A_log = nn.Parameter(torch.arange(1, STATE + 1, dtype=torch.float32).log().repeat(width, 1))
        self.D = nn.Parameter(torch.ones(width))
        self.out_proj = nn.Linear(width, width, bias=False)
        init_step_size(self.dt_proj)
        # A small start keeps the visual tokens of Stage 1 nearly as they are, and still passes gradient.
        nn.init.normal_(self.out_proj.weight, std=0.02 / math.sqrt(width))
        for parameter in (self.A_log, self.D, self.dt_proj.bias):
            parameter._no_weight_decay = True

    def forward(self, visual: Tensor, question: Tensor, question_mask: Tensor) -> Tensor:
        """
        Args:
            visual: (B, L, D) visual tokens.
            question: (B, Lq, D) embeddings of the question.
            question_mask: (B, Lq), 1 where a token is real.

        Returns:
            (B, L', D), L' = ``compress_to`` if that is less than L, else L.
        """
        B, L, D = visual.shape
        pooled = masked_mean(self.text_norm(question), question_mask)  # (B, D)
        dt, Bt, Ct = self.text_proj(pooled).split([self.dt_proj.in_features, STATE, STATE], dim=-1)
        delta = F.linear(dt, self.dt_proj.weight)  # (B, E); the scan adds the bias

        x, z = self.in_proj(self.visual_norm(visual)).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
        y = selective_scan(
            F.silu(x),
            delta[..., None].expand(B, D, L),
            -torch.exp(self.A_log.float()),
            Bt[..., None].expand(B, STATE, L),
            Ct[..., None].expand(B, STATE, L),
            D=self.D.float(),
            z=z,
            delta_bias=self.dt_proj.bias.float(),
            delta_softplus=True,
        )
        fused = visual + self.out_proj(y.transpose(1, 2).to(visual.dtype))
        if self.compress_to is None or self.compress_to >= L:
            return fused
        return F.adaptive_avg_pool1d(fused.transpose(1, 2), self.compress_to).transpose(1, 2)  # neighbours averaged


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean (B, D) of the tokens (B, L, D) where ``mask`` (B, L) is 1."""
    weight = mask[..., None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
