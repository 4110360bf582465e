"""DICOM CT series: the slices of one series in a folder, sorted by position, as one image in HU.

pydicom reads headers and plain pixels; slices that are compressed (JPEG, JPEG 2000, JPEG-LS) are unpacked by
SimpleITK. Slices lie along the normal of their plane, in equal steps, or the series is refused: nothing is
interpolated. Scouts, secondary captures and objects without pixels are left out, and said.

Source: DICOM PS3.3, C.7.6.2 (image plane: position, orientation, spacing) and C.11.1 (rescale slope, intercept).
"""

from __future__ import annotations

import logging
import struct
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import BytesLengthException, InvalidDicomError

from config.errors import InputError
from data.imaging.dicom_files import files_below, is_dicom
from data.imaging.volume import MAX_DEFLATE_RATIO, MAX_VOXELS, ImageHeader, StoredImage, check_affine, one_line

# What pydicom raises on damaged files, besides its own errors.
_UNREADABLE = (
    InvalidDicomError, BytesLengthException, OSError, EOFError, ValueError, TypeError, KeyError, AttributeError,
    IndexError, NotImplementedError, OverflowError, MemoryError, RuntimeError, LookupError, struct.error,
)  # fmt: skip
_TAGS = [
    "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality", "ImageType",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SamplesPerPixel",
    "BitsAllocated", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
]  # fmt: skip
_STEP_TOLERANCE = 0.05  # of the distance between slices
_TILT_DEGREES = 0.5
_UNCOMPRESSED = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"}
_RLE = "1.2.840.10008.1.2.5"
_DIRECTORY = "1.2.840.10008.1.3.10"

logging.getLogger("pydicom").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Slice:
    """One file's place and pixels. ``position``, ``row``, ``column``: mm and unit vectors, DICOM's LPS+."""

    path: Path
    position: np.ndarray
    row: np.ndarray
    column: np.ndarray
    spacing: tuple[float, float]
    shape: tuple[int, int]
    slope: float
    intercept: float
    compressed: bool


@dataclass(frozen=True)
class Series:
    """The files of one series. ``problem``: why it is no CT volume, or empty."""

    uid: str
    number: str
    description: str
    files: tuple[Path, ...]
    headers: tuple[pydicom.Dataset, ...]
    problem: str

    def __str__(self) -> str:
        name = f"'{self.description}' " if self.description else ""
        return f"{self.number or '?'} {name}({len(self.files)} images, first {self.files[0].name})"


def series_in(folder: Path) -> list[Series]:
    """Every series below ``folder``, by number.

    Raises InputError if there is no DICOM file, or if one that says it is DICOM cannot be read.
    """
    grouped: dict[str, list[tuple[Path, pydicom.Dataset]]] = defaultdict(list)
    for file in files_below(folder):
        if is_dicom(file):
            header = _header(file)
            if header.get("SeriesInstanceUID"):
                grouped[str(header.SeriesInstanceUID)].append((file, header))
    if not grouped:
        raise InputError(f"{folder}: folder holds no DICOM file; name a .nii.gz file or the folder of a CT series")
    found = []
    for uid, members in grouped.items():
        files, headers = zip(*members, strict=True)
        first = headers[0]
        found.append(
            Series(
                uid, _text(first, "SeriesNumber"), _text(first, "SeriesDescription"), files, headers,
                _why_no_volume(headers),
            )
        )  # fmt: skip
    return sorted(found, key=lambda series: (len(series.number), series.number, series.uid))


def choose_series(path: Path) -> tuple[Series, list[str]]:
    """The one CT series below a folder, or the series of the file named; and what was left out.

    Raises InputError, listing the series, where there is none or more than one.
    """
    every = series_in(path if path.is_dir() else path.parent)
    if path.is_dir():
        volumes = [series for series in every if not series.problem]
    else:
        volumes = [series for series in every if path in series.files]
        every = volumes
    if len(volumes) == 1 and not volumes[0].problem:
        return volumes[0], [f"left out series {s}: {s.problem}" for s in every if s.problem]
    if len(volumes) > 1:
        listed = "; ".join(map(str, volumes))
        raise InputError(f"{path}: holds {len(volumes)} CT series, name one file of the right one: {listed}")
    listed = "; ".join(f"{series}: {series.problem}" for series in every[:5])
    raise InputError(f"{path}: holds no CT volume: {listed}")


