"""What every image format becomes: an array in one canonical orientation, or a label mask on its grid.

Arrays have axes (z, y, x). For ``orientation="LPS"`` z runs to the head, y to the back and x to the patient's left,
as SimpleITK, hence nnU-Net, reads a file with identity direction. ``orientation="file"`` keeps the file's axes,
reversed, as nnU-Net's SimpleITKIO and NibabelIO give them; :attr:`Volume.axcodes` names them, and a mask is turned to
the axes of its image. Oblique volumes are not resampled: the nearest anatomical axis names each of theirs.

An image that cannot be trusted raises :class:`~config.errors.InputError`; no value is replaced or invented.
"""

from __future__ import annotations

import logging
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel import orientations

from config.errors import InputError

logger = logging.getLogger(__name__)

MAX_VOXELS = 2**31  # 8 GiB as float32; whole-body CT at 512 x 512 x 2000 has a quarter of it
MAX_DEFLATE_RATIO = 1040  # deflate cannot do better than 1032 : 1, so a smaller file cannot hold the array
SPACING_RANGE_MM = (0.01, 100.0)
LUNG_WINDOW_HU = (-1350, 150)
SOFT_TISSUE_WINDOW_HU = (-160, 240)
_TILT_DEGREES = 0.5
_GRID_TOLERANCE = 0.1  # of the smallest spacing; headers are rounded, a shifted mask is off by far more

# What the libraries raise on damaged files.
_DAMAGE = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError, TypeError)
_DAMAGE += (ValueError, struct.error, zlib.error)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Volume:
    """A CT volume. ``array``: float32 (z, y, x) in HU; ``spacing``: (z, y, x) in mm; ``axcodes``: where x, y, z run to.

    ``affine``: (4, 4), maps (x, y, z) indices to RAS+ mm. ``orientation``: as asked for, axis codes or "file".
    """

    array: np.ndarray
    spacing: Triple
    affine: np.ndarray
    orientation: str
    path: Path
    axcodes: str


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of itself, before a voxel is read; axes (i, j, k) in the order of storage.

    ``affine``: (4, 4), maps (i, j, k) to RAS+ mm; ``zooms``: size of a voxel along i, j, k in mm; ``notes``: what the
    header leaves in doubt.
    """

    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype
    affine: np.ndarray
    zooms: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def axcodes(self) -> str:
        return "".join(orientations.aff2axcodes(self.affine))

    @property
    def extent_mm(self) -> Triple:
        """Size of the whole image along the patient: feet to head, front to back, side to side."""
        return self._along_patient(self.zooms * self.shape)

    @property
    def spacing(self) -> Triple:
        """(z, y, x) in mm of the canonical array."""
        return self._along_patient(self.zooms)

    def _along_patient(self, sizes: np.ndarray) -> Triple:
        axes = orientations.io_orientation(self.affine)[:, 0]
        return tuple(sizes[np.argsort(-axes)].tolist())


@dataclass(frozen=True)
class StoredImage:
    """Voxels (i, j, k) in the file's number type; value = slope * voxel + intercept."""

    header: ImageHeader
    voxels: np.ndarray
    slope: float = 1.0
    intercept: float = 0.0


def to_volume(stored: StoredImage, orientation: str = "LPS") -> Volume:
    """Rescale a stored image and turn it into ``orientation``: three axis codes, or "file" for its own order.

    Raises InputError if it holds NaN or infinite values, or if every voxel has the same value.
    """
    header = stored.header
    for note in header.notes:
        logger.warning("%s: %s", header.path, note)
    axcodes = header.axcodes if orientation == "file" else orientation
    values, spacing, affine = _turned(stored, axcodes)
    with np.errstate(over="ignore"):  # a value beyond float32 becomes infinite and is refused below
        array = values.astype(np.float32, order="C")
        if stored.slope != 1.0:
            array *= np.float32(stored.slope)
        if stored.intercept != 0.0:
            array += np.float32(stored.intercept)
    # min and max propagate NaN, and an infinity is one of them: two passes without a temporary array.
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(
            f"{header.path}: {np.isnan(array).sum()} voxels are NaN and {np.isinf(array).sum()} infinite, expected HU; "
            "fill them (air is -1000) where the file was made"
        )
    if low == high:
        raise InputError(f"{header.path}: every voxel is {low:g}, expected a CT image; the export went wrong")
    return Volume(array, spacing, affine, orientation, header.path, axcodes)


