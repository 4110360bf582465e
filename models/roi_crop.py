"""Region of interest on a feature map.

    centre   features (B, C, H, W) → (B, C, r, r) and the (row, column) of its upper left corner in H x W
    lesion   features (B, C, H, W), squares (B, 4) → (B, C, r, r), sampled between the features

The corner lets positional embeddings of the full grid be cropped alike. With an odd remainder the crop sits
one feature up and to the left of the exact centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config.errors import InputError

SAMPLES = 2  # per cell and axis, averaged: a square of twice the grid's spacing still sees every feature


def center_crop(features: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Crop (B, C, H, W) to the central (B, C, ``side``, ``side``); a view. Second: (row, column) of its corner.

    Raises InputError if ``side`` is below one or exceeds H or W.
    """
    height, width = features.shape[-2:]
    if not 1 <= side <= min(height, width):
        raise InputError(
            f"roi_side is {side}, but the feature map is {height} x {width}; choose 1 to {min(height, width)}, "
            "or raise encoder_target_spatial"
        )
    row, column = (height - side) // 2, (width - side) // 2
    return features[..., row : row + side, column : column + side], (row, column)


def sample_square(features: Tensor, square: Tensor, side: int) -> Tensor:
    """Sample ``side`` x ``side`` cells of a square, bilinearly, each the mean of 2 x 2 points (RoIAlign).

    Args:
        features: (B, C, H, W).
        square: (B, 4) row and column of the centre, side, as shares of the map, and 1 where it is known. A square
            is made no smaller than ``side`` features, where the map has no more to tell, and moved to lie inside the
            map; where none is known it is the central one of that size.

    Returns:
        (B, C, ``side``, ``side``).

    Source: He et al. 2017, Mask R-CNN, section 3 (RoIAlign).
    """
    centre, extent = square_extent(square, features.shape[-2:], side)
    points = (torch.arange(side * SAMPLES, device=square.device) + 0.5) / (side * SAMPLES) - 0.5
    rows, columns = (2 * (centre[:, axis, None] + extent[:, axis, None] * points) - 1 for axis in (0, 1))
    count = len(points)
    grid = torch.stack([columns[:, None, :].expand(-1, count, -1), rows[:, :, None].expand(-1, -1, count)], dim=-1)
    # In float32: bfloat16 knows a place in the map to no better than a third of a feature.
    sampled = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, SAMPLES).to(features.dtype)


def square_extent(square: Tensor, shape: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """Centre and extent, (B, 2) each in shares of a map of ``shape``, of what :func:`sample_square` looks at."""
    known = square[:, 3:4]
    least = torch.tensor([side / length for length in shape], device=square.device)
    extent = torch.maximum(square[:, 2:3] * known, least).clamp(max=1)
    centre = torch.where(known > 0, square[:, :2], torch.full_like(square[:, :2], 0.5))
    return torch.maximum(torch.minimum(centre, 1 - extent / 2), extent / 2), extent
