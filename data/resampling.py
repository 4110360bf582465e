"""Resampling of volumes and label maps that equals nnU-Net's, computed one axis at a time.

nnU-Net resizes with ``skimage.transform.resize``, i.e. ``scipy.ndimage.zoom`` with ``grid_mode=True`` and edge padding,
then clips to the input's range. Before the clip this is linear and separable, so it is one small matrix per axis, which
is scipy's own response to unit vectors. On a 512 x 512 x 300 volume, three matrix products take seconds, the 4 x 4 x 4
stencil of the original half a minute.

Arrays have three axes; shapes are in array order. Labels are resampled one by one, as indicator volumes.

Source: nnU-Net 2.8.1, ``nnunetv2/preprocessing/resampling/default_resampling.py``, with ``resize_segmentation``
of batchgenerators 0.25.5 (older releases gave a tie to the larger label).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage

from config.nnunet_plans import Resampling

_TIE = 2e-6  # equal covers differ by float32 rounding; others by far more


def new_shape(shape: Sequence[int], spacing: Sequence[float], target: Sequence[float]) -> tuple[int, ...]:
    """Shape after going from ``spacing`` to ``target`` (mm); Python's rounding, halves to even, as nnU-Net."""
    return tuple(int(round(old / new * length)) for old, new, length in zip(spacing, target, shape, strict=True))


def separate_axis(spacing: Sequence[float], target: Sequence[float], settings: Resampling) -> int | None:
    """The axis that is resampled on its own because its spacing is far coarser, or None.

    The current spacing is judged first, then the target. Two equally coarse axes are not separated.
    """
    judged = spacing if settings.force_separate_z else None
    if settings.force_separate_z is None:
        threshold = settings.separate_z_anisotropy_threshold
        judged = next((s for s in (spacing, target) if max(s) / min(s) > threshold), None)
    if judged is None:
        return None
    coarsest = [axis for axis, step in enumerate(judged) if max(judged) / step == 1]
    return coarsest[0] if len(coarsest) == 1 else None


def resample_image(image: np.ndarray, shape: Sequence[int], alone: int | None, settings: Resampling) -> np.ndarray:
    """Resample a float32 volume to ``shape``; ``alone`` is what :func:`separate_axis` returned.

    The result never leaves the range of the input (of the input's slice where an axis stands alone), which cubic
    splines would overshoot at edges. Where nothing changes it is ``image`` itself.
    """
    axes = tuple(axis for axis in range(3) if axis != alone)
    resampled = _along_axes(image, shape, axes, settings.order)
    if resampled is not image:
        low, high = image.min(axis=axes, keepdims=True), image.max(axis=axes, keepdims=True)
        np.clip(resampled, low, high, out=resampled)
    if alone is None:
        return resampled
    if settings.order_z == 0:
        return _nearest(resampled, alone, shape[alone])
    return _along_axes(resampled, shape, (alone,), settings.order_z)


def resample_labels(labels: np.ndarray, shape: Sequence[int], alone: int | None, settings: Resampling) -> np.ndarray:
    """Resample a label volume (0 is background, dtype kept) to ``shape``.

    With ``order`` 1 a voxel gets the label whose linearly resampled indicator is largest; of labels that tie (at every
    other boundary voxel of an even factor) the nearest voxel's, or else the smallest.
    """
    axes = [axis for axis in range(3) if axis != alone]
    if settings.order == 0:
        for axis in axes:
            labels = _nearest(labels, axis, shape[axis])
    else:
        labels = _labels_by_largest_cover(labels, shape, axes)
    return labels if alone is None else _nearest(labels, alone, shape[alone])


@lru_cache(maxsize=64)
def spline_matrix(source: int, target: int, order: int) -> np.ndarray:
    """(target, source) float64 matrix of the 1D spline resize of that order; do not write to it."""
    matrix = ndimage.zoom(np.eye(source), (target / source, 1.0), order=order, mode="nearest", grid_mode=True)
    matrix.flags.writeable = False
    return matrix


