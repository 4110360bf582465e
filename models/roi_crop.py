"""Region of interest on a feature map.

    centre   features (B, C, H, W) → (B, C, r, r), and the (row, column) of its upper left corner in H × W
    lesion   features (B, C, H, W), roi (B, 4) → (B, C, r, r), sampled between the features, at a fixed scale

The corner crops the positional embeddings of the full grid alike. Where H − r is odd, the crop lies half a feature up
and to the left of the exact centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config.errors import InputError

SAMPLES = 2  # per cell and axis


def center_crop(features: Tensor, side: int) -> tuple[Tensor, tuple[int, int]]:
    """Crop (B, C, H, W) to the central (B, C, ``side``, ``side``), a view; and the (row, column) of its corner.

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


def sample_roi(features: Tensor, roi: Tensor, side: int) -> Tensor:
    """Sample ``side`` × ``side`` features around each lesion, bilinearly, each the mean of 2 × 2 points.

    The region has the same extent whatever the size of the lesion.

    Args:
        features: (B, C, H, W), or (1, C, H, W) that all rows of ``roi`` share.
        roi: (B, 4) row and column of the lesion's core and its size, as fractions of the map, and 1; a row of zeros
            where there is no lesion, which samples the middle of the map.

    Returns:
        (B, C, ``side``, ``side``). The region is moved to lie inside the map.

    Source: He et al. 2017, Mask R-CNN, section 3 (RoIAlign).
    """
    centre, extent = roi_extent(roi, features.shape[-2:], side)
    points = (torch.arange(side * SAMPLES, device=roi.device) + 0.5) / (side * SAMPLES) - 0.5
    rows, columns = (2 * (centre[:, axis, None] + extent[:, axis, None] * points) - 1 for axis in (0, 1))
    count, boxes = len(points), len(roi)
    grid = torch.stack([columns[:, None, :].expand(-1, count, -1), rows[:, :, None].expand(-1, -1, count)], dim=-1)
    shared = len(features) == 1
    if shared:  # one map: the boxes' points below each other
        grid = grid.reshape(1, boxes * count, count, 2)
    # In float32: bfloat16 resolves a position in the map to a third of a feature only.
    sampled = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    cells = F.avg_pool2d(sampled, SAMPLES).to(features.dtype)
    return cells[0].unflatten(1, (boxes, side)).transpose(0, 1) if shared else cells


def roi_extent(roi: Tensor, shape: Sequence[int], side: int) -> tuple[Tensor, Tensor]:
    """Centre and extent, (B, 2) each in fractions of a map of ``shape``, of ``side`` × ``side`` features around
    ``roi`` (B, 4)."""
    extent = torch.tensor([min(side / length, 1.0) for length in shape], device=roi.device).expand(len(roi), 2)
    centre = torch.where(roi[:, 3:4] > 0, roi[:, :2], torch.full_like(roi[:, :2], 0.5))
    return torch.maximum(torch.minimum(centre, 1 - extent / 2), extent / 2), extent
