"""NIfTI-1 and NIfTI-2 (``.nii``, ``.nii.gz``, pairs ``.hdr`` + ``.img``): reading, and writing.

A header may place its voxels twice. The rule, which is nibabel's: the sform counts where its code is above 0,
else the qform; where neither is set, voxels are taken as stored in LPS order. A qform that contradicts the sform
used, and a file without either, is said in the image's notes.
"""

from __future__ import annotations

import gzip
import uuid
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Pair
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from config.errors import InputError
from data.imaging.volume import (
    MAX_DEFLATE_RATIO,
    ImageHeader,
    StoredImage,
    Volume,
    check_affine,
    check_shape,
    one_line,
    to_mask,
    to_volume,
)

__all__ = ["Volume", "read_header", "read_mask", "read_stored", "read_volume", "write_volume"]

SUFFIXES = (".nii.gz", ".nii", ".img.gz", ".hdr.gz", ".img", ".hdr")
_UNREADABLE = (
    ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, OverflowError, MemoryError,
)  # fmt: skip
_MM_PER_UNIT = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}
_GZIP = b"\x1f\x8b"


def read_volume(path: Path | str, orientation: str = "LPS") -> Volume:
    """Read a 3D volume, rescaled by the header's slope and intercept, in canonical ``orientation``.

    Raises InputError if the file is missing, empty, truncated or no NIfTI, if it is not a scalar 3D image
    (a trailing axis of length one is dropped), if its header contradicts itself, if it holds NaN or
    infinite values, or if every voxel has the same value.
    """
    return to_volume(read_stored(Path(path)), orientation)


def read_mask(path: Path | str, like: Volume) -> np.ndarray:
    """Read a label volume on the grid of ``like``: (z, y, x), uint8, or int16 where a label exceeds 255.

    Raises InputError as :func:`read_volume` does, and as :func:`data.imaging.volume.to_mask`.
    """
    return to_mask(read_stored(Path(path)), like)


def read_header(path: Path) -> ImageHeader:
    """The checked header; no voxel is read, but a file shorter than its header says is refused.

    Raises InputError as :func:`read_volume` does for the header.
    """
    image = _open(path)
    header = _checked_header(path, image)
    voxels = Path(image.file_map["image"].filename)
    needed = int(image.dataobj.offset) + int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    held = _length(voxels, needed)
    if held < needed:
        raise InputError(
            f"{voxels}: holds fewer than the {needed} bytes that its header announces; "
            "the file is truncated or damaged, copy it again"
        )
    return header


def read_stored(path: Path) -> StoredImage:
    """Header and voxels as they are stored."""
    image = _open(path)
    header = _checked_header(path, image)
    try:
        voxels = np.asarray(image.dataobj.get_unscaled()).reshape(header.shape, order="F")
    except _UNREADABLE as error:
        raise InputError(
            f"{path}: image data cannot be read ({one_line(error)}); the file is truncated or damaged, copy it again"
        ) from error
    return StoredImage(header, voxels, float(image.dataobj.slope), float(image.dataobj.inter))


def files_of(path: Path) -> list[Path]:
    """The files that make an image: one, or the two of a pair, the voxels last."""
    name, suffix = path.name.lower(), nifti_suffix(path)
    if suffix.startswith(".nii"):
        return [path]
    ending = ".gz" if name.endswith(".gz") else ""
    stem = path.name[: len(path.name) - len(suffix)]
    return [_sibling(path, f"{stem}{kind}{ending}") for kind in (".hdr", ".img")]


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
    suffix = nifti_suffix(path)
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


