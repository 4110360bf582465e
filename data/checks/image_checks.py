"""Does a readable image look like a chest CT in HU? Doubts in plain words, each with what to do.

What is impossible was refused when the file was read; here are the mistakes that a file survives: a wrong unit, a
missing intercept, half a chest, lost or contradicting directions. Numbers are for adults, with room to spare.

Left and right come from the header alone. A mirrored header cannot be told from the voxels by a rule that never
errs (situs inversus, a shifted mediastinum), so no such rule is here: the contact sheet shows the picture with its
sides named. Front and back can be checked, by the spine: it lies at the back, whatever else is wrong.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from data.checks.problems import Level, Problem
from data.imaging.volume import ImageHeader, Volume

PADDING_HU = -1100  # below air: what scanners write outside the scanned circle (-3024, -2048, -2000)
AIR_HU = -500
BONE_HU = 300
_GRID_MM = 4.0  # the lungs are looked for on a coarse grid
_PLANE_MM, _STEP_MM = (0.3, 3.0), (0.2, 10.0)
_LENGTH_MM, _WIDTH_MM = (180.0, 800.0), (200.0, 700.0)
_MOST_LABELS = 32  # distinct values of a label map on the coarse grid; an 8-bit picture has more
_LEAST_LUNG_LITRES = 0.7
_CUT_SHARE = 0.4  # of the largest lung area: where the outermost slice has so much, the lung goes on beyond it
_SPINE_SHARE = 0.05  # of the body's depth; real scans have -0.16 to -0.09 here, mirrored ones the opposite


def check_header(header: ImageHeader) -> list[Problem]:
    """Doubts that need no voxel: directions, spacing, extent."""
    found = [_doubt(note, "check where the file was made") for note in header.notes]
    step, *plane = header.spacing
    if not all(_PLANE_MM[0] <= size <= _PLANE_MM[1] for size in plane):
        found.append(
            _doubt(f"pixels are {plane[0]:.3g} x {plane[1]:.3g} mm, a chest CT has 0.5 to 1", "check the spacing")
        )
    if not _STEP_MM[0] <= step <= _STEP_MM[1]:
        found.append(_doubt(f"slices are {step:.3g} mm apart, a chest CT has 0.5 to 10", "check the spacing"))
    length, *width = header.extent_mm
    if length < _LENGTH_MM[0]:
        found.append(_doubt(f"the scan is {length:.0f} mm long, a chest is 250 to 400: part of it is missing"))
    if length > _LENGTH_MM[1]:
        remedy = "crop it to the chest: without a mask the middle slice is taken, which is in the belly"
        found.append(_doubt(f"the scan is {length:.0f} mm long, more than a chest", remedy))
    if not all(_WIDTH_MM[0] <= size <= _WIDTH_MM[1] for size in width):
        found.append(_doubt(f"the field of view is {width[1]:.0f} x {width[0]:.0f} mm, a chest needs 300 to 500"))
    tilt = _degrees_from_axes(header)
    if tilt > 10:
        found.append(
            _doubt(f"the slices are oblique by {tilt:.0f} degrees and used as they are", "reconstruct them axial")
        )
    return found


def check_volume(volume: Volume) -> list[Problem]:
    """Doubts about the values of a volume read as LPS: the unit, the lungs, front and back."""
    if volume.orientation != "LPS":
        raise ValueError(f"volume was read as {volume.orientation}, expected LPS")
    stride = [max(1, round(_GRID_MM / size)) for size in volume.spacing]
    coarse = volume.array[:: stride[0], :: stride[1], :: stride[2]]
    spacing = tuple(size * by for size, by in zip(volume.spacing, stride, strict=True))
    wrong_unit = _unit(coarse)
    if wrong_unit:
        return wrong_unit
    return [*_padding(coarse), *_lungs(coarse, spacing), *_spine(coarse)]


def _unit(coarse: np.ndarray) -> list[Problem]:
    """An error where the values cannot be HU: no air, or no soft tissue."""
    low, high = float(coarse.min()), float(coarse.max())
    inside = coarse[coarse > PADDING_HU]
    lowest, highest = (float(v) for v in np.percentile(inside, (0.5, 99.5))) if inside.size else (low, low)
    span = f"values run from {low:.6g} to {high:.6g}"
    if lowest > -400:
        labels = np.unique(coarse)
        if low >= 0 and labels.size <= _MOST_LABELS and np.array_equal(labels, np.rint(labels)):
            words = f"{span}: {labels.size} whole numbers, a label map and no CT"
            return [_wrong(words, "name the CT as the image, and the label map as the mask")]
        if low >= 0 and high <= 1:
            return [_wrong(f"{span}: scaled to 0 to 1, not HU", "export the CT without scaling")]
        if low >= 0 and high <= 255:
            return [_wrong(f"{span}: an 8-bit picture, not HU", "export the CT itself, not its window")]
        if low >= 0:
            if float(np.mean((coarse > 824) & (coarse < 1324))) > 0.02:  # soft tissue, 1024 too high
                words = f"{span}: without air at -1000; the intercept (-1024) is missing, or this is no CT"
                return [_wrong(words, "convert the DICOM series again")]
            return [_wrong(f"{span}: no air and no soft tissue in HU; no CT (MR or PET?)", "name the CT as the image")]
        if high < 20:
            return [_wrong(f"{span}: normalised, not HU", "export the CT without normalisation")]
        return [_wrong(f"{span}: hardly any air, expected lungs near -850 HU; no chest CT, or not in HU")]
    tissue = float(np.mean((inside > -200) & (inside < 300)))
    if highest < -200 or tissue < 0.02:
        return [_wrong(f"{span}: hardly any soft tissue between -200 and 300; not in HU, or no body in it")]
    return []


def _padding(coarse: np.ndarray) -> list[Problem]:
    share = float(np.mean(coarse < PADDING_HU))
    if share == 0:
        return []
    words = f"{100 * share:.0f} % of the voxels are padding (lowest {float(coarse.min()):.0f})"
    return [_doubt(words, "harmless: nnU-Net's CT normalisation clips it", "note")]


def _lungs(coarse: np.ndarray, spacing: tuple[float, float, float]) -> list[Problem]:
    """Lungs are air that is enclosed by the body in the axial plane: does the scan hold them whole?"""
    air = coarse < AIR_HU
    labels, count = ndimage.label(air)
    outside = np.unique(np.concatenate([labels[:, [0, -1]].ravel(), labels[:, :, [0, -1]].ravel()]))
    keep = np.ones(count + 1, dtype=bool)
    keep[outside] = keep[0] = False
    area = keep[labels].sum(axis=(1, 2))
    litres = float(area.sum()) * float(np.prod(spacing)) / 1e6
    if litres < _LEAST_LUNG_LITRES:
        words = f"only {litres:.1f} litres of air inside the body: the lungs are not in the picture, or cut by its edge"
        return [_doubt(words, "check that this is a whole chest")]
    cut = [name for name, at in (("lower", 0), ("upper", -1)) if area[at] > _CUT_SHARE * area.max()]
    return [_doubt(f"the lungs go on beyond the {' and the '.join(cut)} end of the scan")] if cut else []


def _spine(coarse: np.ndarray) -> list[Problem]:
    """Bone lies behind the middle of the body: the spine outweighs the sternum."""
    body = coarse > AIR_HU
    bone = coarse > BONE_HU
    if bone.sum() < 100 or not body.any():
        return []
    rows = np.arange(coarse.shape[1])
    middle, at = (float((mask.sum(axis=(0, 2)) * rows).sum() / mask.sum()) for mask in (body, bone))
    occupied = np.flatnonzero(body.any(axis=(0, 2)))
    if middle - at < _SPINE_SHARE * (occupied[-1] - occupied[0] + 1):
        return []
    words = "the spine lies in front: the header's directions are wrong, so left and right may be too"
    return [_doubt(words, "convert the DICOM series again, and look at the contact sheet")]


def _degrees_from_axes(header: ImageHeader) -> float:
    """Largest angle between an axis of the image and the nearest axis of the patient."""
    cosines = np.abs(header.affine[:3, :3]).max(axis=0) / np.linalg.norm(header.affine[:3, :3], axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))


def _doubt(problem: str, remedy: str = "look at the contact sheet", level: Level = "warning") -> Problem:
    return Problem(0, problem, remedy, level=level)


def _wrong(problem: str, remedy: str = "look at the contact sheet; export the CT itself in HU") -> Problem:
    return Problem(0, problem, remedy)
