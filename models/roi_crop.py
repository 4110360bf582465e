"""Region of interest on a feature map.

    centre   features (B, C, H, W) → (B, C, r, r) and the (row, column) of its upper left corner in H x W
    lesion   features (B, C, H, W), squares (B, 4) → (B, C, r, r), sampled between the features, at a fixed scale

The corner lets positional embeddings of the full grid be cropped alike. With an odd remainder the crop sits
one feature up and to the left of the exact centre.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from config.errors import InputError

SAMPLES = 2  # at least, per cell and axis


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


def sample_square(features: Tensor, square: Tensor, side: int, scale: int = 1) -> Tensor:
    """Sample ``side`` x ``side`` cells of ``scale`` features each around a lesion, bilinearly, each the mean of as many
    points (RoIAlign, at least 2 x 2).

    So many features are seen, however large the lesion is.

    Args:
        features: (B, C, H, W), or (1, C, H, W) that all squares share.
        square: (B, 4) row and column of the lesion's core, its size, as shares of the map, and 1 where it is known.
            What is seen is moved to lie inside the map; where no square is known it is the middle of the map.

    Returns:
        (B, C, ``side``, ``side``).

    Source: He et al. 2017, Mask R-CNN, section 3 (RoIAlign).
    """
    centre, extent = square_extent(square, features.shape[-2:], side * scale)
    samples = max(SAMPLES, scale)
    points = (torch.arange(side * samples, device=square.device) + 0.5) / (side * samples) - 0.5
    rows, columns = (2 * (centre[:, axis, None] + extent[:, axis, None] * points) - 1 for axis in (0, 1))
    count, squares = len(points), len(square)
    grid = torch.stack([columns[:, None, :].expand(-1, count, -1), rows[:, :, None].expand(-1, -1, count)], dim=-1)
    shared = len(features) == 1
    if shared:  # one map, the squares below each other
        grid = grid.reshape(1, squares * count, count, 2)
    # In float32: bfloat16 knows a place in the map to no better than a third of a feature.
    sampled = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    cells = F.avg_pool2d(sampled, samples).to(features.dtype)
    return cells[0].unflatten(1, (squares, side)).transpose(0, 1) if shared else cells


def square_extent(square: Tensor, shape: Sequence[int], features: int) -> tuple[Tensor, Tensor]:
    """Middle and extent, (B, 2) each in shares of a map of ``shape``, of ``features`` by ``features`` around
    ``square`` (B, 4)."""
    known = square[:, 3:4]
    extent = torch.tensor([min(features / length, 1.0) for length in shape], device=square.device)
    extent = extent.expand(len(square), 2)
    centre = torch.where(known > 0, square[:, :2], torch.full_like(square[:, :2], 0.5))
    return torch.maximum(torch.minimum(centre, 1 - extent / 2), extent / 2), extent