def nifti_suffix(path: Path) -> str:
    """Raises InputError for a name that is not NIfTI's."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise InputError(f"{path}: expected a file named .nii.gz or .nii (or a pair .hdr + .img)")


def _open(path: Path) -> Nifti1Pair:
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a .nii.gz file")
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    for file in files_of(path):
        if not file.is_file():
            raise InputError(f"{path}: is half of a pair, and {file.name} is missing beside it; copy both")
        if file.stat().st_size == 0:
            raise InputError(f"{file}: file is empty (0 bytes), copy it again")
    try:
        image = nib.load(path)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)}); expected .nii or .nii.gz") from error
    # Nifti1Image, Nifti2Image and Nifti2Pair are subclasses; MGH, plain Analyze and others are not.
    if not isinstance(image, Nifti1Pair):
        raise InputError(
            f"{path}: holds {type(image).__name__}, expected a NIfTI image; "
            "plain Analyze does not say which side is left: convert the original DICOM series"
        )
    return image


def _checked_header(path: Path, image: Nifti1Pair) -> ImageHeader:
    head = image.file_map.get("header", image.file_map["image"])
    with head.get_prepare_fileobj("rb") as stream:  # nibabel clears the slope of a header that it has loaded
        slope = type(image.header).from_fileobj(stream, check=False)["scl_slope"]
    if np.isinf(slope):  # NaN and 0 mean "not set"
        raise InputError(f"{path}: not a readable NIfTI file (its slope is infinite); its header is damaged")
    voxels = Path(image.file_map["image"].filename)
    limit = voxels.stat().st_size * (MAX_DEFLATE_RATIO if _is_gzip(voxels) else 1)
    try:
        dtype = image.get_data_dtype()
        shape = check_shape(path, image.shape, dtype, limit)
        affine, zooms, notes = _placement(path, image)
    except (HeaderDataError, OverflowError) as error:
        raise InputError(f"{path}: not a readable NIfTI file ({one_line(error)}); its header is damaged") from error
    return ImageHeader(path, shape, dtype, affine, zooms, tuple(notes))


def _placement(path: Path, image: Nifti1Pair) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """RAS+ affine and voxel sizes of the stored axes, both in mm, and what is doubtful about them."""
    header = image.header
    notes = []
    try:
        scale = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        raise InputError(f"{path}: header names an unknown unit of length, header is damaged") from None
    zooms = np.asarray(header.get_zooms()[:3], dtype=np.float64) * scale
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform <= 0 and qform <= 0:
        notes.append(
            "header gives no orientation; voxels are taken as stored in LPS order, so left and right are a guess"
        )
        affine = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
    else:
        affine = np.array(image.affine, dtype=np.float64)
        affine[:3] *= scale
    sizes = check_affine(path, affine)
    if sform > 0 and qform > 0:
        notes += _conflict(header, affine, scale)
    # The header's own float32 sizes are what nnU-Net's readers report; for an oblique affine the norm of a
    # column differs in the last digit, which can move a rounded shape. Where they contradict each other, the
    # affine is trusted.
    if np.allclose(zooms, sizes, rtol=1e-3):
        return affine, zooms, notes
    notes.append(f"header gives voxel sizes {_mm(zooms)} mm, its affine {_mm(sizes)} mm; the affine is used")
    return affine, sizes, notes


def _conflict(header: nib.Nifti1Header, affine: np.ndarray, scale: float) -> list[str]:
    """What the qform contradicts of the sform: axes first, then direction, then place."""
    used = "".join(aff2axcodes(affine))
    try:
        other = np.array(header.get_qform(), dtype=np.float64)
        other[:3] *= scale
        by_qform = "".join(map(str, aff2axcodes(other)))
    except (HeaderDataError, ValueError):
        return [f"sform says {used}, qform is unreadable; the sform is used, check left and right"]
    if by_qform != used:
        return [f"sform says {used}, qform {by_qform}; the sform is used, check left and right"]
    sizes = nib.affines.voxel_sizes(affine)
    cosines = np.sum(affine[:3, :3] * other[:3, :3], axis=0) / (sizes * nib.affines.voxel_sizes(other))
    degrees = float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
    if degrees > 1.0:
        return [f"sform and qform differ by {degrees:.1f} degrees; the sform is used"]
    shift = float(np.linalg.norm(affine[:3, 3] - other[:3, 3]))
    if shift > sizes.max():
        return [f"sform and qform place the image {shift:.1f} mm apart; the sform is used, a mask must agree with it"]
    return []


def _length(path: Path, needed: int) -> int:
    """Bytes that a file holds once unpacked, counted only as far as ``needed``."""
    size = path.stat().st_size
    if not _is_gzip(path):
        return size
    with path.open("rb") as packed:
        packed.seek(-4, 2)
        stated = int.from_bytes(packed.read(4), "little")  # gzip's last word: length modulo 2**32
    # A truncated file ends in arbitrary bytes, and one of several gzip members states the last one's length:
    # only the exact length is believed, else the file is unpacked to see, without keeping it.
    if stated == needed % 2**32:
        return needed
    held = 0
    try:
        with gzip.open(path) as stream:
            while held < needed and (block := stream.read(1 << 20)):
                held += len(block)
    except (OSError, EOFError, zlib.error):
        return held
    return held


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == _GZIP


def _sibling(path: Path, name: str) -> Path:
    """``name`` beside ``path``, in whatever capitals it is written there."""
    beside = path.with_name(name)
    if not beside.is_file() and path.parent.is_dir():
        for file in path.parent.iterdir():
            if file.name.lower() == name.lower():
                return file
    return beside


def _mm(sizes: np.ndarray) -> str:
    return " x ".join(f"{size:.4g}" for size in sizes)
