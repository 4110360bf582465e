"""The lesions of a label mask: where they lie, how large they are, and which slices show them.

A :class:`Lesion` is in voxels, whatever its label, and is stored with a preprocessed case: views are selected without
reading the mask. :func:`measure_lesions` measures in mm, with side and zone, on the scan's own grid, and gives
:class:`data.findings.FindingRecord`. Arrays have axes [Z, Y, X], +x to the patient's left, +z superior (LPS).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from config.errors import InputError
from data.findings import LESION, FindingRecord, Measurement, Source
from data.imaging.volume import Volume, turned_to_lps

ZONES = ("upper", "middle", "lower")  # thirds of the lung's craniocaudal extent
MOST = 64  # lesions kept of one case, by size; a mask with more is noise or a disease of the whole lung
AIR_HU = -400.0  # below it, inside the body, is lung (or air in the bowel and the airways)
_MIN_LUNG_ML = 200.0
_MIN_AIR_FRACTION = 0.05  # of all air inside the body; a smaller component is gas of the stomach or the bowel
_HULL_POINTS = 50  # fewer than this are compared pair by pair
_NEAR = np.zeros((3, 3, 3), bool)  # a cross in plane: two voxels are bridged; to one side along z: one slice
_NEAR[1, 1] = _NEAR[1, :, 1] = _NEAR[:2, 1, 1] = True
_TOUCHING = np.ones((3, 3, 3), bool)  # 26-connected
_NEAR_IN_PLANE = _NEAR & (np.arange(3) == 1)[:, None, None]

Span = tuple[int, int]  # first index, and one past the last


@dataclass(frozen=True)
class Lesion:
    """A lesion in voxels.

    ``box``: spans along z, y, x. For each slice of the box, ``areas``: voxels; ``cores``: the point (y, x) of
    :func:`core_of`, (-1, -1) in a slice without voxels.
    """

    box: tuple[Span, Span, Span]
    areas: tuple[int, ...]
    cores: tuple[tuple[int, int], ...]

    @property
    def voxels(self) -> int:
        return sum(self.areas)

    def area(self, z: int) -> int:
        """Voxels in slice ``z``."""
        first, last = self.box[0]
        return self.areas[z - first] if first <= z < last else 0

    def core(self, z: int) -> tuple[int, int]:
        """The point (y, x) in slice ``z`` of the box."""
        return self.cores[z - self.box[0][0]]

    def to_list(self) -> list:
        return [*map(list, self.box), list(self.areas), list(map(list, self.cores))]

    @classmethod
    def from_list(cls, stored: Sequence) -> Lesion:
        *box, areas, cores = stored
        return cls(tuple(map(tuple, box)), tuple(areas), tuple(map(tuple, cores)))


@dataclass(frozen=True)
class LungBox:
    """Extent of the lungs in voxels: ``middle_x`` between them, (low z, high z) of each side, and of both along y and
    x."""

    middle_x: float
    left: tuple[float, float]
    right: tuple[float, float]
    y: tuple[float, float]
    x: tuple[float, float]


# ------------------------------------------------------------------ lesions in voxels, and the slices that show them


def core_of(plane: np.ndarray) -> tuple[int, int]:
    """The point (y, x) inside a lesion that is nearest to its middle; (-1, -1) of an empty plane.

    Holes are filled. Of the voxels at least half as deep as the deepest, it is the nearest to the centre of mass: the
    middle of a disc or a ring, the thickest part of a crescent, whose middle lies outside of it.
    """
    solid = ndimage.binary_fill_holes(plane)
    if not solid.any():
        return -1, -1
    depth = ndimage.distance_transform_edt(np.pad(solid, 1))[1:-1, 1:-1]
    inside = np.argwhere(depth >= depth.max() / 2)
    distance = ((inside - np.argwhere(solid).mean(0)) ** 2).sum(1)
    row, column = inside[distance.argmin()]
    return int(row), int(column)


def find_lesions(mask: np.ndarray, most: int = MOST) -> list[Lesion]:
    """Lesions of a label mask (z, y, x), whatever the labels, largest first.

    Components with at most two voxels between them in plane, or one slice, are one lesion: a cluster of small opacities
    is annotated and segmented in pieces. On synthetic masks with up to three findings, such lesions and findings were
    equal in number in 99 % of the cases, connected components in 81 %.
    """
    bounds = ndimage.find_objects((mask > 0).view(np.uint8))
    if not bounds:
        return []
    # Labelling takes four bytes a voxel: only the bounding box of all lesions is labelled.
    numbered = lesion_numbers(mask[bounds[0]])
    sizes = np.bincount(numbered.ravel())[1:]
    boxes = ndimage.find_objects(numbered)
    found = []
    for number in np.argsort(-sizes, kind="stable")[:most]:
        box = boxes[number]
        parts = numbered[box] == number + 1
        z, y, x = ((cut.start + b.start, cut.stop + b.start) for cut, b in zip(box, bounds[0], strict=True))
        points = [core_of(plane) for plane in parts]
        cores = [(row + y[0], column + x[0]) if row >= 0 else (row, column) for row, column in points]
        found.append(Lesion((z, y, x), tuple(parts.sum(axis=(1, 2)).tolist()), tuple(cores)))
    return found


def lesion_numbers(mask: np.ndarray) -> np.ndarray:
    """The number of its lesion for each voxel of a mask (z, y, x), from 1 on; 0 outside."""
    solid = mask > 0
    parts, _ = ndimage.label(ndimage.binary_dilation(solid, _NEAR), _TOUCHING)
    return parts * solid


def covering_slices(lesions: Sequence[Lesion], lesion_voxels: np.ndarray, count: int) -> list[int]:
    """At most ``count`` slices that show the lesions, the most important first.

    Each of the ``count`` largest lesions gets a slice of its own, largest first, chosen so that every one is shown
    nearly at its largest area; a slice that alone holds two lesions is there twice. Then come the slices with the
    largest lesion area. A single slice is the one with the largest. ``lesion_voxels``: (z,), of all lesions.
    """
    by_area = [int(z) for z in np.argsort(-lesion_voxels, kind="stable") if lesion_voxels[z] > 0]
    if count == 1:
        return by_area[:1]
    areas = np.array([[lesion.area(z) for z in by_area] for lesion in lesions[:count]])
    places = _assign(areas)
    own = [by_area[areas[k].argmax() if place is None else place] for k, place in enumerate(places)]
    return [*own, *(z for z in by_area if z not in own)][:count]


def lesion_of_each(lesions: Iterable[Lesion], ranges: Sequence[Span]) -> list[Lesion | None]:
    """The lesion assigned to each range of slices, None for a range without one.

    Each lesion is assigned at most once, the largest first, so that each is shown nearly at its largest area.
    """
    shown = list(lesions)[: len(ranges)]
    areas = np.array([[sum(lesion.area(z) for z in range(*span)) for span in ranges] for lesion in shown])
    found: list[Lesion | None] = [None] * len(ranges)
    for lesion, place in zip(shown, _assign(areas), strict=True):
        if place is not None:
            found[place] = lesion
    return found


def _assign(areas: np.ndarray) -> list[int | None]:
    """A place of its own for each lesion, or None, given ``areas`` (lesions, places): as many lesions as possible get
    one, with the largest sum of the fractions of their largest area. Greedy choice would leave out a small lesion in
    the best slice of a large one."""
    if not areas.size:
        return [None] * len(areas)
    fraction = areas / np.maximum(areas.max(axis=1, keepdims=True), 1)
    # A lesion that is shown at all outweighs all fractions together; earlier lesions win where not all can be shown.
    worth = (areas > 0) * (1 + len(areas) + np.linspace(1e-3, 0, len(areas))[:, None])
    rows, columns = linear_sum_assignment(fraction + worth, maximize=True)
    place: list[int | None] = [None] * len(areas)
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        if areas[row, column]:
            place[row] = column
    return place


# ------------------------------------------------------------------ lesions in mm, on a side and in a zone


def find_lungs(hu: np.ndarray, spacing: tuple[float, float, float]) -> LungBox:
    """The box of the lungs of a chest CT [Z, Y, X] in HU: the air inside the body, without small components.

    ``spacing`` is (z, y, x) in mm. Raises InputError for less than 200 ml of air on one side of the body's middle.
    """
    air = hu < AIR_HU
    # Air that reaches the border of its slice is outside the body.
    inside = np.zeros_like(air)
    # Filling the holes of the whole volume at once takes four times as long and five times the memory.
    for z in range(len(air)):
        parts, _ = ndimage.label(air[z])
        edge = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
        inside[z] = (parts > 0) & ~np.isin(parts, np.unique(edge))
    inside = ndimage.binary_opening(inside, np.ones((1, 3, 3), bool))
    parts, _ = ndimage.label(inside)
    sizes = np.bincount(parts.ravel())
    inside &= (sizes >= _MIN_AIR_FRACTION * sizes[1:].sum())[parts]
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
        levels = np.flatnonzero(area > 0.03 * area.max())
        bounds[side] = (float(levels[0]), float(levels[-1]))
    rows, columns = (np.flatnonzero(inside.any(axes)) for axes in ((0, 2), (0, 1)))
    return LungBox(middle, **bounds, y=(float(rows[0]), float(rows[-1])), x=(float(columns[0]), float(columns[-1])))


def measure_lesions(
    mask: np.ndarray,
    spacing: tuple[float, float, float],
    lungs: LungBox | None,
    names: Mapping[int, str] | None = None,
    min_volume_mm3: float = 0.0,
    *,
    hu: np.ndarray | None = None,
    source: Source = "mask",
    join: bool = False,
) -> list[FindingRecord]:
    """The lesions of a mask as findings, by label and then by falling volume.

    Args:
        mask: [Z, Y, X] integers, 0 is background.
        spacing: (z, y, x) in mm.
        lungs: None where they were not found: the records have no side and no level.
        names: findings of the labels; a label without one is :data:`~data.findings.LESION`.
        min_volume_mm3: smaller lesions are left out.
        hu: the scan, for mean densities.
        join: components with a gap as in :func:`find_lesions` are one lesion, whatever their labels; the most frequent
            label names it, and ``count`` is the number of its components. Otherwise each 26-connected component of
            each label is a lesion.

    Raises InputError if the mask is not 3-D or not of integers.
    """
    if mask.ndim != 3 or not np.issubdtype(mask.dtype, np.integer):
        raise InputError(f"a mask must be a 3-D array of integers, not {mask.ndim}-D {mask.dtype}")
    bounds = ndimage.find_objects((mask > 0).view(np.uint8))
    if not bounds:
        return []
    whole = _grown(bounds[0])  # labelling takes four bytes a voxel
    mask, hu = mask[whole], None if hu is None else hu[whole]
    found = []
    for parts, box, index in _components(mask, join):
        solid = parts[box] == index
        volume = float(solid.sum()) * float(np.prod(spacing))
        if volume < min_volume_mm3:
            continue
        label = int(np.bincount(mask[box][solid]).argmax())
        starts = (inner.start + outer.start for inner, outer in zip(box, whole, strict=True))
        centre = tuple(float(axis.mean()) + start for axis, start in zip(np.nonzero(solid), starts, strict=True))
        measured = Measurement(label, volume, None, *centre, thick_mm=thickness(solid, spacing[1:]))
        height = float(solid.any((1, 2)).sum() * spacing[0])
        measured = replace(
            measured, height_mm=height, **_fractions(lungs, *centre), **_densities(hu, mask, parts, box, index)
        )
        found.append(
            FindingRecord(
                (names or {}).get(label, LESION),
                **_place(lungs, *centre),
                size_mm=longest_axial_diameter(solid, spacing[1:]),
                count=ndimage.label(solid, _TOUCHING)[1] if join else None,
                source=source,
                measured=measured,
            )
        )
    return sorted(found, key=lambda record: (record.measured.label * (not join), -record.measured.volume_mm3))


def measure_scan(
    labels: np.ndarray, volume: Volume, names: Mapping[int, str] | None = None, *, source: Source
) -> list[FindingRecord]:
    """The lesions of labels on the grid of a scan as findings, largest first. Where no two lungs are found, which the
    image checks report, they have no side and no level."""
    if not labels.any():
        return []
    scan, labels = turned_to_lps(volume, labels)
    try:
        lungs = find_lungs(scan.array, scan.spacing)
    except InputError:
        lungs = None
    return measure_lesions(labels, scan.spacing, lungs, names, hu=scan.array, source=source, join=True)


def _components(mask: np.ndarray, join: bool) -> Iterator[tuple[np.ndarray, tuple[slice, ...], int]]:
    """Numbered voxels, bounding box and number of each lesion."""
    if join:
        numbered = [lesion_numbers(mask)]
    else:
        numbered = [ndimage.label(mask == label, _TOUCHING)[0] for label in np.unique(mask[mask > 0])]
    for parts in numbered:
        for index, box in enumerate(ndimage.find_objects(parts), 1):
            if box is not None:
                yield parts, box, index


def _place(lungs: LungBox | None, z: float, y: float, x: float) -> dict[str, str | None]:
    """Side and zone of a centre of mass; the lobe where its level alone, or with front and back, decides it.

    Without the fissures, only the top fifth of a lung is surely its upper lobe, and the back of the lowest quarter its
    lower lobe.
    """
    if lungs is None:
        return {}
    side = "left" if x > lungs.middle_x else "right"
    low, high = getattr(lungs, side)
    # Slice borders included; above or below the lung the nearest third.
    level = float(np.clip((z - (low - 0.5)) / (high - low + 1), 0, 1))
    lobe = "upper" if level > 0.8 else None
    if level < 0.25 and y > sum(lungs.y) / 2:
        lobe = "lower"
    return {"side": side, "zone": ZONES[2 - min(int(3 * level), 2)], "lobe": lobe}


def _grown(box: Sequence[slice]) -> tuple[slice, ...]:
    """``box`` with room for the rim in plane."""
    return tuple(slice(max(cut.start - rim, 0), cut.stop + rim) for cut, rim in zip(box, (0, 2, 2), strict=True))


def _fractions(lungs: LungBox | None, z: float, y: float, x: float) -> dict[str, float]:
    """Level, across and depth of :class:`data.findings.Measurement`."""
    if lungs is None:
        return {}
    low, high = lungs.left if x > lungs.middle_x else lungs.right
    spans = {"level": (z, low, high), "across": (x, *lungs.x), "depth": (y, *lungs.y)}
    return {name: (value - first) / max(last - first, 1.0) for name, (value, first, last) in spans.items()}


def _densities(
    hu: np.ndarray | None, mask: np.ndarray, parts: np.ndarray, box: tuple[slice, ...], index: int
) -> dict[str, Any]:
    """Mean, percentiles and rim of lesion ``index`` in HU; nothing without the scan. Other lesions are no rim."""
    if hu is None:
        return {}
    inside = hu[box][parts[box] == index]
    around = _grown(box)
    grown = ndimage.binary_dilation(parts[around] == index, _NEAR_IN_PLANE, iterations=2)
    rim = hu[around][grown & (mask[around] == 0)]
    percentiles = tuple(float(value) for value in np.percentile(inside, (5, 50, 95)))
    return {"mean_hu": float(inside.mean()), "hu": percentiles, "rim_hu": float(rim.mean()) if rim.size else None}


def thickness(solid: np.ndarray, pixel: tuple[float, float]) -> float:
    """Diameter in mm of the widest disc inside the slice with most of a boolean [Z, Y, X]: the depth of an effusion,
    the wall of a cavity. ``pixel`` is (y, x) in mm."""
    plane = np.pad(solid[solid.sum((1, 2)).argmax()], 1)
    # The distance to the outside ends half a pixel before the next centre.
    return float(2 * ndimage.distance_transform_edt(plane, sampling=pixel).max() - np.sqrt(np.prod(pixel)))


def longest_axial_diameter(solid: np.ndarray, pixel: tuple[float, float]) -> float:
    """Longest distance in mm between two voxels of one slice of a boolean [Z, Y, X], centre to centre, plus one pixel;
    0 if empty. ``pixel`` is (y, x) in mm."""
    longest = 0.0
    for plane in solid:
        points = np.argwhere(plane) * np.asarray(pixel)
        if len(points):
            longest = max(longest, _farthest(points) + float(np.sqrt(pixel[0] * pixel[1])))
    return longest


def _farthest(points: np.ndarray) -> float:
    """Largest distance between two of the points [N, 2]."""
    if len(points) > _HULL_POINTS:
        try:
            points = points[ConvexHull(points).vertices]
        except QhullError:  # all on one line: its ends are extreme in both coordinates
            points = points[np.lexsort(points.T)[[0, -1]]]
    return float(pdist(points).max()) if len(points) > 1 else 0.0