def to_mask(stored: StoredImage, like: Volume) -> np.ndarray:
    """A label volume on the grid of ``like``: (z, y, x), uint8, or int16 where a label exceeds 255.

    Raises InputError if labels are not whole numbers from 0 to 32767 or the grid (shape, or position within a
    tenth of a voxel) is not that of ``like``.
    """
    path = stored.header.path
    values, _, affine = _turned(stored, like.axcodes)
    if values.shape != like.array.shape:
        raise InputError(
            f"{path}: mask has shape {values.shape} (z, y, x), its image {like.path} has {like.array.shape}; "
            "the mask must be drawn on the image's own grid"
        )
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in reversed(values.shape)], [1])).reshape(4, -1)
    shift = np.linalg.norm((affine - like.affine)[:3] @ corners, axis=0).max()
    if shift > _GRID_TOLERANCE * min(like.spacing):
        raise InputError(
            f"{path}: mask lies up to {shift:.2f} mm away from its image {like.path}; align origin, spacing, direction"
        )
    if (stored.slope, stored.intercept) != (1.0, 0.0):
        values = values.astype(np.float64) * stored.slope + stored.intercept
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= np.iinfo(np.int16).max):  # written so that NaN fails it
        raise InputError(f"{path}: mask values run from {low} to {high}, expected whole labels 0 to 32767")
    if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
        raise InputError(f"{path}: mask holds fractions, expected whole labels; was it resampled linearly?")
    return values.astype(np.uint8 if high <= 255 else np.int16, order="C")


def turned_to_lps(volume: Volume, labels: np.ndarray | None = None) -> tuple[Volume, np.ndarray | None]:
    """``volume`` and ``labels`` on its grid, turned to LPS from the axis order of their file."""
    if volume.axcodes == "LPS":
        return volume, labels
    turn = _turn(volume.axcodes, "LPS")
    affine = volume.affine @ orientations.inv_ornt_aff(turn, volume.array.shape[::-1])
    spacing = tuple(np.array(volume.spacing[::-1])[np.argsort(turn[:, 0])][::-1].tolist())
    array = turned(volume.array, volume.axcodes, "LPS")
    lps = Volume(array, spacing, affine, "LPS", volume.path, "LPS")
    return lps, None if labels is None else turned(labels, volume.axcodes, "LPS")


def turned(array: np.ndarray, there: str, here: str) -> np.ndarray:
    """(z, y, x) in one orientation of the same axes (``RAS``, ``LPS``) as (z, y, x) in another."""
    return orientations.apply_orientation(array.transpose(2, 1, 0), _turn(there, here)).transpose(2, 1, 0)


def _turn(there: str, here: str) -> np.ndarray:
    return orientations.ornt_transform(orientations.axcodes2ornt(there), orientations.axcodes2ornt(here))


def as_stored(array: np.ndarray, header: ImageHeader, axcodes: str = "LPS") -> np.ndarray:
    """(z, y, x), whose axes run to ``axcodes``, as (k, j, i) on the grid of the file that ``header`` is of.

    Raises ValueError: another number of voxels than the file has."""
    turn = orientations.ornt_transform(orientations.axcodes2ornt(axcodes), orientations.io_orientation(header.affine))
    stored = orientations.apply_orientation(array.transpose(2, 1, 0), turn)
    if stored.shape != header.shape:
        raise ValueError(f"an array of {stored.shape} voxels for an image of {header.shape}")
    return stored.transpose(2, 1, 0)


