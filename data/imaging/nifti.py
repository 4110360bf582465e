"""NIfTI-1 and NIfTI-2 (``.nii``, ``.nii.gz``, pairs ``.hdr`` + ``.img``): reading, and writing.

A header may place its voxels twice. The rule, which is nibabel's: the sform counts where its code is above 0,
else the qform; where neither is set, voxels are taken as stored in LPS order. A qform that contradicts the sform
used, and a file without either, is named in the image's notes.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Pair
from nibabel.orientations import aff2axcodes
from nibabel.spatialimages import HeaderDataError

from config.errors import InputError
from config.files import atomic_path
from data.imaging.volume import MAX_DEFLATE_RATIO, ImageHeader, StoredImage, Triple, check_affine, check_shape, refusing

SUFFIXES = (".nii.gz", ".nii", ".img.gz", ".hdr.gz", ".img", ".hdr")
_MM_PER_UNIT = {"meter": 1000.0, "micron": 0.001}  # any other unit counts as mm


def read_header(path: Path) -> ImageHeader:
    """The checked header; no voxel is read, but a file shorter than its header says is refused.

    Raises InputError if the file is missing, empty, truncated or no NIfTI, if it is not a scalar 3D image (a trailing
    axis of length one is dropped), or if its header contradicts itself.
    """
    image, header = _open(path)
    voxels = Path(image.file_map["image"].filename)
    needed = int(image.dataobj.offset) + int(np.prod(header.shape, dtype=object)) * header.dtype.itemsize
    if not _holds(voxels, needed):
        raise InputError(f"{voxels}: holds less than the {needed} bytes announced; it is truncated, copy it again")
    return header


def read_stored(path: Path) -> StoredImage:
    """Header and voxels as they are stored. Raises InputError as :func:`read_header`."""
    image, header = _open(path)
    with refusing(path, "image data cannot be read", "the file is truncated or damaged, copy it again"):
        packed = files_of(path)[-1]
        voxels = _unpacked(packed, image.dataobj) if _is_gzip(packed) else np.asarray(image.dataobj.get_unscaled())
        voxels = voxels.reshape(header.shape, order="F")
    return StoredImage(header, voxels, float(image.dataobj.slope), float(image.dataobj.inter))


def files_of(path: Path) -> list[Path]:
    """The files that make an image: one, or the two of a pair, the voxels last, in whatever capitals they are named."""
    suffix = next(suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix))
    if suffix.startswith(".nii"):
        return [path]
    ending = ".gz" if suffix.endswith(".gz") else ""
    return [sibling(path, f"{path.name[: -len(suffix)]}{kind}{ending}") for kind in (".hdr", ".img")]


def sibling(path: Path, name: str) -> Path:
    """``name`` beside ``path``, in whatever capitals it is written there."""
    beside = path.with_name(name)
    if beside.is_file() or not path.parent.is_dir():
        return beside
    return next((file for file in path.parent.iterdir() if file.name.lower() == name.lower()), beside)


def nifti_image(array: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """``array`` (z, y, x) on the grid that ``affine`` maps from (x, y, z) indices to RAS+ mm."""
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    return image


def write_volume(path: Path | str, array: np.ndarray, spacing: Triple, affine: np.ndarray | None = None) -> None:
    """Write ``array`` (z, y, x), int16, uint8 or float32, as ``.nii.gz`` or ``.nii``, atomically.

    The bytes depend on the arguments alone. ``spacing`` is (z, y, x) in mm. ``affine`` maps (x, y, z) indices to
    RAS+ mm; without it the array is taken as LPS with its first voxel at the origin.
    """
    if array.ndim != 3 or array.dtype not in (np.int16, np.uint8, np.float32):
        raise ValueError(f"expected a 3D int16, uint8 or float32 array, got {array.dtype} with shape {array.shape}")
    if affine is None:
        affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])
    elif not np.allclose(nib.affines.voxel_sizes(affine)[::-1], spacing, rtol=1e-3):
        raise ValueError(f"spacing {spacing} (z, y, x) contradicts the affine {affine.tolist()}")
    with atomic_path(Path(path)) as part:
        nib.save(nifti_image(array, affine), part)


def _open(path: Path) -> tuple[Nifti1Pair, ImageHeader]:
    """The file as nibabel opens it, and its checked header."""
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    for file in files_of(path):
        if not file.is_file():
            raise InputError(f"{path}: is half of a pair, and {file.name} is missing beside it; copy both")
        if file.stat().st_size == 0:
            raise InputError(f"{file}: file is empty (0 bytes), copy it again")
    with refusing(path, "not a readable NIfTI file", "expected .nii or .nii.gz", ImageFileError, HeaderDataError):
        image = nib.load(path)
    # Nifti1Image, Nifti2Image and Nifti2Pair are subclasses; MGH, plain Analyze and others are not.
    if not isinstance(image, Nifti1Pair):
        raise InputError(
            f"{path}: holds {type(image).__name__}, expected a NIfTI image; "
            "plain Analyze does not say which side is left: convert the original DICOM series"
        )
    head = image.file_map.get("header", image.file_map["image"])
    with head.get_prepare_fileobj("rb") as stream:  # nibabel clears the slope of a header that it has loaded
        slope = type(image.header).from_fileobj(stream, check=False)["scl_slope"]
    if np.isinf(slope):  # NaN and 0 mean "not set"
        raise InputError(f"{path}: not a readable NIfTI file (its slope is infinite); its header is damaged")
    voxels = Path(image.file_map["image"].filename)
    limit = voxels.stat().st_size * (MAX_DEFLATE_RATIO if _is_gzip(voxels) else 1)
    with refusing(path, "not a readable NIfTI file", "its header is damaged", HeaderDataError):
        dtype = image.get_data_dtype()
        shape = check_shape(path, image.shape, dtype, limit)
        return image, ImageHeader(path, shape, dtype, *_placement(path, image))


def _placement(path: Path, image: Nifti1Pair) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """RAS+ affine and voxel sizes of the stored axes, both in mm, and what is doubtful about them."""
    header = image.header
    try:
        scale = _MM_PER_UNIT.get(header.get_xyzt_units()[0], 1.0)
    except KeyError:
        raise InputError(f"{path}: header names an unknown unit of length, header is damaged") from None
    zooms = np.asarray(header.get_zooms()[:3], dtype=np.float64) * scale
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    note = ""
    if sform <= 0 and qform <= 0:
        note = "header gives no orientation; voxels are taken as stored in LPS order, so left and right are a guess"
        affine = np.diag([-zooms[0], -zooms[1], zooms[2], 1.0])
    else:
        affine = np.array(image.affine, dtype=np.float64)
        affine[:3] *= scale
    sizes = check_affine(path, affine)
    if sform > 0 and qform > 0:
        note = _conflict(header, affine, scale)
    notes = (note,) if note else ()
    # The header's own float32 sizes are what nnU-Net's readers report; for an oblique affine the norm of a column
    # differs in the last digit, which can move a rounded shape.
    if np.allclose(zooms, sizes, rtol=1e-3):
        return affine, zooms, notes
    both = " mm, its affine ".join("{:.4g} x {:.4g} x {:.4g}".format(*each) for each in (zooms, sizes))
    return affine, sizes, (*notes, f"header gives voxel sizes {both} mm; the affine is used")


def _conflict(header: nib.Nifti1Header, affine: np.ndarray, scale: float) -> str:
    """What the qform contradicts of the sform, axes first, then direction, then place; empty if nothing."""
    used = "".join(aff2axcodes(affine))
    try:
        other = np.array(header.get_qform(), dtype=np.float64)
        other[:3] *= scale
        by_qform = "".join(map(str, aff2axcodes(other)))
    except (HeaderDataError, ValueError):
        by_qform = "is unreadable"
    if by_qform != used:
        return f"sform says {used}, qform {by_qform}; the sform is used, check left and right"
    sizes = nib.affines.voxel_sizes(affine)
    cosines = np.sum(affine[:3, :3] * other[:3, :3], axis=0) / (sizes * nib.affines.voxel_sizes(other))
    degrees = float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
    if degrees > 1.0:
        return f"sform and qform differ by {degrees:.1f} degrees; the sform is used"
    shift = float(np.linalg.norm(affine[:3, 3] - other[:3, 3]))
    if shift > sizes.max():
        return f"sform and qform place the image {shift:.1f} mm apart; the sform is used, a mask must agree with it"
    return ""


def _holds(path: Path, needed: int) -> bool:
    """Whether a file, once unpacked, has ``needed`` bytes; none of them is kept."""
    if not _is_gzip(path):
        return path.stat().st_size >= needed
    with path.open("rb") as packed:
        packed.seek(-4, 2)
        stated = int.from_bytes(packed.read(4), "little")  # gzip's last word: length modulo 2**32
    # A truncated file ends in arbitrary bytes, several members in the last one's length: any but an exact match is
    # unpacked.
    if stated == needed % 2**32:
        return True
    try:
        with gzip.open(path) as stream:
            stream.seek(needed - 1)
            return len(stream.read(1)) == 1
    except (OSError, EOFError, ValueError, OverflowError, zlib.error):
        return False


def _unpacked(path: Path, data: ArrayProxy) -> np.ndarray:
    """The stored numbers of a gzip file that is read to its end, where its checksum stands; nibabel stops before.

    Raises OSError, EOFError or zlib.error: damaged.
    """
    count = math.prod(data.shape)
    with gzip.open(path) as stream:
        stream.seek(data.offset)
        content = stream.read(count * data.dtype.itemsize)
        while stream.read(1 << 20):
            pass
    return np.frombuffer(content, data.dtype, count)


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"
