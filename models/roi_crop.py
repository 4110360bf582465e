"""Region of interest: the central square of a feature map.

    features (B, C, H, W) → (B, C, r, r) and the (row, column) of its upper left corner in H x W

The corner lets positional embeddings of the full grid be cropped alike. With an odd remainder the crop sits
one feature up and to the left of the exact centre.
"""

from __future__ import annotations

from torch import Tensor

from config.errors import InputError


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
