"""Findings head: which findings a scan shows, where, how large, and what each measured lesion is.

visual   [B, L, D]   visual tokens, before CMI: it reads no question
lesions  [B, M, P]   place, size, shape and density of the lesions measured on the segmentation; rows of zeros are none
queries  [B, F + M]  one learned query per finding, and each lesion
  attention          over visual tokens and lesions
  → presence [B, F], side [B, F, 3], zone [B, F, 3], log size [B, F] of each finding
  → what a lesion is [B, M, F + 1]; the last is none of the findings: a false lesion of the segmentation
  → its log size [B, M] beside the measured one, by a linear map for each finding (data/lesion_sizes.py)

Queries that attend to image tokens: DETR (Carion et al. 2020), Query2Label (Liu et al. 2021). Temperatures: Guo et al.
2017.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNKNOWN = -100  # of a target that nothing is known of
DESCRIPTORS = 22  # P, of data/findings.py
SIDES, ZONES = ("left", "right", "bilateral"), ("upper", "middle", "lower")
TYPICAL_MM = 15.0  # sizes are learnt as their logarithm beside this one's


class Found(NamedTuple):
    """What the head says, or its targets: logits, or indices and 0 or 1; sizes as logarithms beside ``TYPICAL_MM``."""

    presence: Tensor  # (B, F)
    side: Tensor  # (B, F, 3) or (B, F)
    zone: Tensor  # (B, F, 3) or (B, F)
    size: Tensor  # (B, F); of targets NaN where unknown
    lesion: Tensor  # (B, M, F + 1) or (B, M)
    lesion_size: Tensor | None = None  # (B, M), log of the factor to the measured longest diameter; fitted, not learnt


class FindingsHead(nn.Module):
    """See the module's docstring."""

    def __init__(self, names: Sequence[str], visual_width: int, descriptors: int, width: int = 128) -> None:
        """``names``: the F findings. ``descriptors``: P."""
        super().__init__()
        self.names = tuple(names)
        self.visual = nn.Sequential(nn.LayerNorm(visual_width), nn.Linear(visual_width, width))
        self.lesion = nn.Sequential(nn.Linear(descriptors, width), nn.GELU(), nn.Linear(width, width))
        self.query = nn.Parameter(torch.randn(len(self.names), width) / math.sqrt(width))
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.out_norm = nn.LayerNorm(width)
        self.of_finding = nn.Linear(width, 1 + len(SIDES) + len(ZONES) + 1)
        self.of_lesion = nn.Linear(width, len(self.names) + 2)  # the last: an older head's learnt log size, or 0
        self.query._no_weight_decay = True
        # Of :meth:`calibrate`; ``segmented``: findings that are mostly measured lesions. The last is of set_sizes.
        self.register_buffer("presence_temperature", torch.ones(()))
        self.register_buffer("lesion_temperature", torch.ones(()))
        self.register_buffer("segmented", torch.zeros(len(self.names), dtype=torch.bool))
        self.register_buffer("size_weights", torch.zeros(len(self.names), descriptors))
        self.register_buffer("size_range", torch.tensor([[-math.inf], [math.inf]]).repeat(1, descriptors))
        self.set_sizes(self.size_weights, self.size_range)

    def set_sizes(self, weights: Tensor, span: Tensor) -> None:
        """``weights`` (F, P): maps of descriptors to the log of stated over measured size; ``span`` (2, P): least and
        most of what they were fitted on, beyond which they do not go."""
        self.size_weights.copy_(weights)
        self.size_range.copy_(span)
        self.of_lesion.weight.data[-1] = self.of_lesion.bias.data[-1] = 0

    def forward(self, visual: Tensor, lesions: Tensor) -> Found:
        """``visual`` (B, L, D), ``lesions`` (B, M, P); logits without temperature."""
        lesions = lesions.to(visual.device)
        real = lesions[..., -1] > 0  # (B, M)
        seen, measured = self.visual(visual.float()), self.lesion(lesions)
        queries = torch.cat([self.query.expand(len(visual), -1, -1), measured], dim=1)
        memory = torch.cat([seen, measured], dim=1)
        hidden = torch.cat([torch.zeros_like(seen[..., 0], dtype=torch.bool), ~real], dim=1)  # (B, L + M)
        normed = self.norm(memory)
        mixed, _ = self.attention(self.norm(queries), normed, normed, key_padding_mask=hidden, need_weights=False)
        queries = queries + mixed
        queries = self.out_norm(queries + self.mix(queries))
        findings, lesion = queries.split([len(self.names), lesions.shape[1]], dim=1)
        presence, side, zone, size = self.of_finding(findings).split([1, len(SIDES), len(ZONES), 1], dim=-1)
        kind, factor = self.of_lesion(lesion).split([len(self.names) + 1, 1], dim=-1)
        inside = lesions.clamp(*self.size_range)
        sizes = (inside[:, :, None] * self.size_weights).sum(-1)  # (B, M, F), in float32 under autocast too
        factor = factor[..., 0] + (kind[..., :-1].softmax(-1) * sizes).sum(-1)
        return Found(presence[..., 0], side, zone, size[..., 0], kind, factor)

    def probabilities(self, found: Found) -> Found:
        """Calibrated probabilities of logits; sizes in mm, and factors."""
        return Found(
            (found.presence / self.presence_temperature).sigmoid(),
            found.side.softmax(-1),
            found.zone.softmax(-1),
            found.size.exp() * TYPICAL_MM,
            (found.lesion / self.lesion_temperature).softmax(-1),
            found.lesion_size.exp(),
        )

    @torch.no_grad()
    def calibrate(self, found: Found, target: Found) -> None:
        """Set both temperatures to those of the least loss on held-out cases; one that nothing is known for stays."""
        stated = target.presence == 1
        measured = (target.lesion[..., None] == torch.arange(len(self.names), device=stated.device)).any(1)
        self.segmented.copy_(2 * (stated & measured).sum(0) > stated.sum(0))
        for temperature, loss, logits, truth in (
            (self.presence_temperature, _presence_loss, found.presence, target.presence),
            (self.lesion_temperature, _class_loss, found.lesion, target.lesion),
        ):
            if (truth != UNKNOWN).any():
                scales = torch.logspace(-1, 1, 81, device=temperature.device)
                temperature.copy_(scales[torch.stack([loss(logits / scale, truth) for scale in scales]).argmin()])


def findings_loss(found: Found, target: Found) -> Tensor:
    """Sums (5,) of the losses of all that is learnt; what is unknown counts nowhere. The loss is the sum of their means
    over :func:`known_targets`."""
    losses = (_presence_loss, _class_loss, _class_loss, _size_loss, _class_loss)
    return torch.stack([loss(*pair) for loss, *pair in zip(losses, found[:5], target[:5], strict=True)])


def known_targets(target: Found) -> Tensor:
    """How many values (5,) of each kind are known."""
    return torch.stack([((values != UNKNOWN) & values.isfinite()).sum() for values in target[:5]])


# No boolean indexing: it waits for the GPU to count the known values.
def _presence_loss(logits: Tensor, target: Tensor) -> Tensor:
    known, stated = (target != UNKNOWN).float(), target.clamp(0, 1).float()
    return F.binary_cross_entropy_with_logits(logits, stated, weight=known, reduction="sum")


def _class_loss(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=UNKNOWN, reduction="sum")


def _size_loss(logarithm: Tensor, target: Tensor) -> Tensor:
    target = torch.where(target.isfinite(), target, logarithm.detach())  # no loss and no gradient where unknown
    return F.smooth_l1_loss(logarithm, target, reduction="sum", beta=0.1)
