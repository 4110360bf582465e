"""DICOM CT series: the slices of one series in a folder, sorted by position, as one image in HU.

pydicom reads headers and plain pixels; slices that are compressed (JPEG, JPEG 2000, JPEG-LS) are unpacked by
SimpleITK. Both are imported on first use, so that names can be told apart without them. Slices lie along the normal
of their plane, in equal steps, or the series is refused: nothing is interpolated. The notes of an image name what
was left out (scouts, secondary captures, objects without pixels) and which tags an anonymised export lacks.

Source: DICOM PS3.3, C.7.6.2 (image plane: position, orientation, spacing) and C.11.1 (rescale slope, intercept).
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config.errors import InputError
from data.imaging import volume
from data.imaging.volume import ImageHeader, StoredImage, affine_from_lps, check_affine, refusing

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MAX_FILES = 20_000
_TAGS = [
    "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality", "ImageType",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "SamplesPerPixel",
    "BitsAllocated", "NumberOfFrames", "RescaleSlope", "RescaleIntercept",
]  # fmt: skip
_STEP_TOLERANCE = 0.05  # of the distance between slices
_UNCOMPRESSED = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"}
_RLE = "1.2.840.10008.1.2.5"

logging.getLogger("pydicom").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Slice:
    """One file. ``position`` and ``axes`` (along a row, along a column) are LPS+: mm, and unit vectors (2, 3).

    ``spacing``: between rows, between columns, in mm; ``shape``: rows, columns; ``packed``: pydicom cannot unpack it.
    """

    path: Path
    position: np.ndarray
    axes: np.ndarray
    spacing: np.ndarray
    shape: tuple[int, int]
    slope: float
    intercept: float
    packed: bool


@dataclass(frozen=True)
class Series:
    """The files of one series. ``problem``: why it is no CT volume, or empty."""

    number: str
    description: str
    files: tuple[Path, ...]
    headers: tuple[Dataset, ...]
    problem: str

    def __str__(self) -> str:
        name = f"'{self.description}' " if self.description else ""
        return f"{self.number or '?'} {name}({len(self.files)} images, first {self.files[0].name})"


def is_dicom(path: Path) -> bool:
    """By name, or by the mark that stands 128 bytes into every DICOM file."""
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def files_below(folder: Path) -> list[Path]:
    """All files below ``folder``, in the order of their names. Raises InputError for more than 20,000."""
    files: list[Path] = []
    for file in folder.rglob("*"):
        if file.is_file():
            files.append(file)
        if len(files) > _MAX_FILES:
            raise InputError(f"{folder}: holds more than {_MAX_FILES} files; name the folder of one series")
    return sorted(files)


def series_in(folder: Path) -> list[Series]:
    """Every series below ``folder``, by number; files that name no series count as one.

    Raises InputError if there is no DICOM file, or if one that says it is DICOM cannot be read.
    """
    grouped: dict[str, list[tuple[Path, Dataset]]] = defaultdict(list)
    for file in files_below(folder):
        if is_dicom(file):
            header = _header(file)
            if not _is_directory(header):
                grouped[_text(header, "SeriesInstanceUID")].append((file, header))
    if not grouped:
        raise InputError(f"{folder}: folder holds no DICOM file; name a .nii.gz file or the folder of a CT series")
    found = []
    for _, members in sorted(grouped.items()):
        files, headers = zip(*members, strict=True)
        number, description = (_text(headers[0], tag) for tag in ("SeriesNumber", "SeriesDescription"))
        found.append(Series(number, description, files, headers, _why_no_volume(headers)))
    return sorted(found, key=lambda series: (len(series.number), series.number))


def choose_series(path: Path) -> tuple[Series, list[str]]:
    """The one CT series below a folder, or the series of the file named; and notes on what is doubtful.

    Raises InputError, listing the series, where there is none or more than one.
    """
    every = series_in(path if path.is_dir() else path.parent)
    if not path.is_dir():
        every = [series for series in every if path in series.files]
    volumes = [series for series in every if not series.problem]
    if len(volumes) > 1:
        listed = "; ".join(map(str, volumes))
        raise InputError(f"{path}: holds {len(volumes)} CT series, name one file of the right one: {listed}")
    if not volumes:
        listed = "; ".join(f"{series}: {series.problem}" for series in every[:5])
        raise InputError(f"{path}: holds no CT volume: {listed}")
    [series] = volumes
    notes = [f"left out series {other}: {other.problem}" for other in every if other.problem]
    lacking = [tag for tag in ("SeriesInstanceUID", "Modality") if not _text(series.headers[0], tag)]
    if lacking:
        notes.append(f"series {series} has no {' and no '.join(lacking)} (anonymised?); its slices form one CT volume")
    return series, notes


def read_header(path: Path) -> ImageHeader:
    """The checked geometry of the series at ``path`` (a folder, or one of its files).

    Raises InputError for what cannot be one volume in HU: several series, missing or doubled slices, uneven
    steps, a tilted gantry, colours, several frames, no rescaling.
    """
    return _read_geometry(path)[0]


def read_stored(path: Path) -> StoredImage:
    """Header and voxels (column, row, slice), float32 HU."""
    header, slices = _read_geometry(path)
    voxels = np.empty(header.shape[::-1], dtype=np.float32)
    for index, piece in enumerate(slices):
        voxels[index] = _pixels(piece)
    return StoredImage(header, voxels.transpose(2, 1, 0))


def _header(path: Path) -> Dataset:
    import pydicom

    with refusing(path, "not a readable DICOM file", "copy it again", pydicom.errors.InvalidDicomError):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=False)
        for tag in _TAGS:  # values are parsed on first use: here, where an error can name the file
            header.get(tag)
        if not (_is_directory(header) or header.get("SeriesInstanceUID") or "Rows" in header):
            raise ValueError("it names no series")
    return header


def _is_directory(header: Dataset) -> bool:
    return header.file_meta.get("MediaStorageSOPClassUID") == "1.2.840.10008.1.3.10"


def _why_no_volume(headers: Sequence[Dataset]) -> str:
    first = headers[0]
    kinds = [str(kind).upper() for kind in np.atleast_1d(first.get("ImageType") or [])]
    modality = _text(first, "Modality")
    stored_as = getattr(first.file_meta.get("MediaStorageSOPClassUID"), "name", "")  # such as "MR Image Storage"
    if not any("Rows" in header for header in headers):
        return "no pixels"
    if "LOCALIZER" in kinds:
        return "a scout"
    if modality not in ("CT", "") or (not modality and "Image Storage" in stored_as and "CT" not in stored_as.split()):
        return f"modality {modality or f'not given, stored as {stored_as}'}, expected CT"
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
        if not same or not np.allclose(other.axes, first.axes, atol=1e-3):
            raise InputError(
                f"{other.path}: size, spacing or direction differ from {first.path.name} of the same series; "
                "keep the slices of one volume"
            )
    normal = np.cross(*first.axes)
    slices.sort(key=lambda piece: float(piece.position @ normal))
    step = _step(path, slices, normal)
    in_plane = (first.axes * first.spacing[::-1, None]).T
    drift = (slices[-1].position - slices[0].position) / (len(slices) - 1)
    check_affine(path, affine_from_lps(np.column_stack([in_plane, drift]), slices[0].position))  # a tilted gantry
    affine = affine_from_lps(np.column_stack([in_plane, normal * step]), slices[0].position)
    rows, columns = first.shape
    shape = (columns, rows, len(slices))
    if columns * rows * len(slices) > volume.MAX_VOXELS:
        raise InputError(f"{path}: headers announce {shape} voxels, more than a CT has; they are damaged")
    return ImageHeader(path, shape, np.dtype(np.float32), affine, check_affine(path, affine), tuple(notes)), slices


def _slice(path: Path, header: Dataset) -> Slice:
    with refusing(path, "its header is damaged", "copy it again"):
        position = _numbers(path, header, "ImagePositionPatient", 3)
        axes = _numbers(path, header, "ImageOrientationPatient", 6).reshape(2, 3)
        spacing = _numbers(path, header, "PixelSpacing", 2)
        [slope], [intercept] = (_numbers(path, header, f"Rescale{name}", 1) for name in ("Slope", "Intercept"))
        rows, columns = (int(_numbers(path, header, tag, 1)[0]) for tag in ("Rows", "Columns"))
        bits = int(header.get("BitsAllocated") or 16)
        syntax = str(header.file_meta.TransferSyntaxUID)
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: image orientation {axes.ravel().tolist()} is no pair of axes, header is damaged")
    if slope == 0:
        raise InputError(f"{path}: rescale slope is 0, so every voxel is one value; export the original CT series")
    packed = syntax not in _UNCOMPRESSED
    held = path.stat().st_size * (volume.MAX_DEFLATE_RATIO if packed or syntax.endswith(".99") else 1)
    if min(rows, columns) < 1 or rows * columns * max(bits // 8, 1) > held:
        raise InputError(
            f"{path}: header announces {rows} x {columns} pixels, more than a file of {path.stat().st_size} bytes "
            "holds; it is truncated or its header is damaged"
        )
    return Slice(path, position, axes, spacing, (rows, columns), slope, intercept, packed and syntax != _RLE)


def _numbers(path: Path, header: Dataset, tag: str, count: int) -> np.ndarray:
    value = header.get(tag)
    if value in (None, ""):
        raise InputError(f"{path}: has no {tag}, so it gives no HU; export the original CT series")
    numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{tag} is {value!r}, expected {count} numbers")
    return numbers


def _step(path: Path, slices: list[Slice], normal: np.ndarray) -> float:
    """Distance between neighbouring slices in mm. Raises InputError where it is not one distance."""
    along = np.array([piece.position for piece in slices]) @ normal
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
    return float(along[-1] - along[0]) / (len(slices) - 1)


def _pixels(piece: Slice) -> np.ndarray:
    """(row, column) float32 HU. SimpleITK applies slope and intercept itself."""
    import pydicom
    import SimpleITK

    with refusing(piece.path, "pixels cannot be read", "copy it again"):
        if piece.packed:
            image = SimpleITK.ReadImage(piece.path, SimpleITK.sitkFloat32, "GDCMImageIO")
            pixels = SimpleITK.GetArrayFromImage(image)[0]
        else:
            pixels = pydicom.dcmread(piece.path).pixel_array.astype(np.float32)
            pixels = pixels * np.float32(piece.slope) + np.float32(piece.intercept)
    if pixels.shape != piece.shape:
        raise InputError(f"{piece.path}: pixels are {pixels.shape}, the header says {piece.shape}; copy it again")
    return pixels


def _text(header: Dataset, tag: str) -> str:
    value = header.get(tag)
    return "" if value is None else str(value).strip()
