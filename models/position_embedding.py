"""Positions of tokens: in the plane, along the scan, and of a lesion."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 16


def sincos_2d(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, width, side, side); He et al. 2022 (MAE), appendix A.

    A quarter of the width each for sin(row), cos(row), sin(column), cos(column); the channels that are left over
    where 4 does not divide the width are zero.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / max(quarter, 1))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency[None]  # (side, quarter)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1).T  # (2·quarter, side)
    rows = wave[:, :, None].expand(-1, side, side)
    columns = wave[:, None, :].expand(-1, side, side)
    table = torch.zeros(1, width, side, side)
    table[0, : 4 * quarter] = torch.cat([rows, columns])
    return table


def harmonics(fraction: Tensor) -> Tensor:
    """Fractions in 0…1, (…), as sines and cosines of rising frequency, (…, 2 · FREQUENCIES).

    A linear map resolves small differences between these, but not between the plain numbers.
    """
    harmonic = torch.arange(1, FREQUENCIES + 1, device=fraction.device, dtype=torch.float32)
    angle = fraction.float()[..., None] * harmonic * (math.pi / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SlicePosition(nn.Module):
    """Embedding of a slice's craniocaudal level in its scan, 0 (lowest) to 1 (highest): (B, K) → (B, K, W_b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * FREQUENCIES, width)

    def forward(self, position: Tensor) -> Tensor:
        return self.project(harmonics(position))


class LesionPosition(nn.Module):
    """Embedding of a lesion's place and size: (B, K, 4) → (B, K, W_b); of a row of zeros, no lesion, the bias alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 2 * FREQUENCIES, width)

    def forward(self, roi: Tensor) -> Tensor:
        return self.project(harmonics(roi[..., :3]).flatten(-2) * roi[..., 3:])
