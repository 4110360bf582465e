"""nnU-Net's sliding window: a volume of any size through a network of one patch size.

    image (C, z, y, x) → tiles that overlap by half → logits, weighted by a Gaussian → labels (z, y, x)

2-D networks see slice by slice, 3-D ones blocks. Mirroring, which nnU-Net averages over at test time, is left out:
it costs four to eight times as much, and here the labels choose slices.

Source: nnU-Net 2.8.1, ``nnunetv2/inference/sliding_window_prediction.py`` and ``predict_from_raw_data.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

_PEAK = 10.0  # of the weights, as nnU-Net has it: half precision has room on both sides


def tile_starts(extent: int, patch: int) -> list[int]:
    """First voxels of tiles of ``patch`` voxels that cover ``extent``, evenly spaced, at most half a patch apart."""
    if extent <= patch:
        return [0]
    count = math.ceil((extent - patch) / (patch / 2)) + 1
    return [round((extent - patch) * k / (count - 1)) for k in range(count)]


@lru_cache(maxsize=8)
def tile_weight(patch: tuple[int, ...]) -> Tensor:
    """Weights (*patch): a Gaussian of an eighth of the patch, nowhere zero, so that a corner counts in the end."""
    point = np.zeros(patch)
    point[tuple(size // 2 for size in patch)] = 1
    weight = gaussian_filter(point, [size / 8 for size in patch], mode="constant")
    weight *= _PEAK / weight.max()
    return torch.from_numpy(np.maximum(weight, weight[weight > 0].min())).float()


@contextmanager
def _one_size() -> Iterator[None]:
    """cuDNN looks for the fastest algorithms: every tile has the same size."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@torch.inference_mode()
@_one_size()
def sliding_window(network: Callable[[Tensor], Tensor], images: Tensor, patch: Sequence[int]) -> Tensor:
    """Logits (B, classes, *space), float32, of images (B, C, *space); ``space`` has as many axes as ``patch``.

    The network sees one place of all B images at a time. What is smaller than the patch is padded with zeros on both
    sides, the mean after normalisation.
    """
    space = images.shape[2:]
    padding = [max(size - extent, 0) for size, extent in zip(patch, space, strict=True)]
    sides = [side for missing in reversed(padding) for side in (missing // 2, missing - missing // 2)]
    padded = torch.nn.functional.pad(images, sides)
    weight = tile_weight(tuple(patch)).to(images.device)
    sums = torch.zeros(padded.shape[2:], device=images.device)
    total = None
    for start in itertools.product(*map(tile_starts, padded.shape[2:], patch)):
        tile = tuple(slice(s, s + size) for s, size in zip(start, patch, strict=True))
        logits = network(padded[:, :, *tile]).float()
        if total is None:
            total = torch.zeros(*logits.shape[:2], *padded.shape[2:], device=images.device)
        total[:, :, *tile] += logits * weight
        sums[tile] += weight
    inner = tuple(slice(missing // 2, missing // 2 + extent) for missing, extent in zip(padding, space, strict=True))
    return (total / sums)[:, :, *inner]


def labels_of(logits: Tensor, *, regions: bool) -> Tensor:
    """uint8 (B, *space) from logits (B, classes, *space): the likeliest class, or, of overlapping regions, the last of
    those that are likelier than not."""
    if not regions:
        # As argmax, which walks over channels that lie far apart ten times slower on a CPU.
        best, labels = logits[:, 0], torch.zeros_like(logits[:, 0], dtype=torch.uint8)
        for number in range(1, logits.shape[1]):
            labels.masked_fill_(logits[:, number] > best, number)
            best = torch.maximum(best, logits[:, number])
        return labels
    numbers = torch.arange(1, logits.shape[1] + 1, device=logits.device).view(1, -1, *[1] * (logits.ndim - 2))
    return ((logits > 0) * numbers).amax(1).to(torch.uint8)
