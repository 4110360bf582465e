"""Plausibility of a readable image as a chest CT in HU: each warning with what to do.

The reader refuses what is impossible. These checks find the mistakes that a file survives: a wrong unit, a missing
intercept, half a chest, conflicting directions. The limits are for adults, with a margin.

No rule on voxels detects mirrored sides without errors (situs inversus, a shifted mediastinum), so none is here: the
contact sheet shows the image with its sides named. Front and back are checked by the spine.
"""

from __future__ import annotations

import hashlib

import numpy as np
from scipy import ndimage

from data.checks.problems import Level, Problem
from data.imaging.volume import ImageHeader, Volume

PADDING_HU = -1100  # below air: what scanners write outside the scanned circle (-3024, -2048, -2000)
AIR_HU = -500
BONE_HU = 300
_GRID_MM = 4.0  # the checks of voxels run on a coarse grid
_PLANE_MM, _STEP_MM = (0.3, 3.0), (0.2, 10.0)
_LENGTH_MM, _WIDTH_MM = (180.0, 800.0), (200.0, 700.0)
_MAX_LABELS = 32  # distinct values of a label map on the coarse grid; an 8-bit image has more
_MIN_LUNG_LITRES = 0.7
_NO_LUNG_LITRES = 0.1
_WHOLE_MM = (100.0, 150.0)  # length, and width: of a smaller piece nobody expects lungs
_ONE_LUNG_FRACTION = 0.05  # of the air on the other side
# Small air columns near the midline: 66 to 95 % lie above the middle of the lungs in real scans and phantoms.
_AIRWAY_MM, _AIRWAY_MM2, _MIDLINE_MM, _MIN_AIRWAYS, _UPPER_FRACTION = 5.0, (60.0, 900.0), 30.0, 5, 0.42
_CUT_FRACTION = 0.4  # of the largest lung area; with more on its outermost slice, the scan cuts the lung
_SPINE_FRACTION = 0.05  # of the body's depth; real scans have -0.16 to -0.09 here, mirrored ones the opposite


def check_header(header: ImageHeader) -> list[Problem]:
    """Warnings that need no voxel: directions, spacing, extent."""
    found = [_warning(note, "check where the file was made") for note in header.notes]
    step, row, column = header.spacing
    if not all(_PLANE_MM[0] <= size <= _PLANE_MM[1] for size in (row, column)):
        found.append(_warning(f"pixels are {row:.3g} x {column:.3g} mm, a chest CT has 0.5 to 1", "check the spacing"))
    if not _STEP_MM[0] <= step <= _STEP_MM[1]:
        found.append(_warning(f"slices are {step:.3g} mm apart, a chest CT has 0.5 to 10", "check the spacing"))
    length, *width = header.extent_mm
    if length < _LENGTH_MM[0]:
        found.append(_warning(f"the scan is {length:.0f} mm long, a chest is 250 to 400: part of it is missing"))
    if length > _LENGTH_MM[1]:
        remedy = "crop it to the chest: without a mask the middle slice is taken, which is in the belly"
        found.append(_warning(f"the scan is {length:.0f} mm long, more than a chest", remedy))
    if not all(_WIDTH_MM[0] <= size <= _WIDTH_MM[1] for size in width):
        found.append(_warning(f"the field of view is {width[1]:.0f} x {width[0]:.0f} mm, a chest needs 300 to 500"))
    # Largest angle between an axis of the image and the nearest axis of the patient.
    cosines = np.abs(header.affine[:3, :3]).max(axis=0) / np.linalg.norm(header.affine[:3, :3], axis=0)
    tilt = np.degrees(np.arccos(np.clip(cosines.min(), -1, 1)))
    if tilt > 10:
        found.append(
            _warning(f"the slices are oblique by {tilt:.0f} degrees and used as they are", "reconstruct them axial")
        )
    return found


