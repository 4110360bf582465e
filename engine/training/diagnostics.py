"""Does the vision part still say anything? Token statistics, and the verdict "collapsed".

The manual's proxy loss is minimised by the zero output, and a low loss then looks like success.
Two numbers tell: how far tokens differ from each other, and in how many directions.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

# Shares of the standard deviation that the bridge is initialised with; a healthy run stays near 1.
LEAST_STD_SHARE = 0.05
LEAST_RANK = 2.0
MOST_TOKENS = 4096


@dataclass(frozen=True)
class TokenStatistics:
    """``token_std``: mean over D of the deviation between tokens. ``image_std``: the same between
    images at one token position, so that positions alone do not count as content.
    ``effective_rank``: exp of the entropy of the singular values' shares (Roy & Vetterli 2007)."""

    token_std: float
    image_std: float
    effective_rank: float
    expected_std: float

    @property
    def collapsed(self) -> bool:
        least = LEAST_STD_SHARE * self.expected_std
        return not (self.token_std >= least and self.image_std >= least / 10 and self.effective_rank >= LEAST_RANK)

    def line(self) -> str:
        verdict = "  COLLAPSED: near-zero, one-directional or non-finite tokens" if self.collapsed else ""
        return (
            f"token_std {self.token_std:.5f}  image_std {self.image_std:.5f}  "
            f"effective_rank {self.effective_rank:.1f}{verdict}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "collapsed": self.collapsed}


def token_statistics(tokens: Tensor, expected_std: float) -> TokenStatistics:
    """
    Args:
        tokens: (B, L, D) visual tokens of several images.
        expected_std: deviation at initialisation (``VimBridge.output_std``).
    """
    tokens = tokens.detach().double()
    if not tokens.isfinite().all():  # no singular values then; whatever else they are, they say nothing
        return TokenStatistics(float("nan"), float("nan"), 0.0, expected_std)
    image_std = tokens.std(dim=0, unbiased=False).mean().item() if len(tokens) > 1 else float("nan")
    flat = tokens.flatten(0, 1)
    if len(flat) > MOST_TOKENS:
        flat = flat[torch.linspace(0, len(flat) - 1, MOST_TOKENS).long()]
    centred = flat - flat.mean(0)
    singular = torch.linalg.svdvals(centred)
    share = singular / singular.sum().clamp(min=1e-300)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    rank = float(entropy.exp()) if singular.sum() > 0 else 0.0
    if image_std != image_std:  # one image says nothing about differences between images
        image_std = flat.std(dim=0, unbiased=False).mean().item()
    return TokenStatistics(flat.std(dim=0, unbiased=False).mean().item(), image_std, rank, expected_std)
