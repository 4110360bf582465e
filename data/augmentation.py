"""Random changes of a training image after which its report is still true.

Movement and rotation in plane, and noise. No mirroring, which would swap sides; no scaling, which would change sizes;
slices keep their craniocaudal level, so zones stay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Augmentation(NamedTuple):
    """How far an image may be changed.

    ``shift``: voxels in plane, to either side. ``rotate``: degrees in plane, to either side. ``noise``: standard
    deviation of Gaussian noise in units of the normalised image, drawn for each case from 0 to this.
    """

    shift: int = 0
    rotate: float = 0.0
    noise: float = 0.0

    def __call__(self, images: Tensor, roi: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """One change for all slices of a case, drawn from ``generator`` (None: torch's own).

        Args:
            images: (..., H, W) float32, 0 is the mean after normalisation and fills what moves in.
            roi: (K, 4) row and column of the lesion's core and its size, as fractions of the image, and 1; zeros where
                there is none.

        Returns:
            Images of the same shape, and ``roi`` where the lesions then lie.
        """
        if self.shift:
            offset = torch.randint(-self.shift, self.shift + 1, (2,), generator=generator).tolist()
            images, roi = shifted(images, (offset[0], offset[1])), _moved(roi, offset, images.shape[-2:])
        if self.rotate:
            angle = math.radians(self.rotate) * (2 * torch.rand((), generator=generator).item() - 1)
            images, roi = rotated(images, angle), _turned(roi, angle, images.shape[-2:])
        if self.noise:
            scale = self.noise * torch.rand((), generator=generator)
            images = images + scale * torch.randn(images.shape, generator=generator)
        return images, roi


def shifted(images: Tensor, offset: tuple[int, int]) -> Tensor:
    """(..., H, W) moved by ``offset`` rows and columns; what moves in is zero, what moves out is lost."""
    if offset == (0, 0):
        return images
    source, target = [], []
    for by, extent in zip(offset, images.shape[-2:], strict=True):
        source.append(slice(max(-by, 0), extent - max(by, 0)))
        target.append(slice(max(by, 0), extent - max(-by, 0)))
    moved = torch.zeros_like(images)
    moved[(..., *target)] = images[(..., *source)]
    return moved


def rotated(images: Tensor, angle: float) -> Tensor:
    """(..., H, W) turned about its centre by ``angle`` radians, from the rows' axis towards the columns'; bilinear."""
    height, width = images.shape[-2:]
    cos, sin = math.cos(angle), math.sin(angle)
    # The inverse rotation: for each target voxel its source, in fractions of the half extents.
    theta = torch.tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
    flat = images.reshape(1, -1, height, width)
    grid = F.affine_grid(theta[None], list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, align_corners=False).view(images.shape)


def _moved(roi: Tensor, offset: list[int], shape: torch.Size) -> Tensor:
    by = torch.tensor([o / extent for o, extent in zip(offset, shape, strict=True)])
    return torch.cat([roi[:, :2] + by * roi[:, 3:], roi[:, 2:]], dim=1)


def _turned(roi: Tensor, angle: float, shape: torch.Size) -> Tensor:
    height, width = shape
    cos, sin = math.cos(angle), math.sin(angle)
    y, x = (roi[:, 0] - 0.5) * height, (roi[:, 1] - 0.5) * width
    turned = torch.stack([(y * cos - x * sin) / height, (y * sin + x * cos) / width], dim=1) + 0.5
    return torch.cat([torch.where(roi[:, 3:] > 0, turned, roi[:, :2]), roi[:, 2:]], dim=1)