def check_shape(path: Path, shape: tuple[int, ...], dtype: np.dtype, limit_bytes: int) -> tuple[int, int, int]:
    """The three spatial lengths, after making sure that reading them cannot exhaust memory.

    ``limit_bytes``: the most that the file can hold. Trailing axes of length one are dropped.

    Raises InputError for another number of axes, an empty axis, colours, complex numbers, or too many voxels.
    """
    if len(shape) < 3 or any(length != 1 for length in shape[3:]):
        raise InputError(f"{path}: image has shape {shape}, expected three axes; extract one 3D volume")
    if min(shape) < 1:
        raise InputError(f"{path}: image has shape {shape}, an axis is empty")
    if dtype.kind not in "iuf":
        kind = {"c": "complex numbers", "V": "colours (RGB)"}.get(dtype.kind, f"of type {dtype}")
        raise InputError(f"{path}: voxels are {kind}, expected integers or floats in HU; export the CT itself")
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS or voxels * dtype.itemsize > limit_bytes:
        raise InputError(
            f"{path}: header announces {shape} voxels, more than a file of {path.stat().st_size} bytes holds; "
            "it is truncated or its header is damaged"
        )
    return tuple(int(length) for length in shape[:3])


def check_affine(path: Path, affine: np.ndarray) -> np.ndarray:
    """Voxel sizes in mm of a (4, 4) ``affine``. Raises InputError where it describes no box of voxels."""
    sizes = nib.affines.voxel_sizes(affine)
    low, high = SPACING_RANGE_MM
    if not np.isfinite(affine).all() or not ((sizes >= low) & (sizes <= high)).all():
        raise InputError(f"{path}: voxel sizes {sizes.tolist()} mm are outside {low} to {high} mm, header is damaged")
    axes = affine[:3, :3] / sizes
    if abs(np.linalg.det(axes)) < 0.1:
        raise InputError(f"{path}: the axes of the header's affine are not independent, header is damaged")
    # Row k of the inverse is the normal of the other two axes; its product with axis k is 1.
    cosines = 1 / np.linalg.norm(np.linalg.inv(axes), axis=1)
    tilt = float(np.degrees(np.arccos(np.clip(cosines.min(), -1, 1))))
    if tilt > _TILT_DEGREES:
        remedy = "straighten the DICOM series (dcm2niix does, into ..._Tilt_1.nii.gz) and use that file"
        raise InputError(f"{path}: the gantry was tilted by {tilt:.1f} degrees, slices are shifted; {remedy}")
    return sizes


def affine_from_lps(axes: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """(4, 4) affine to RAS+ mm. ``axes``: (3, 3), the step along i, j, k in its columns; both LPS+ in mm."""
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.block([[axes, np.reshape(origin, (3, 1))], [np.zeros((1, 3)), 1.0]])


@contextmanager
def refusing(path: Path, problem: str, remedy: str, *errors: type[Exception]) -> Iterator[None]:
    """Raise InputError for what a library raises on a damaged file; ``errors``: classes of its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd values; those that matter are checked here
            yield
    except InputError:
        raise
    except (*_DAMAGE, *errors) as error:
        reason = re.split(r"(?:ITK |itk::)ERROR: ", " ".join(str(error).split()))[-1][:200] or type(error).__name__
        raise InputError(f"{path}: {problem} ({reason}); {remedy}") from error


def _turned(stored: StoredImage, axcodes: str) -> tuple[np.ndarray, Triple, np.ndarray]:
    """Voxels (z, y, x), spacing (z, y, x) and affine of the grid with ``axcodes``; the values stay as stored."""
    header = stored.header
    stored_axes = orientations.io_orientation(header.affine)
    turn = orientations.ornt_transform(stored_axes, orientations.axcodes2ornt(axcodes))
    affine = header.affine @ orientations.inv_ornt_aff(turn, header.shape)
    voxels = orientations.apply_orientation(stored.voxels, turn).transpose(2, 1, 0)
    return voxels, tuple(header.zooms[np.argsort(-turn[:, 0])].tolist()), affine
