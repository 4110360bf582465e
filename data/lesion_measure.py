"""Lesions of a mask in numbers: how many, how large, on which side, at which height.

Arrays have axes [Z, Y, X] with +x to the patient's left and +z superior (LPS, as ``data.imaging.nifti`` reads them).
A lesion is a 26-connected component of one mask value. Its diameter is the longest distance between two
voxels of one axial slice, centre to centre, plus one pixel. Its side is that of its centre of mass against
the middle of the lungs; its zone the third of its lung's height that holds the centre of mass.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from config.errors import InputError

AIR_HU = -400.0  # below it, inside the body, is lung (or air in the bowel and the airways)
_MIN_LUNG_ML = 200.0
_MIN_SHARE = 0.05  # of all air inside the body; a smaller component is gas of the stomach or the bowel
_HULL_POINTS = 50  # fewer than this are compared pair by pair


@dataclass(frozen=True)
class LungBox:
    """Where the lungs lie: ``middle_x`` between them, and of each side (low z, high z), all in voxels."""

    middle_x: float
    left: tuple[float, float]
    right: tuple[float, float]


@dataclass(frozen=True)
class Lesion:
    """One component of a mask; the centre in voxels, z from the lowest slice."""

    label: int
    name: str
    volume_mm3: float
    diameter_mm: float
    side: str
    zone: str
    z: float
    y: float
    x: float


def find_lungs(hu: np.ndarray, spacing: tuple[float, float, float]) -> LungBox:
    """The box of the lungs of a chest CT: the air inside the body, without what is small.

    Args:
        hu: [Z, Y, X] HU.
        spacing: (z, y, x) mm.

    Raises:
        InputError: less than 200 ml of air on one side of the body's middle.
    """
    air = hu < AIR_HU
    # Air that reaches the border of its slice is outside the body.
    inside = np.zeros_like(air)
    for z in range(len(air)):
        parts, _ = ndimage.label(air[z])
        edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
        inside[z] = (parts > 0) & ~np.isin(parts, np.unique(edge))
    inside = ndimage.binary_opening(inside, np.ones((1, 3, 3), bool))
    parts, _ = ndimage.label(inside)
    sizes = np.bincount(parts.ravel())
    inside &= (sizes >= _MIN_SHARE * sizes[1:].sum())[parts]
    per_x = inside.sum((0, 1)).astype(float)
    if not per_x.any():
        raise InputError("no air inside the body: this is no chest CT in HU; give the lung's box, or check the units")
    middle = float((per_x * np.arange(len(per_x))).sum() / per_x.sum())
    bounds = {}
    split = round(middle)
    for side, part in (("right", inside[:, :, :split]), ("left", inside[:, :, split:])):
        area = part.sum((1, 2))
        volume = area.sum() * float(np.prod(spacing)) / 1000
        if volume < _MIN_LUNG_ML:
            raise InputError(
                f"only {volume:.0f} ml of air in the {side} half of the chest; at least {_MIN_LUNG_ML:.0f} ml are "
                "expected of a lung: give the lung's box"
            )
        held = np.flatnonzero(area > 0.03 * area.max())
        bounds[side] = (float(held[0]), float(held[-1]))
    return LungBox(middle, bounds["left"], bounds["right"])


def measure_lesions(
    mask: np.ndarray,
    spacing: tuple[float, float, float],
    lungs: LungBox,
    names: Mapping[int, str] | None = None,
    min_volume_mm3: float = 0.0,
) -> list[Lesion]:
    """Every lesion of a mask, by label and then by falling volume.

    Args:
        mask: [Z, Y, X] integers, 0 is background.
        spacing: (z, y, x) mm.
        lungs: of :func:`find_lungs`, or known.
        names: of the labels; a label without one is called ``label N``.
        min_volume_mm3: smaller components are left out.

    Raises:
        InputError: the mask is not 3-D or not of integers.
    """
    if mask.ndim != 3 or not np.issubdtype(mask.dtype, np.integer):
        raise InputError(f"a mask must be a 3-D array of integers, not {mask.ndim}-D {mask.dtype}")
    voxel = float(np.prod(spacing))
    found = []
    for label in (int(v) for v in np.unique(mask) if v != 0):
        parts, _ = ndimage.label(mask == label, np.ones((3, 3, 3), bool))
        for index, box in enumerate(ndimage.find_objects(parts), 1):
            solid = parts[box] == index
            volume = float(solid.sum()) * voxel
            if volume < min_volume_mm3:
                continue
            z, y, x = (float(axis.mean()) + cut.start for axis, cut in zip(np.nonzero(solid), box, strict=True))
            side = "left" if x > lungs.middle_x else "right"
            name = (names or {}).get(label, f"label {label}")
            diameter = longest_axial_diameter(solid, (spacing[1], spacing[2]))
            found.append(Lesion(label, name, volume, diameter, side, _zone(z, getattr(lungs, side)), z, y, x))
    return sorted(found, key=lambda lesion: (lesion.label, -lesion.volume_mm3))


def count_lesions(lesions: Sequence[Lesion]) -> dict[str, int]:
    """Number of lesions by name."""
    counts: dict[str, int] = {}
    for lesion in lesions:
        counts[lesion.name] = counts.get(lesion.name, 0) + 1
    return counts


def longest_axial_diameter(solid: np.ndarray, pixel: tuple[float, float]) -> float:
    """Longest diameter in mm over the slices of a boolean [Z, Y, X]; ``pixel`` is (y, x) in mm. 0 if empty."""
    longest = 0.0
    for plane in solid:
        points = np.argwhere(plane) * np.asarray(pixel)
        if len(points):
            longest = max(longest, _farthest(points) + float(np.sqrt(pixel[0] * pixel[1])))
    return longest


def write_lesions(path: Path, rows: Mapping[str, Sequence[Lesion]]) -> None:
    """Write a CSV, one lesion a line after its case; a case without a lesion has one line with an empty label."""
    columns = ["case", *(field.name for field in fields(Lesion))]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The mark at the start lets Excel read the file as UTF-8.
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        for case, lesions in rows.items():
            for lesion in lesions:
                values = {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(lesion).items()}
                writer.writerow({"case": case, **values})
            if not lesions:
                writer.writerow({"case": case})


def _zone(z: float, bounds: tuple[float, float]) -> str:
    """Third of the lung's height, slice borders included; above or below the lung the nearest third."""
    low, high = bounds
    part = (z - (low - 0.5)) / (high - low + 1)
    return ("lower", "middle", "upper")[int(np.clip(part * 3, 0, 2))]


def _farthest(points: np.ndarray) -> float:
    """Largest distance between two of the points [N, 2]."""
    if len(points) > _HULL_POINTS:
        try:
            points = points[ConvexHull(points).vertices]
        except QhullError:  # all on one line: its ends are extreme in both coordinates
            points = np.stack([points[np.lexsort(points.T)[0]], points[np.lexsort(points.T)[-1]]])
    return float(pdist(points).max()) if len(points) > 1 else 0.0