def read_header(path: Path) -> ImageHeader:
    """The checked geometry of the series at ``path`` (a folder, or one of its files).

    Raises InputError for what cannot be one volume in HU: several series, missing or doubled slices, uneven
    steps, a tilted gantry, colours, several frames, no rescaling.
    """
    return _read_geometry(path)[0]


def read_stored(path: Path) -> StoredImage:
    """Header and voxels (column, row, slice), float32 HU."""
    header, slices = _read_geometry(path)
    columns, rows, count = header.shape
    voxels = np.empty((count, rows, columns), dtype=np.float32)
    for index, piece in enumerate(slices):
        voxels[index] = _pixels(piece)
    return StoredImage(header, voxels.transpose(2, 1, 0))


def _header(path: Path) -> pydicom.Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's words on odd values; what matters is checked below
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=False)
            for tag in _TAGS:  # values are parsed on first use: here, where an error can name the file
                header.get(tag)
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable DICOM file ({one_line(error)}); copy it again") from error
    if not header.get("SeriesInstanceUID") and header.file_meta.get("MediaStorageSOPClassUID") != _DIRECTORY:
        raise InputError(f"{path}: not a readable DICOM file (it names no series); copy it again")
    return header


def _why_no_volume(headers: Sequence[pydicom.Dataset]) -> str:
    first = headers[0]
    kinds = [str(kind).upper() for kind in np.atleast_1d(first.get("ImageType") or [])]
    modality = _text(first, "Modality")
    if not any("Rows" in header for header in headers):
        return "no pixels"
    if "LOCALIZER" in kinds:
        return "a scout"
    if modality != "CT":
        return f"modality {modality or 'not given'}, expected CT"
    if int(first.get("SamplesPerPixel") or 1) != 1:
        return "colours, expected HU"
    if _text(first, "NumberOfFrames") not in ("", "1"):
        return "several frames in one file; convert it with dcm2niix"
    if "ImagePositionPatient" not in first or "ImageOrientationPatient" not in first:
        return "no position in the patient (a secondary capture)"
    return ""


def _read_geometry(path: Path) -> tuple[ImageHeader, list[Slice]]:
    if not path.exists():
        raise InputError(f"{path}: file not found")
    series, notes = choose_series(path)
    slices = [_slice(file, header) for file, header in zip(series.files, series.headers, strict=True)]
    if len(slices) < 2:
        raise InputError(f"{path}: series {series} is a single image, expected a volume")
    first = slices[0]
    for other in slices:
        same = other.shape == first.shape and np.allclose(other.spacing, first.spacing, rtol=1e-3)
        if not same or not np.allclose([other.row, other.column], [first.row, first.column], atol=1e-3):
            raise InputError(
                f"{other.path}: size, spacing or direction differ from {first.path.name} of the same series; "
                "keep the slices of one volume"
            )
    normal = np.cross(first.row, first.column)
    slices.sort(key=lambda piece: float(piece.position @ normal))
    step = _step(path, slices, normal)
    lps = np.eye(4)
    lps[:3, 0] = first.row * first.spacing[1]
    lps[:3, 1] = first.column * first.spacing[0]
    lps[:3, 2] = normal * step
    lps[:3, 3] = slices[0].position
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    zooms = check_affine(path, affine)
    rows, columns = first.shape
    shape = (columns, rows, len(slices))
    if columns * rows * len(slices) > MAX_VOXELS:
        raise InputError(f"{path}: headers announce {shape} voxels, more than a CT has; they are damaged")
    return ImageHeader(path, shape, np.dtype(np.float32), affine, zooms, tuple(notes)), slices


