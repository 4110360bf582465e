"""What the encoder sees of a preprocessed volume: which slices, or which patch, and where the lesion lies in them.

    policy    2-D: K slices                                 3-D: one patch
    mask      those that show the lesions of the mask       around the largest lesion of the mask
    nnunet    the same, of nnU-Net's own segmentation       the same (the volume then carries that as its mask)
    middle    around the middle                             in the middle
    uniform   spread evenly over the scan                   over the whole depth, planes left out where it is deeper

Without a lesion, ``mask`` and ``nnunet`` do as ``middle``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from config.nnunet_plans import PreprocessPlan
from config.schema import Config, SlicePolicy
from data.augmentation import Augmentation
from data.cache import CachedVolume
from data.lesions import Lesion, Span, covering_slices, lesion_of_each

ROI_MARGIN = 0.25  # of the lesion's longer side, on each side of it: part of the size that the bridge is told


class View(NamedTuple):
    """What is seen of a volume.

    ``images``: (K, C_in, H, W) or (C_in, z, y, x). ``slice_position``: (K,), 0 lowest to 1 highest.
    ``roi``: (K, 4), for each slice or depth plane the square of its lesion: row and column of the lesion's core, its
    size (longer side and margin), all as shares, and 1. Of :meth:`Framing.cut` they are shares of the image, of
    :meth:`Framing.changed` of the grid of features. Every lesion has one square, in the slice that shows it best; a
    slice that has none to show, or only what another one shows better, has a row of zeros.
    """

    images: np.ndarray | Tensor
    slice_position: Tensor
    roi: Tensor


class SeesVoxels(Protocol):
    """An encoder, as far as framing needs to know it; see :class:`models.nnunet.encoder.NnUNetEncoder`."""

    total_stride: tuple[int, ...]
    lead: tuple[float, ...]


class Framing:
    """Chooses what the encoder sees of a preprocessed volume.

    A 2-D slice keeps its whole extent: padded to the plan's patch with zeros, as nnU-Net pads, and
    where it is larger, to the next multiple of the encoder's stride. A 3-D patch has the plan's size.
    """

    def __init__(
        self,
        plan: PreprocessPlan,
        stride: Sequence[int],
        slices: int,
        policy: SlicePolicy,
        augmentation: Augmentation | None = None,
        lead: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
            augmentation: for training; by default nothing is changed.
            lead: of the encoder's features, in voxels per axis; by default none.
        """
        self.lead = tuple(lead or [0.0] * plan.dim)
        self.augmentation = augmentation or Augmentation()
        self.patch_size = tuple(plan.patch_size)
        self.stride = tuple(stride)
        self.slices = slices
        self.policy = policy

    @classmethod
    def of(
        cls, config: Config, plan: PreprocessPlan, encoder: SeesVoxels, augmentation: Augmentation | None = None
    ) -> Framing:
        """As ``config`` says, for ``encoder``."""
        stride, lead = encoder.total_stride, encoder.lead
        return cls(plan, stride, config.slices, config.slice_policy, augmentation, lead)

    def __call__(self, volume: CachedVolume) -> View:
        """What the encoder and the bridge are given: :meth:`cut`, :meth:`changed`."""
        return self.changed(self.cut(volume))

    def cut(self, volume: CachedVolume) -> View:
        """The same every time: what is read of the disk. ``images`` is an array."""
        starts, sizes = self.box(volume)
        if len(self.patch_size) == 2:
            chosen = self.chosen_slices(volume)
            images = np.stack([centred(volume.image.plane(index), sizes[1:]) for index in chosen])
            ranges = [(index, index + 1) for index in chosen]
            position = (torch.tensor(chosen, dtype=torch.float32) + 0.5) / volume.image.shape[1]
        else:
            images = self._patch(volume, starts, sizes)
            height = sizes[0] / self.slices  # of what one of the K planes of features stands for
            lower = [starts[0] + k * height for k in range(self.slices)]
            ahead = self.lead_shares(sizes)[0] * sizes[0]  # a plane sees best what lies before its middle
            seen = [z - ahead for z in lower]
            ranges = [(round(z), max(round(z + height), round(z) + 1)) for z in seen]
            position = ((torch.tensor(lower) + height / 2) / volume.image.shape[1]).clamp(0, 1)
        if volume.first_slice_is_highest:
            position = 1 - position
        shown = zip(lesion_of_each(volume.lesions, ranges), ranges, strict=True)
        roi = torch.tensor([_square(lesion, span, starts, sizes) for lesion, span in shown])
        return View(images, position, roi)

    def changed(self, view: View) -> View:
        """A copy, changed at random where asked for: a sample may be written to, what is kept not.

        Squares then lie in the grid of features, which see what is ``lead`` voxels before the middle of their cells.
        """
        kept = torch.from_numpy(view.images)
        images, roi = self.augmentation(kept, view.roi)
        roi = roi + roi[:, 3:] * torch.tensor([*self.lead_shares(images.shape[-3:])[1:], 0.0, 0.0])
        return View(images.clone() if images is kept else images, view.slice_position, roi)

    def chosen_slices(self, volume: CachedVolume) -> list[int]:
        """Indices of the K slices of a 2-D encoder, ascending."""
        depth = volume.image.shape[1]
        if self.policy == "uniform":
            return [int((k + 0.5) / self.slices * depth) for k in range(self.slices)]
        lesions = self._lesions(volume)
        return choose_slices(volume.lesion_voxels if lesions else None, depth, self.slices, lesions)

    def box(self, volume: CachedVolume) -> tuple[list[int], list[int]]:
        """First voxel (below 0 with padding) and number of voxels of the encoder's input, along each axis.

        Along z of a 2-D encoder it is the whole volume, out of which slices are taken.
        """
        shape = volume.image.shape[1:]
        if len(self.patch_size) == 2:
            sizes = [
                max(patch, -(-extent // stride) * stride)
                for patch, extent, stride in zip(self.patch_size, shape[1:], self.stride, strict=True)
            ]
            return [0, *(-((s - e) // 2) for s, e in zip(sizes, shape[1:], strict=True))], [shape[0], *sizes]
        lesions = self._lesions(volume)
        centre = [(low + high) / 2 for low, high in lesions[0].box] if lesions else [extent / 2 for extent in shape]
        starts = []
        for c, patch, extent in zip(centre, self.patch_size, shape, strict=True):
            start = int(np.clip(round(c - patch / 2), 0, max(extent - patch, 0)))
            starts.append(start - max(patch - extent, 0) // 2)
        sizes = list(self.patch_size)
        if self.policy == "uniform" and shape[0] > sizes[0]:
            starts[0], sizes[0] = 0, shape[0]
        return starts, sizes

    def lead_shares(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """The features' lead along z, y, x as shares of what :meth:`box` gives; 0 along z of a 2-D encoder, and of a
        thinned volume in planes that were kept."""
        flat = len(self.patch_size) == 2
        seen = sizes if flat else (self.patch_size[0], *sizes[1:])
        return tuple(lead / size for lead, size in zip((0.0, *self.lead) if flat else self.lead, seen, strict=True))

    def _lesions(self, volume: CachedVolume) -> Sequence[Lesion]:
        return volume.lesions if self.policy in ("mask", "nnunet") else ()

    def _patch(self, volume: CachedVolume, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        rows, columns = (slice(max(s, 0), s + size) for s, size in zip(starts[1:], sizes[1:], strict=True))
        planes = self.patch_size[0]
        if sizes[0] > planes:  # thinned
            taken = [volume.image.plane(int((k + 0.5) * sizes[0] / planes)) for k in range(planes)]
            block = np.stack([plane[..., rows, columns] for plane in taken], axis=1)
        else:
            last = min(starts[0] + sizes[0], volume.image.shape[1])
            block = volume.image.planes(max(starts[0], 0), last)[..., rows, columns]
        return centred(block, self.patch_size)


def choose_slices(
    lesion_voxels: np.ndarray | None, depth: int, count: int, lesions: Sequence[Lesion] = ()
) -> list[int]:
    """Indices of ``count`` slices, ascending: those that show the lesions where there are any, else the middle ones.

    With fewer lesion slices than ``count``, the neighbours of the one with most lesion follow.
    A volume of fewer slices than ``count`` repeats its last one, so that every case has K slices.
    """
    centre = depth // 2
    order: list[int] = []
    if lesion_voxels is not None and lesion_voxels.any():
        order = covering_slices(lesions, lesion_voxels, count)
        centre = order[0]
    nearest = sorted(range(depth), key=lambda index: (abs(index - centre), index))
    order += [index for index in nearest if index not in order][: count - len(order)]
    order += [depth - 1] * (count - len(order))
    return sorted(order)


def centred(plane: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(C, *spatial) zero-padded on both sides to (C, *size); zero is the mean after CT normalisation."""
    missing = [max(target - extent, 0) for target, extent in zip(size, plane.shape[1:], strict=True)]
    return np.pad(np.asarray(plane, dtype=np.float32), [(0, 0), *((m // 2, m - m // 2) for m in missing)])


def _square(lesion: Lesion | None, span: Span, starts: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Row and column of a lesion's core in the slices of ``span``, and its longer side with a margin, as shares of the
    image."""
    if lesion is None:
        return [0.0] * 4
    core = lesion.core(max(range(*span), key=lesion.area))
    centre = [(at + 0.5 - start) / size for at, start, size in zip(core, starts[1:], sizes[1:], strict=True)]
    side = max((high - low) / size for (low, high), size in zip(lesion.box[1:], sizes[1:], strict=True))
    return [*centre, side * (1 + 2 * ROI_MARGIN), 1.0]
