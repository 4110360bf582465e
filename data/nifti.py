"""Reading NIfTI volumes into one canonical orientation, and writing them.

Arrays have axes (z, y, x): z runs from feet to head, and for ``orientation="LPS"`` y to the back and x to the
patient's left. That is what SimpleITK, hence nnU-Net, hands over for a file with identity direction.
Spacing is (z, y, x) in mm. ``affine`` maps (x, y, z) voxel indices of the canonical array to nibabel's world,
RAS+ in mm. Oblique volumes are not resampled: their axes are named by the nearest anatomical axis.

A file that cannot be trusted raises :class:`~config.errors.InputError`; no value is replaced or invented.
"""

from __future__ import annotations

import logging
import math
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from nibabel.spatialimages import HeaderDataError

from config.errors import InputError

logger = logging.getLogger(__name__)

_UNREADABLE = (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError)
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_MAX_VOXELS = 2**31  # 8 GiB as float32; whole-body CT at 512 x 512 x 2000 has a quarter of it
_MAX_DEFLATE_RATIO = 1040  # deflate cannot do better than 1032 : 1, so a smaller file cannot hold the array
_SPACING_RANGE_MM = (0.01, 100.0)
_GRID_TOLERANCE = 0.1  # of the smallest spacing; headers are rounded, a shifted mask is off by far more


@dataclass(frozen=True)
class Volume:
    """A CT volume. ``array``: float32 (z, y, x) in HU; ``spacing``: (z, y, x) in mm; ``affine``: (4, 4)."""

    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    orientation: str
    path: Path
    stored_axcodes: str


def read_volume(path: Path | str, orientation: str = "LPS") -> Volume:
    """Read a 3D volume, rescaled by the header's slope and intercept, in canonical ``orientation``.

    Raises InputError if the file is missing, empty, truncated or no NIfTI, if it is not a scalar 3D image
    (a trailing axis of length one is dropped), if its header contradicts itself, if it holds NaN or
    infinite values, or if every voxel has the same value.
    """
    path = Path(path)
    stored, geometry = _read_canonical(path, orientation)
    array = stored.values.astype(np.float32, order="C")
    if stored.slope != 1.0:
        array *= np.float32(stored.slope)
    if stored.intercept != 0.0:
        array += np.float32(stored.intercept)
    # min and max propagate NaN, and an infinity is one of them: two passes without a temporary array.
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        raise InputError(
            f"{path}: {nan} voxels are NaN and {infinite} infinite, expected finite HU; "
            "fill them (air is -1000) where the file was made"
        )
    if low == high:
        raise InputError(f"{path}: every voxel is {low:g}, expected a CT image; the export went wrong")
    return Volume(array, geometry.spacing, geometry.affine, orientation, path, geometry.stored_axcodes)


def read_mask(path: Path | str, like: Volume) -> np.ndarray:
    """Read a label volume on the grid of ``like``: (z, y, x), uint8, or int16 where a label exceeds 255.

    Raises InputError as :func:`read_volume` does, and if labels are not whole numbers from 0 to 32767 or
    the grid (shape, or position within a tenth of a voxel) is not that of ``like``.
    """
    path = Path(path)
    stored, geometry = _read_canonical(path, like.orientation)
    values = stored.values
    if values.shape != like.array.shape:
        raise InputError(
            f"{path}: mask has shape {values.shape} (z, y, x), its image {like.path} has {like.array.shape}; "
            "the mask must be drawn on the image's own grid"
        )
    shift = _largest_shift(geometry.affine, like.affine, values.shape)
    if shift > _GRID_TOLERANCE * min(like.spacing):
        raise InputError(
            f"{path}: mask lies up to {shift:.2f} mm away from its image {like.path}; "
            "origin, spacing and direction of both must agree"
        )
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        values = values.astype(np.float64) * stored.slope + stored.intercept
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= np.iinfo(np.int16).max):  # written so that NaN fails it
        raise InputError(f"{path}: mask values run from {low} to {high}, expected whole labels 0 to 32767")
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        raise InputError(f"{path}: mask holds fractions, expected whole labels; was it resampled linearly?")
    return values.astype(np.uint8 if high <= 255 else np.int16, order="C")