def check_volume(volume: Volume) -> list[Problem]:
    """Problems of the values of a volume read as LPS: the unit, the lungs, front and back."""
    stride = [max(1, round(_GRID_MM / size)) for size in volume.spacing]
    coarse = volume.array[:: stride[0], :: stride[1], :: stride[2]]
    voxel_ml = float(np.prod(volume.spacing) * np.prod(stride)) / 1000
    if found := _unit(coarse):
        return found
    if fraction := float(np.mean(coarse < PADDING_HU)):
        words = f"{100 * fraction:.0f} % of the voxels are padding (lowest {float(coarse.min()):.0f})"
        found.append(_warning(words, "harmless: nnU-Net's CT normalisation clips it", "note"))
    extent = [size * count for size, count in zip(volume.spacing, volume.array.shape, strict=True)]
    whole = extent[0] >= _WHOLE_MM[0] and min(extent[1:]) >= _WHOLE_MM[1]
    lungs = _lungs(coarse, voxel_ml, whole)
    return [*found, *lungs, *_spine(coarse), *([] if lungs else _airways(volume, stride[0]))]


def describe_scan(volume: Volume) -> dict[str, float]:
    """What distinguishes scans of other regions, scanners and protocols, of a volume read as LPS: extent and spacing in
    mm, enclosed air in litres, and noise in HU (median difference of neighbours in soft tissue, as a standard
    deviation)."""
    stride = [max(1, round(_GRID_MM / size)) for size in volume.spacing]
    coarse = volume.array[:: stride[0], :: stride[1], :: stride[2]]
    keep = _enclosed_air(coarse)
    planes = volume.array[:: stride[0]]
    tissue = (planes > -100) & (planes < 200)
    difference = np.abs(np.diff(planes, axis=2))[tissue[..., 1:] & tissue[..., :-1]]
    length, *width = (size * count for size, count in zip(volume.spacing, volume.array.shape, strict=True))
    return {
        "length of the scan (mm)": length,
        "width of the field of view (mm)": min(width),
        "distance of slices (mm)": volume.spacing[0],
        "size of pixels (mm)": volume.spacing[2],
        "air in the body (l)": float(keep.sum()) * float(np.prod(volume.spacing) * np.prod(stride)) / 1e6,
        "noise (HU)": float(1.4826 / np.sqrt(2) * np.median(difference)) if difference.size else 0.0,
    }


def voxel_digest(volume: Volume) -> str:
    """Digest of the voxels: one scan under two names, or in two formats, has one digest."""
    salt = b"%d" % volume.array.shape[0]
    return hashlib.blake2b(np.ascontiguousarray(volume.array), digest_size=16, salt=salt).hexdigest()


def _unit(coarse: np.ndarray) -> list[Problem]:
    """An error where the values cannot be HU: no air, or no soft tissue."""
    low, high = float(coarse.min()), float(coarse.max())
    inside = coarse[coarse > PADDING_HU]
    lowest, highest = (float(v) for v in np.percentile(inside, (0.5, 99.5))) if inside.size else (low, low)
    tissue = float(np.mean((inside > -200) & (inside < 300)))
    remedy = "look at the contact sheet; export the CT itself in HU"
    if lowest > -400:
        labels = np.unique(coarse)
        if low >= 0 and labels.size <= _MAX_LABELS and np.array_equal(labels, np.rint(labels)):
            words = f"{labels.size} whole numbers, a label map and no CT"
            remedy = "name the CT as the image, and the label map as the mask"
        elif low >= 0 and high <= 1:
            words, remedy = "scaled to 0 to 1, not HU", "export the CT without scaling"
        elif low >= 0 and high <= 255:
            words, remedy = "an 8-bit image, not HU", "export the CT itself, not its window"
        elif low >= 0 and float(np.mean((coarse > 824) & (coarse < 1324))) > 0.02:  # soft tissue, 1024 too high
            words = "without air at -1000; the intercept (-1024) is missing, or this is no CT"
            remedy = "convert the DICOM series again"
        elif low >= 0:
            words, remedy = "no air and no soft tissue in HU; no CT (MR or PET?)", "name the CT as the image"
        elif high < 20:
            words, remedy = "normalised, not HU", "export the CT without normalisation"
        else:
            words = "hardly any air, expected lungs near -850 HU; no chest CT, or not in HU"
    elif highest < -200 or tissue < 0.02:
        words = "hardly any soft tissue between -200 and 300; not in HU, or no body in it"
    else:
        return []
    return [Problem(0, f"values run from {low:.6g} to {high:.6g}: {words}", remedy)]


