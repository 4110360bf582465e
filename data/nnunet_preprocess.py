"""nnU-Net's preprocessing of one case, from its plans alone: the encoder sees what it was trained on.

    volume (z, y, x) HU
      → axes permuted by ``transpose_forward``
      → crop to the bounding box of what is not zero
      → normalisation, before resampling
      → resampling to the plan's spacing       (a 2D plan keeps the spacing of the first axis)
      → image (C_in, z, y, x) float32, mask (z, y, x)

After the permutation "z, y, x" names the plan's own axes; they are the anatomical ones for the identity that
nearly every plan has. Results equal nnU-Net 2.8.1's to float32 rounding.

Source: nnU-Net 2.8.1, ``nnunetv2/preprocessing/preprocessors/default_preprocessor.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from config.errors import InputError
from config.nnunet_plans import Intensity, PreprocessPlan
from data.imaging.volume import Volume
from data.resampling import new_shape, resample_image, resample_labels, separate_axis

_EPSILON = 1e-8  # nnU-Net's guard against a division by zero


@dataclass(frozen=True)
class VoxelMap:
    """Where a preprocessed voxel lies in the volume it came from. Shapes and boxes are in voxels.

    ``bbox``: first and last+1 index per permuted axis; ``shape_before_crop``: permuted; ``shape``: preprocessed.
    """

    transpose_forward: tuple[int, int, int]
    bbox: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    shape_before_crop: tuple[int, int, int]
    shape: tuple[int, int, int]

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> VoxelMap:
        """From the JSON of ``dataclasses.asdict``."""
        shapes = {key: tuple(stored[key]) for key in ("transpose_forward", "shape_before_crop", "shape")}
        return cls(bbox=tuple(map(tuple, stored["bbox"])), **shapes)


@dataclass(frozen=True)
class Preprocessed:
    """``image``: float32 (C_in, z, y, x); ``mask``: labels (z, y, x) or None; ``spacing``: (z, y, x) in mm."""

    image: np.ndarray
    mask: np.ndarray | None
    spacing: tuple[float, float, float]
    voxel_map: VoxelMap


def preprocess(volume: Volume, plan: PreprocessPlan, mask: np.ndarray | None = None) -> Preprocessed:
    """Preprocess one CT ``volume`` and, alike, its label ``mask`` (same grid, 0 is background).

    ``volume`` must have been read in ``plan.orientation``. The mask keeps its dtype; nnU-Net's marker for voxels
    outside the body (-1) is background here.

    Raises InputError if the plan expects more than the one channel that a CT has, or the volume is all zero.
    """
    if len(plan.normalization_schemes) != 1:
        raise InputError(
            f"configuration '{plan.configuration}' expects {len(plan.normalization_schemes)} input channels, "
            f"but {volume.path} is one CT volume; use an encoder trained on a single CT channel"
        )
    if volume.orientation != plan.orientation:
        raise ValueError(f"volume was read as {volume.orientation}, the plan expects {plan.orientation}")
    if mask is not None and mask.shape != volume.array.shape:
        raise ValueError(f"mask has shape {mask.shape}, volume {volume.array.shape}")

    permuted = volume.array.transpose(plan.transpose_forward)
    spacing = [volume.spacing[axis] for axis in plan.transpose_forward]
    box = _nonzero_box(permuted, volume)
    cropped = np.array(permuted[box], dtype=np.float32, order="C")  # a copy: normalisation works in place
    labels = None if mask is None else mask.transpose(plan.transpose_forward)[box]

    target = list(plan.spacing) if len(plan.spacing) == 3 else [spacing[0], *plan.spacing]
    shape = new_shape(cropped.shape, spacing, target)
    if min(shape) < 1:
        raise InputError(f"{volume.path}: {cropped.shape} voxels of {spacing} mm become {shape} at the plan's spacing")
    inside = ndimage.binary_fill_holes(cropped != 0) if plan.use_mask_for_norm[0] else None
    if inside is not None and labels is not None:
        inside |= labels > 0
    normalize(cropped, plan.normalization_schemes[0], plan.intensity[0], inside)

    image = resample_image(cropped, shape, separate_axis(spacing, target, plan.data_resampling), plan.data_resampling)
    if labels is not None:
        alone = separate_axis(spacing, target, plan.mask_resampling)
        labels = np.ascontiguousarray(resample_labels(labels, shape, alone, plan.mask_resampling))
    bbox = tuple((side.start, side.stop) for side in box)
    voxel_map = VoxelMap(plan.transpose_forward, bbox, permuted.shape, shape)
    return Preprocessed(image[np.newaxis], labels, tuple(target), voxel_map)


def normalize(image: np.ndarray, scheme: str, intensity: Intensity | None, inside: np.ndarray | None = None) -> None:
    """Normalise a float32 array in place by one of nnU-Net's schemes. ``inside`` (bool) restricts the z-score."""
    if scheme == "CTNormalization":
        np.clip(image, intensity.percentile_00_5, intensity.percentile_99_5, out=image)
        image -= intensity.mean
        image /= max(intensity.std, _EPSILON)
    elif scheme == "ZScoreNormalization":
        values = image if inside is None else image[inside]
        values = (values - values.mean()) / max(values.std(), _EPSILON)
        image[... if inside is None else inside] = values
    elif scheme == "RescaleTo01Normalization":
        image -= image.min()
        image /= max(image.max(), _EPSILON)
    elif scheme != "NoNormalization":
        raise ValueError(f"unknown normalisation scheme '{scheme}'")


def _nonzero_box(array: np.ndarray, volume: Volume) -> tuple[slice, slice, slice]:
    """nnU-Net fills the holes of the nonzero mask first; holes lie inside the box, so it is not needed here."""
    nonzero = array != 0
    occupied = [np.flatnonzero(nonzero.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1))]
    if not occupied[0].size:
        raise InputError(f"{volume.path}: every voxel is zero, expected a CT image")
    return tuple(slice(int(indices[0]), int(indices[-1]) + 1) for indices in occupied)