def write_volume(
    path: Path | str,
    array: np.ndarray,
    spacing: tuple[float, float, float],
    affine: np.ndarray | None = None,
) -> None:
    """Write ``array`` (z, y, x), int16 or uint8, as ``.nii.gz`` (or ``.nii``), atomically.

    ``spacing`` is (z, y, x) in mm. ``affine`` maps (x, y, z) indices to RAS+ mm; without it the array is
    taken as LPS with its first voxel at the origin. A reader never sees a half-written file.
    """
    path = Path(path)
    if array.ndim != 3 or array.dtype not in (np.dtype(np.int16), np.dtype(np.uint8)):
        raise ValueError(f"expected a 3D int16 or uint8 array, got {array.dtype} with shape {array.shape}")
    suffix = _nifti_suffix(path)
    if affine is None:
        affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    elif not np.allclose(nib.affines.voxel_sizes(affine)[::-1], spacing, rtol=1e-3):
        raise ValueError(f"spacing {spacing} (z, y, x) contradicts the affine {affine.tolist()}")
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}{suffix}")
    try:
        nib.save(image, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Stored:
    """Voxels (z, y, x) in canonical order and the file's number type; value = slope * voxel + intercept."""

    values: np.ndarray
    slope: float
    intercept: float


@dataclass(frozen=True)
class _Geometry:
    spacing: tuple[float, float, float]
    affine: np.ndarray
    stored_axcodes: str


def _read_canonical(path: Path, orientation: str) -> tuple[_Stored, _Geometry]:
    image = _open(path)
    shape = _checked_shape(path, image)
    affine, zooms = _checked_affine(path, image)
    try:
        voxels = np.asarray(image.dataobj.get_unscaled()).reshape(shape, order="F")
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: image data cannot be read ({_one_line(error)}); the file is truncated or damaged, copy it again"
        ) from error
    to_canonical = ornt_transform(io_orientation(affine), axcodes2ornt(orientation))
    canonical_affine = affine @ inv_ornt_aff(to_canonical, shape)
    canonical = apply_orientation(voxels, to_canonical).transpose(2, 1, 0)
    canonical_zooms = np.empty(3)
    canonical_zooms[to_canonical[:, 0].astype(int)] = zooms
    slope, intercept = image.dataobj.slope, image.dataobj.inter
    return (
        _Stored(canonical, float(slope), float(intercept)),
        _Geometry(tuple(canonical_zooms[::-1].tolist()), canonical_affine, "".join(aff2axcodes(affine))),
    )


def _open(path: Path) -> nib.Nifti1Image:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a .nii.gz file; convert DICOM series first (dcm2niix)")
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    _nifti_suffix(path)
    if path.stat().st_size == 0:
        raise InputError(f"{path}: file is empty (0 bytes), copy it again")
    try:
        image = nib.load(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable NIfTI file ({_one_line(error)}); expected .nii or .nii.gz") from error
    if not isinstance(image, nib.Nifti1Image):  # Nifti2Image is a subclass; MGH, Analyze and others are not
        raise InputError(f"{path}: holds {type(image).__name__}, expected a NIfTI image")
    return image


def _nifti_suffix(path: Path) -> str:
    for suffix in (".nii.gz", ".nii"):
        if path.name.lower().endswith(suffix):
            return suffix
    raise InputError(f"{path}: expected a file named .nii.gz or .nii")


def _checked_shape(path: Path, image: nib.Nifti1Image) -> tuple[int, int, int]:
    """The three spatial lengths, after making sure that reading them cannot exhaust memory."""
    shape = image.shape
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise InputError(f"{path}: image has shape {shape}, expected three axes; extract one 3D volume")
    if min(shape) < 1:
        raise InputError(f"{path}: image has shape {shape}, an axis is empty")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise InputError(f"{path}: voxels are of type {dtype}, expected integers or floats in HU")
    voxels = math.prod(shape)
    file_size = path.stat().st_size
    limit = file_size * (_MAX_DEFLATE_RATIO if _nifti_suffix(path) == ".nii.gz" else 1)
    if voxels > _MAX_VOXELS or voxels * dtype.itemsize > limit:
        raise InputError(
            f"{path}: header announces {shape} voxels of {dtype.itemsize} bytes, more than a file of "
            f"{file_size} bytes holds; it is truncated or its header is damaged"
        )
    return shape[:3]


def _checked_affine(path: Path, image: nib.Nifti1Image) -> tuple[np.ndarray, np.ndarray]:
    """RAS+ affine and voxel sizes of the stored axes, both in mm."""
    header = image.header
    scale = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    zooms = np.asarray(header.get_zooms()[:3], dtype=np.float64) * scale
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform == 0 and qform == 0:
        logger.warning("%s: header gives no orientation; voxels are taken as stored in LPS order", path)
        affine = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
    else:
        affine = np.array(image.affine, dtype=np.float64)
        affine[:3] *= scale
    sizes = nib.affines.voxel_sizes(affine)
    low, high = _SPACING_RANGE_MM
    if not np.isfinite(affine).all() or not ((sizes >= low) & (sizes <= high)).all():
        raise InputError(f"{path}: voxel sizes {sizes.tolist()} mm are outside {low} to {high} mm, header is damaged")
    if abs(np.linalg.det(affine[:3, :3] / sizes)) < 0.1:
        raise InputError(f"{path}: the axes of the header's affine are not independent, header is damaged")
    if sform > 0 and qform > 0:
        _warn_if_forms_conflict(path, header, affine)
    # The header's own float32 sizes are what nnU-Net's readers report; for an oblique affine the norm of a
    # column differs in the last digit, which can move a rounded shape. Where they contradict each other, the
    # affine is trusted.
    return affine, zooms if np.allclose(zooms, sizes, rtol=1e-3) else sizes


def _warn_if_forms_conflict(path: Path, header: nib.Nifti1Header, affine: np.ndarray) -> None:
    used = "".join(aff2axcodes(affine))
    try:
        by_qform = "".join(aff2axcodes(header.get_qform()))
    except (HeaderDataError, ValueError):
        by_qform = "something unreadable"
    if by_qform != used:
        logger.warning("%s: sform says %s, qform %s; the sform is used, check left and right", path, used, by_qform)


def _largest_shift(affine: np.ndarray, other: np.ndarray, shape: tuple[int, int, int]) -> float:
    """Largest distance in mm between the corners of a (z, y, x) grid under two affines."""
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in reversed(shape)])).reshape(3, -1)
    difference = affine - other
    return float(np.linalg.norm(difference[:3, :3] @ corners + difference[:3, 3:], axis=0).max())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