def _lungs(coarse: np.ndarray, voxel_ml: float, whole: bool) -> list[Problem]:
    """Whether the scan holds both lungs, whole: the air that the body encloses in the axial plane.

    ``whole``: the scan is large enough for a chest, so that without lungs it is none.
    """
    air = _enclosed_air(coarse)
    area = air.sum(axis=(1, 2))
    litres = float(area.sum()) * voxel_ml / 1000
    if whole and litres < _NO_LUNG_LITRES:
        words = f"only {litres:.2f} litres of air inside the body, expected lungs: this is no chest CT"
        return [Problem(0, words, "name a chest CT as the image")]
    if litres < _MIN_LUNG_LITRES:
        words = f"only {litres:.1f} litres of air inside the body: the lungs are not in the image, or cut by its edge"
        return [_warning(words, "check that this is a whole chest")]
    columns = np.flatnonzero((coarse > AIR_HU).any(axis=(0, 1)))
    middle = (columns[0] + columns[-1] + 1) // 2
    sides = {"right": air[..., :middle].sum(), "left": air[..., middle:].sum()}
    if min(sides.values()) < _ONE_LUNG_FRACTION * max(sides.values()):
        words = f"hardly any air on the {min(sides, key=sides.get)} side of the body: one lung is missing or white"
        return [_warning(words, "check that the scan is not cut")]
    cut = [name for name, at in (("lower", 0), ("upper", -1)) if area[at] > _CUT_FRACTION * area.max()]
    return [_warning(f"the lungs go on beyond the {' and the '.join(cut)} end of the scan")] if cut else []


def _enclosed_air(coarse: np.ndarray) -> np.ndarray:
    """Air that reaches no side of its slices: lungs, airways, bowel."""
    labels, count = ndimage.label(coarse < AIR_HU)
    outside = np.unique(np.concatenate([labels[:, [0, -1]].ravel(), labels[:, :, [0, -1]].ravel()]))
    keep = np.ones(count + 1, dtype=bool)
    keep[outside] = keep[0] = False
    return keep[labels]


def _spine(coarse: np.ndarray) -> list[Problem]:
    """The spine outweighs the sternum, so bone lies behind the middle of the body."""
    body = coarse > AIR_HU
    bone = coarse > BONE_HU
    if bone.sum() < 100:
        return []
    rows = np.arange(coarse.shape[1])
    middle, at = (float((mask.sum(axis=(0, 2)) * rows).sum() / mask.sum()) for mask in (body, bone))
    if middle - at < _SPINE_FRACTION * (np.ptp(np.flatnonzero(body.any(axis=(0, 2)))) + 1):
        return []
    words = "the spine lies in front: the header's directions are wrong, so left and right may be too"
    return [_warning(words, "convert the DICOM series again, and look at the contact sheet")]


def _airways(volume: Volume, step: int) -> list[Problem]:
    """Trachea and main bronchi are small air columns near the midline, and lie in the upper half of the lungs."""
    array, (_, dy, dx) = volume.array[::step], volume.spacing
    if min(dy, dx) > _AIRWAY_MM or min(array.shape[1:]) < 2:
        return []
    levels, air = [], np.zeros(len(array))
    for z, plane in enumerate(array):
        parts, count = ndimage.label(plane < AIR_HU)
        outside = np.unique(np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]]))
        areas = np.bincount(parts.ravel(), minlength=count + 1) * dy * dx
        areas[outside], areas[0] = 0, 0
        air[z] = areas.sum()
        small = np.flatnonzero((areas > _AIRWAY_MM2[0]) & (areas < _AIRWAY_MM2[1]))
        columns = np.flatnonzero((plane > AIR_HU).any(axis=0))
        if small.size and columns.size:
            middle = (columns[0] + columns[-1]) / 2
            centres = np.array(ndimage.center_of_mass(parts > 0, parts, small))[:, 1]
            levels += [z] * int((np.abs(centres - middle) * dx < _MIDLINE_MM).sum())
    lung = np.flatnonzero(air > 0.05 * air.max()) if air.any() else np.empty(0)
    if len(levels) < _MIN_AIRWAYS or lung.size < 2:
        return []
    upper = float(np.mean(np.array(levels) > (lung[0] + lung[-1]) / 2))
    if upper > _UPPER_FRACTION:
        return []
    words = "the trachea lies below the middle of the lungs: the scan is upside down, or its directions are wrong"
    return [_warning(words, "convert the DICOM series again, and look at the contact sheet")]


def _warning(problem: str, remedy: str = "look at the contact sheet", level: Level = "warning") -> Problem:
    return Problem(0, problem, remedy, level=level)