def _slice(path: Path, header: pydicom.Dataset) -> Slice:
    try:
        position = _numbers(header, "ImagePositionPatient", 3)
        cosines = _numbers(header, "ImageOrientationPatient", 6)
        spacing = _numbers(header, "PixelSpacing", 2)
        rows, columns = int(header["Rows"].value), int(header["Columns"].value)
        bits = int(header.get("BitsAllocated") or 16)
        slope, intercept = (float(_numbers(header, tag, 1)[0]) for tag in ("RescaleSlope", "RescaleIntercept"))
        syntax = str(header.file_meta.TransferSyntaxUID)
    except KeyError as error:
        raise InputError(f"{path}: has no {error.args[0]}, so it gives no HU; export the original CT series") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: its header is damaged ({one_line(error)}); copy it again") from error
    row, column = cosines[:3], cosines[3:]
    if not (np.allclose([row @ row, column @ column], 1, atol=1e-2) and abs(row @ column) < 1e-2):
        raise InputError(f"{path}: image orientation {cosines.tolist()} is no pair of axes, header is damaged")
    if slope == 0:
        raise InputError(f"{path}: rescale slope is 0, so every voxel is one value; export the original CT series")
    compressed = syntax not in _UNCOMPRESSED
    held = path.stat().st_size * (MAX_DEFLATE_RATIO if compressed or syntax.endswith(".99") else 1)
    if min(rows, columns) < 1 or rows * columns * max(bits // 8, 1) > held:
        raise InputError(
            f"{path}: header announces {rows} x {columns} pixels, more than a file of {path.stat().st_size} bytes "
            "holds; it is truncated or its header is damaged"
        )
    return Slice(path, position, row, column, tuple(spacing), (rows, columns), slope, intercept, compressed)


def _numbers(header: pydicom.Dataset, tag: str, count: int) -> np.ndarray:
    if tag not in header or header[tag].value in (None, ""):
        raise KeyError(tag)
    numbers = np.atleast_1d(np.asarray(header[tag].value, dtype=np.float64))
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{tag} is {header[tag].value!r}, expected {count} numbers")
    return numbers


def _step(path: Path, slices: list[Slice], normal: np.ndarray) -> float:
    """Distance between neighbouring slices in mm. Raises InputError where it is not one distance."""
    places = np.array([piece.position for piece in slices])
    along = places @ normal
    steps = np.diff(along)
    if steps.min() < 1e-3:
        index = int(steps.argmin())
        raise InputError(
            f"{path}: two slices lie at {along[index]:.2f} mm ({slices[index].path.name}, "
            f"{slices[index + 1].path.name}); keep one reconstruction and one phase"
        )
    if steps.max() - steps.min() > _STEP_TOLERANCE * steps.min():
        index = int(steps.argmax())
        multiples = steps / steps.min()
        if np.abs(multiples - np.rint(multiples)).max() < 2 * _STEP_TOLERANCE:
            raise InputError(
                f"{path}: {int((np.rint(multiples) - 1).sum())} slice(s) are missing, for example between "
                f"{along[index]:.2f} and {along[index + 1]:.2f} mm (others are {steps.min():.2f} mm apart); "
                "export the series again"
            )
        raise InputError(
            f"{path}: slices are {steps.min():.2f} to {steps.max():.2f} mm apart, expected one distance; "
            "resample the series where it was made"
        )
    drift = places[-1] - places[0]
    tilt = float(np.degrees(np.arccos(np.clip(drift @ normal / np.linalg.norm(drift), -1, 1))))
    if tilt > _TILT_DEGREES:
        raise InputError(
            f"{path}: the gantry was tilted by {tilt:.1f} degrees, so slices are shifted against each other; "
            "straighten the series (dcm2niix does) and use its .nii.gz"
        )
    return float(along[-1] - along[0]) / (len(slices) - 1)


def _pixels(piece: Slice) -> np.ndarray:
    """(row, column) float32 HU."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(piece.path)
        if not piece.compressed or str(data.file_meta.TransferSyntaxUID) == _RLE:
            pixels = data.pixel_array.astype(np.float32) * np.float32(piece.slope) + np.float32(piece.intercept)
        else:
            pixels = _unpacked(piece.path)
    except _UNREADABLE as error:
        raise InputError(f"{piece.path}: pixels cannot be read ({one_line(error)}); copy it again") from error
    if pixels.shape != piece.shape:
        raise InputError(f"{piece.path}: pixels are {pixels.shape}, the header says {piece.shape}; copy it again")
    return pixels


def _unpacked(path: Path) -> np.ndarray:
    """A compressed slice in HU: SimpleITK applies slope and intercept itself."""
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    reader.SetOutputPixelType(SimpleITK.sitkFloat32)
    return SimpleITK.GetArrayFromImage(reader.Execute())[0]


def _text(header: pydicom.Dataset, tag: str) -> str:
    value = header.get(tag)
    return "" if value is None else str(value).strip()
