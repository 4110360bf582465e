"""View selection: which slices, or which patch, of a preprocessed volume the encoder gets, and where lesions lie there.

    policy    2-D: K slices                                          3-D: one patch
    auto      slices that show the lesions, others spread evenly     around the largest lesion
    mask      slices that show the lesions, then their neighbours    the same
    nnunet    as mask                                                the same
    middle    around the middle                                      in the middle
    uniform   spread evenly over the scan                            the whole depth; deeper volumes skip planes evenly

The lesions are those that the volume carries, of a mask or of nnU-Net's segmentation. Without one, ``auto`` does as
``uniform``, ``mask`` and ``nnunet`` do as ``middle``.
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
from data.findings import FindingRecord
from data.lesions import Lesion, Span, covering_slices, lesion_of_each

SPREAD_OF = 3  # with policy auto, one slice of so many shows no lesion: effusions and emphysema are not segmented
MOST_CASES = 0.95  # of the training cases have all their lesions shown, where the budget allows it
SLICE_TOKENS = 16  # a slice of fewer than 4 x 4 tokens says too little of places
ROI_MARGIN = 0.25  # on each side, of the lesion's longer side: part of the size in ``View.roi``


class View(NamedTuple):
    """What the encoder and the bridge get of a volume.

    ``images``: (K, C_in, H, W) or (C_in, z, y, x). ``slice_position``: (K,), craniocaudal level, 0 lowest to 1 highest.
    ``roi``: (K, 4), the lesion assigned to each slice or depth plane: row and column of its core, its size (longer side
    and margin), as fractions, and 1; zeros where no lesion is assigned. The fractions are of the image after
    :meth:`ViewSelection.select`, and of the feature grid after :meth:`ViewSelection.finish`.
    """

    images: np.ndarray | Tensor
    slice_position: Tensor
    roi: Tensor


class EncoderGeometry(Protocol):
    """The attributes of :class:`models.nnunet.encoder.NnUNetEncoder` that view selection needs."""

    total_stride: tuple[int, ...]
    receptive_field_offset: tuple[float, ...]


class ViewSelection:
    """Chooses what the encoder gets of a preprocessed volume.

    A 2-D slice keeps its whole extent: padded with zeros to the plan's patch, as nnU-Net pads, or, where it is larger,
    to the next multiple of the encoder's stride. A 3-D patch has the plan's size.
    """

    def __init__(
        self,
        plan: PreprocessPlan,
        stride: Sequence[int],
        slices: int,
        policy: SlicePolicy,
        augmentation: Augmentation | None = None,
        receptive_field_offset: Sequence[float] | None = None,
        min_lesion_mm3: float = 0.0,
    ) -> None:
        """
        Args:
            augmentation: for training; by default nothing is changed.
            receptive_field_offset: of the encoder's features, in voxels per axis; by default zero.
            min_lesion_mm3: smaller lesions of a segmentation are left out; those of a mask are all kept.
        """
        self.offset = tuple(receptive_field_offset or [0.0] * plan.dim)
        self.augmentation = augmentation or Augmentation()
        self.patch_size = tuple(plan.patch_size)
        self.stride = tuple(stride)
        self.slices = slices
        self.policy = policy
        self.min_lesion_mm3 = min_lesion_mm3

    @classmethod
    def from_config(
        cls, config: Config, plan: PreprocessPlan, encoder: EncoderGeometry, augmentation: Augmentation | None = None
    ) -> ViewSelection:
        """The view selection that ``config`` describes, for ``encoder``."""
        offset = encoder.receptive_field_offset
        policy, specks = config.slice_policy, config.min_lesion_mm3 or 0.0
        return cls(plan, encoder.total_stride, config.slices or 1, policy, augmentation, offset, specks)

    def __call__(self, volume: CachedVolume) -> View:
        """:meth:`select`, then :meth:`finish`."""
        return self.finish(self.select(volume))

    def select(self, volume: CachedVolume) -> View:
        """Read the view from the disk; the same every time. ``images`` is an array."""
        starts, sizes = self.box(volume)
        if len(self.patch_size) == 2:
            chosen = self.chosen_slices(volume)
            images = np.stack([centred(volume.image.plane(index), sizes[1:]) for index in chosen])
            ranges = [(index, index + 1) for index in chosen]
            position = (torch.tensor(chosen, dtype=torch.float32) + 0.5) / volume.image.shape[1]
        else:
            images = self._patch(volume, starts, sizes)
            depth = sizes[0] / self.slices  # voxels per plane of features
            lower = [starts[0] + k * depth for k in range(self.slices)]
            offset = self.offset_fractions(sizes)[0] * sizes[0]
            ranges = [(round(z - offset), max(round(z - offset + depth), round(z - offset) + 1)) for z in lower]
            position = ((torch.tensor(lower) + depth / 2) / volume.image.shape[1]).clamp(0, 1)
        if volume.first_slice_is_highest:
            position = 1 - position
        assigned = zip(lesion_of_each(self._kept(volume), ranges), ranges, strict=True)
        roi = torch.tensor([_roi(lesion, span, starts, sizes) for lesion, span in assigned])
        return View(images, position, roi)

    def finish(self, view: View, generator: torch.Generator | None = None) -> View:
        """A copy, randomly augmented where the configuration says so, with ``roi`` in fractions of the feature grid."""
        kept = torch.from_numpy(view.images)
        images, roi = self.augmentation(kept, view.roi, generator)
        roi = roi + roi[:, 3:] * torch.tensor([*self.offset_fractions(images.shape[-3:])[1:], 0.0, 0.0])
        return View(images.clone() if images is kept else images, view.slice_position, roi)

    def chosen_slices(self, volume: CachedVolume) -> list[int]:
        """Indices of the K slices of a 2-D encoder, ascending."""
        depth, lesions = volume.image.shape[1], self.lesions(volume)
        if self.policy == "uniform" or self.policy == "auto" and not lesions:
            return spread_slices(depth, self.slices)
        if len(lesions) == len(volume.lesions) and volume.lesion_voxels is not None:
            area = volume.lesion_voxels
        else:  # without the specks
            area = np.array([sum(lesion.area(z) for lesion in lesions) for z in range(depth)])
        if self.policy == "auto":
            shown = covering_slices(lesions, area, min(len(lesions), self.slices - self.slices // SPREAD_OF))
            return sorted([*shown, *spread_slices(depth, self.slices - len(shown), without=shown)])
        return choose_slices(area, depth, self.slices, lesions)

    def box(self, volume: CachedVolume) -> tuple[list[int], list[int]]:
        """First voxel (below 0 with padding) and number of voxels of the encoder's input, along each axis.

        Along z of a 2-D encoder it is the whole volume, from which slices are taken.
        """
        shape = volume.image.shape[1:]
        if len(self.patch_size) == 2:
            sizes = [
                max(patch, -(-extent // stride) * stride)
                for patch, extent, stride in zip(self.patch_size, shape[1:], self.stride, strict=True)
            ]
            return [0, *(-((s - e) // 2) for s, e in zip(sizes, shape[1:], strict=True))], [shape[0], *sizes]
        lesions = self.lesions(volume)
        centre = [(low + high) / 2 for low, high in lesions[0].box] if lesions else [extent / 2 for extent in shape]
        starts = []
        for c, patch, extent in zip(centre, self.patch_size, shape, strict=True):
            start = int(np.clip(round(c - patch / 2), 0, max(extent - patch, 0)))
            starts.append(start - max(patch - extent, 0) // 2)
        sizes = list(self.patch_size)
        if (self.policy == "uniform" or self.policy == "auto" and not lesions) and shape[0] > sizes[0]:
            starts[0], sizes[0] = 0, shape[0]
        return starts, sizes

    def offset_fractions(self, sizes: Sequence[int]) -> tuple[float, ...]:
        """The features' receptive-field offset along z, y, x, as fractions of ``sizes``, which :meth:`box` gives.

        A feature sees the image best this far before the middle of its cell: adding it turns a position in the image
        into one in the feature grid. It is 0 along z of a 2-D encoder; a volume with skipped planes counts kept ones.
        """
        flat = len(self.patch_size) == 2
        kept = sizes if flat else (self.patch_size[0], *sizes[1:])
        return tuple(voxels / size for voxels, size in zip((0.0,) * flat + self.offset, kept, strict=True))

    def lesions(self, volume: CachedVolume) -> Sequence[Lesion]:
        """The lesions that the view is selected by, largest first."""
        return self._kept(volume) if self.policy in ("auto", "mask", "nnunet") else ()

    def measured(self, volume: CachedVolume) -> list[FindingRecord] | None:
        """The lesions as findings measured on the scan's own grid, largest first, without the specks; None where nobody
        looked for any."""
        if volume.lesions_from is None:
            return None
        least = self.min_lesion_mm3 if volume.lesions_from == "segmentation" else 0.0
        return [finding for finding in volume.findings if finding.measured.volume_mm3 >= least]

    def _kept(self, volume: CachedVolume) -> Sequence[Lesion]:
        if volume.lesions_from != "segmentation":
            return volume.lesions
        least = self.min_lesion_mm3 / float(np.prod(volume.spacing))
        return [lesion for lesion in volume.lesions if lesion.voxels >= least]

    def _patch(self, volume: CachedVolume, starts: Sequence[int], sizes: Sequence[int]) -> np.ndarray:
        rows, columns = (slice(max(s, 0), s + size) for s, size in zip(starts[1:], sizes[1:], strict=True))
        planes = self.patch_size[0]
        if sizes[0] > planes:  # deeper than the patch: planes are skipped
            taken = [volume.image.plane(int((k + 0.5) * sizes[0] / planes)) for k in range(planes)]
            block = np.stack([plane[..., rows, columns] for plane in taken], axis=1)
        else:
            last = min(starts[0] + sizes[0], volume.image.shape[1])
            block = volume.image.planes(max(starts[0], 0), last)[..., rows, columns]
        return centred(block, self.patch_size)


def slices_for(lesions: Sequence[int], max_tokens: int, lesion_tokens: int = 0) -> int:
    """Slices per case that show nearly all lesions and some of the rest of the scan, within the token budget.

    Args:
        lesions: number of lesions of each training case.
        max_tokens, lesion_tokens: the budget, and the tokens around a slice's lesion.
    """
    wanted = int(np.quantile(list(lesions) or [0], MOST_CASES, method="higher"))
    count = SPREAD_OF
    while count - count // SPREAD_OF < wanted:
        count += 1
    return max(1, min(count, max_tokens // (SLICE_TOKENS + lesion_tokens)))


def spread_slices(depth: int, count: int, without: Sequence[int] = ()) -> list[int]:
    """Indices of ``count`` slices, evenly spread; in place of one of ``without``, the nearest free one."""
    chosen: list[int] = []
    for k in range(count):
        middle = int((k + 0.5) / count * depth)
        free = [z for z in range(depth) if z not in without and z not in chosen] or [middle]
        chosen.append(min(free, key=lambda z: abs(z - middle)) if without else middle)
    return chosen


def choose_slices(lesion_voxels: np.ndarray, depth: int, count: int, lesions: Sequence[Lesion] = ()) -> list[int]:
    """Indices of ``count`` slices, ascending: those that show the lesions where there are any, else the middle ones.

    ``lesion_voxels``: (z,), of all lesions. With fewer lesion slices than ``count``, the neighbours of the one with
    most lesion follow. A volume of fewer slices than ``count`` repeats its last one, so that every case has K slices.
    """
    centre = depth // 2
    order: list[int] = []
    if lesion_voxels.any():
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


def _roi(lesion: Lesion | None, span: Span, starts: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Row and column of a lesion's core in the slices of ``span``, its longer side with a margin, and 1; as fractions
    of the image."""
    if lesion is None:
        return [0.0] * 4
    core = lesion.core(max(range(*span), key=lesion.area))
    centre = [(at + 0.5 - start) / size for at, start, size in zip(core, starts[1:], sizes[1:], strict=True)]
    side = max((high - low) / size for (low, high), size in zip(lesion.box[1:], sizes[1:], strict=True))
    return [*centre, side * (1 + 2 * ROI_MARGIN), 1.0]