def _along_axes(image: np.ndarray, shape: Sequence[int], axes: Sequence[int], order: int) -> np.ndarray:
    """``image`` itself where no axis changes; never written to."""
    changing = [axis for axis in axes if image.shape[axis] != shape[axis]]
    # Shrinking axes first: every later pass then works on less.
    for axis in sorted(changing, key=lambda axis: shape[axis] / image.shape[axis]):
        matrix = spline_matrix(image.shape[axis], shape[axis], order)
        image = _apply(matrix.astype(image.dtype), image, axis)
    return image


def _apply(matrix: np.ndarray, volume: np.ndarray, axis: int) -> np.ndarray:
    """Multiply ``axis`` of a 3D ``volume`` by ``matrix`` (target, source) without transposing the volume."""
    if axis == 0:
        return np.tensordot(matrix, volume, axes=1)
    return matrix @ volume if axis == 1 else volume @ matrix.T


def _nearest(volume: np.ndarray, axis: int, length: int) -> np.ndarray:
    if volume.shape[axis] == length:
        return volume
    centres = volume.shape[axis] / length * (np.arange(length) + 0.5) - 0.5
    index = np.floor(np.clip(centres, 0, volume.shape[axis] - 1) + 0.5).astype(np.intp)
    return np.take(volume, index, axis=axis)


def _labels_by_largest_cover(labels: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    changing = [axis for axis in axes if labels.shape[axis] != shape[axis]]
    nearest = labels
    for axis in changing:
        nearest = _nearest(nearest, axis, shape[axis])
    if not changing or not labels.any():
        return nearest
    covers = [
        (label, *_cover(labels[box] == label, box, labels.shape, shape, changing))
        for label, box in enumerate(ndimage.find_objects(labels), start=1)
        if box is not None
    ]
    reach = tuple(
        slice(min(window[axis].start for _, window, _ in covers), max(window[axis].stop for _, window, _ in covers))
        for axis in range(3)
    )
    nearest[reach] = _largest(nearest[reach], covers, [side.start for side in reach])
    return nearest


def _largest(nearest: np.ndarray, covers: Sequence[tuple], origin: Sequence[int]) -> np.ndarray:
    """The winning label per voxel. ``covers``: (label, window, cover), labels ascending; ``nearest`` begins at
    ``origin``."""
    background = np.ones(nearest.shape, dtype=np.float32)
    best, of_nearest = np.zeros_like(background), np.zeros_like(background)
    winner = np.zeros_like(nearest)
    for label, box, cover in covers:
        window = tuple(slice(b.start - first, b.stop - first) for b, first in zip(box, origin, strict=True))
        background[window] -= cover
        larger = cover > best[window] + _TIE
        winner[window][larger] = label
        best[window][larger] = cover[larger]
        of_nearest[window] = np.where(nearest[window] == label, cover, of_nearest[window])
    # The indicators of all labels sum to one, which saves resampling the background's.
    winner[background >= best - _TIE] = 0
    np.maximum(best, background, out=best)
    of_nearest = np.where(nearest == 0, background, of_nearest)
    return np.where(of_nearest >= best - _TIE, nearest, winner)


def _cover(
    indicator: np.ndarray, box: tuple[slice, ...], source: Sequence[int], target: Sequence[int], axes: Sequence[int]
) -> tuple[tuple[slice, ...], np.ndarray]:
    """Linearly resample an ``indicator`` that fills ``box`` of ``source``: the window it reaches, its values.

    Only the label's own box is computed: a lesion is a tiny part of a CT.
    """
    cover = indicator.astype(np.float32)
    window = list(box)
    for axis in axes:
        matrix = spline_matrix(source[axis], target[axis], 1)[:, box[axis]]
        reached = np.flatnonzero(matrix.any(axis=1))
        start, stop = (int(reached[0]), int(reached[-1]) + 1) if reached.size else (0, 0)
        window[axis] = slice(start, stop)
        cover = _apply(np.ascontiguousarray(matrix[start:stop], dtype=np.float32), cover, axis)
    return tuple(window), cover
