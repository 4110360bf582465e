"""DICOM CT series: the slices of one series in a folder, sorted by position, as one image in HU.

pydicom reads headers and plain pixels, SimpleITK unpacks compressed slices (JPEG, JPEG 2000, JPEG-LS); both are
imported on first use. Slices must lie along the normal of their plane in equal steps; nothing is interpolated. The
notes of an image name what was left out (scouts, secondary captures, objects without pixels) and which tags are absent.

Source: DICOM PS3.3, C.7.6.2 (image plane: position, orientation, spacing) and C.11.1 (rescale slope, intercept).
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from config.errors import InputError
from data.imaging import volume
from data.imaging.volume import ImageHeader, StoredImage, affine_from_lps, check_affine, check_shape, refusing

if TYPE_CHECKING:
    from pydicom import Dataset

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MAX_FILES = 20_000
_GEOMETRY = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}  # and how many numbers
_GEOMETRY |= dict.fromkeys(("Rows", "Columns", "RescaleSlope", "RescaleIntercept"), 1)
_TAGS = ["SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "Modality", "ImageType", "SamplesPerPixel"]
_TAGS += ["BitsAllocated", "NumberOfFrames", *_GEOMETRY]
# Objects beside a scan that are no images of their own.
_NO_IMAGES = ("SEG", "SR", "PR", "KO", "REG", "DOC", "RTSTRUCT", "RTPLAN", "RTDOSE")
_STEP_TOLERANCE = 0.05  # of the distance between slices
_PLAIN_SYNTAXES = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_READ_BY_PYDICOM = (*_PLAIN_SYNTAXES, "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5")  # deflated, run lengths

logging.getLogger("pydicom").setLevel(logging.ERROR)


@dataclass(frozen=True)
class Series:
    """The files of one series and their headers."""

    files: tuple[Path, ...]
    headers: tuple[Dataset, ...]

    def __str__(self) -> str:
        number, description = (_text(self.headers[0], tag) for tag in ("SeriesNumber", "SeriesDescription"))
        name = f"'{description}' " if description else ""
        return f"{number or '?'} {name}({len(self.files)} images, first {self.files[0].name})"

    @property
    def label(self) -> str:
        """Its number and a digest of its UID, as the name of a file: ``series2_1f0a``."""
        number = "".join(filter(str.isalnum, _text(self.headers[0], "SeriesNumber")))
        uid = blake2b(_text(self.headers[0], "SeriesInstanceUID").encode(), digest_size=4).hexdigest()
        return f"series{number}_{uid}"

    @property
    def problem(self) -> str:
        """Why the series is no CT volume, or empty."""
        first = self.headers[0]
        modality = _text(first, "Modality")
        stored_as = getattr(first.file_meta.get("MediaStorageSOPClassUID"), "name", "")  # such as "MR Image Storage"
        if not any("Rows" in header for header in self.headers):
            return "no pixels"
        if _is_scout(first):
            return "a scout"
        if modality not in ("CT", ""):
            return f"modality {modality}, expected CT"
        if not modality and "Image Storage" in stored_as and "CT" not in stored_as.split():
            return f"modality not given, stored as {stored_as}, expected CT"
        if int(first.get("SamplesPerPixel") or 1) != 1:
            return "colours, expected HU"
        if _text(first, "NumberOfFrames") not in ("", "1"):
            return "several frames in one file; convert it with dcm2niix"
        if "ImagePositionPatient" not in first or "ImageOrientationPatient" not in first:
            return "no position in the patient (a secondary capture)"
        return ""

    @property
    def may_be_a_scan(self) -> bool:
        """Whether, for all its :attr:`problem`, somebody may miss it: of another modality, or several frames a file."""
        problem = self.problem.startswith(("modality", "several frames"))
        return problem and _text(self.headers[0], "Modality") not in _NO_IMAGES


def is_dicom(path: Path) -> bool:
    """By name, or by the mark that stands 128 bytes into every DICOM file."""
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:  # locked by another program, such as Excel's "~$cases.xlsx"
        return False


def files_below(folder: Path, *, deep: bool = True) -> list[Path]:
    """All files below ``folder``, or in it alone, in the order of their names. Raises InputError for more than
    20,000."""
    files = list(islice((file for file in folder.glob("**/*" if deep else "*") if file.is_file()), _MAX_FILES + 1))
    if len(files) > _MAX_FILES:
        raise InputError(f"{folder}: holds more than {_MAX_FILES} files; name the folder of one series")
    return sorted(files)


def series_in(folder: Path, *, deep: bool = True) -> list[Series]:
    """Every series below ``folder``, or in it alone, by number; files that name no series count as one. A scout is a
    series of its own, whatever it is filed under.

    Raises InputError if there is no DICOM file, or one that cannot be read.
    """
    files = [(file, file.stat()) for file in files_below(folder, deep=deep) if is_dicom(file)]
    found = list(_grouped(tuple((file, stat.st_size, stat.st_mtime_ns) for file, stat in files)))
    if not found:
        raise InputError(f"{folder}: folder holds no DICOM file; name a .nii.gz file or the folder of a CT series")
    return sorted(found, key=lambda series: (len(number := _text(series.headers[0], "SeriesNumber")), number))


@lru_cache(maxsize=4)  # of a folder with many series every header would be read again for each
def _grouped(files: tuple[tuple[Path, int, int], ...]) -> tuple[Series, ...]:
    """The series of files, each with its size and time of change."""
    grouped: dict[tuple[str, bool], list[tuple[Path, Dataset]]] = defaultdict(list)
    for file, _, _ in files:
        if (header := _header(file)) is not None:
            grouped[_text(header, "SeriesInstanceUID"), _is_scout(header)].append((file, header))
    return tuple(Series(*zip(*members, strict=True)) for _, members in sorted(grouped.items()))


def files_of(path: Path) -> list[Path]:
    """The files of the series below a folder, or that the file named belongs to; no other series decides the image."""
    if path.is_dir():
        return files_below(path)
    return next(list(series.files) for series in series_in(path.parent, deep=False) if path in series.files)


def choose_series(path: Path) -> tuple[Series, list[str]]:
    """The CT series below a folder, or of the file named, and notes. Raises InputError where it is not exactly one."""
    every = series_in(path) if path.is_dir() else series_in(path.parent, deep=False)
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


def slices_of(path: Path) -> list[Path]:
    """The files of the series at ``path`` in the order of its third axis. Raises InputError as :func:`read_header`."""
    return [file for file, _, _ in _read_geometry(path)[1]]


def read_stored(path: Path) -> StoredImage:
    """Header and voxels (column, row, slice), float32 HU."""
    header, slices = _read_geometry(path)
    voxels = np.empty(header.shape[::-1], dtype=np.float32)
    for plane, piece in zip(voxels, slices, strict=True):
        plane[:] = _pixels(*piece, plane.shape)
    return StoredImage(header, voxels.transpose(2, 1, 0))


def _header(path: Path) -> Dataset | None:
    """The tags that decide what a file is; None for a DICOMDIR."""
    import pydicom

    with refusing(path, "not a readable DICOM file", "copy it again", pydicom.errors.InvalidDicomError):
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=False)
        for tag in _TAGS:  # values are parsed on first use: here, where an error can name the file
            header.get(tag)
        if header.file_meta.get("MediaStorageSOPClassUID") == "1.2.840.10008.1.3.10":
            return None
        if not header.get("SeriesInstanceUID") and "Rows" not in header:
            raise ValueError("it names no series")
    return header


def _read_geometry(path: Path) -> tuple[ImageHeader, list[tuple[Path, float, float]]]:
    """The header of the volume, and each slice's file, slope and intercept, by position."""
    series, notes = choose_series(path)
    if len(series.files) < 2:
        raise InputError(f"{path}: series {series} is a single image, expected a volume")
    tags = np.array([_geometry_tags(*pair) for pair in zip(series.files, series.headers, strict=True)])
    position, axes, spacing, size, rescale = np.split(tags, [3, 9, 11, 13], axis=1)
    same = np.isclose(spacing, spacing[0], rtol=1e-3).all(1) & np.isclose(axes, axes[0], atol=1e-3).all(1)
    same &= (size == size[0]).all(1)
    if not same.all():
        other = f"{series.files[0].name} of the same series; keep the slices of one volume"
        raise InputError(f"{series.files[same.argmin()]}: size, spacing or direction differ from {other}")
    in_plane = axes[0].reshape(2, 3)
    normal = np.cross(*in_plane)
    order = np.argsort(position @ normal, kind="stable")
    files, position = [series.files[index] for index in order], position[order]
    step = _step(path, files, position @ normal)
    columns_rows = (in_plane * spacing[0, ::-1, None]).T
    drift = (position[-1] - position[0]) / (len(files) - 1)
    check_affine(path, affine_from_lps(np.column_stack([columns_rows, drift]), position[0]))  # a tilted gantry
    affine = affine_from_lps(np.column_stack([columns_rows, normal * step]), position[0])
    shape = (int(size[0, 1]), int(size[0, 0]), len(files))
    if math.prod(shape) > volume.MAX_VOXELS:
        raise InputError(f"{path}: headers announce {shape} voxels, more than a CT has; they are damaged")
    slices = [(file, *numbers) for file, numbers in zip(files, rescale[order], strict=True)]
    return ImageHeader(path, shape, np.dtype(np.float32), affine, check_affine(path, affine), tuple(notes)), slices


def _geometry_tags(path: Path, header: Dataset) -> np.ndarray:
    """(15,) position, direction of rows and columns (LPS+), spacing, rows and columns, slope and intercept, checked."""
    with refusing(path, "its header is damaged", "copy it again"):
        tags = np.concatenate([_numbers(path, header, tag, count) for tag, count in _GEOMETRY.items()])
        bits = int(header.get("BitsAllocated") or 16)
        packed = str(header.file_meta.TransferSyntaxUID) not in _PLAIN_SYNTAXES
    axes, slope = tags[3:9].reshape(2, 3), tags[13]
    if not np.allclose(axes @ axes.T, np.eye(2), atol=1e-2):
        raise InputError(f"{path}: image orientation {axes.ravel().tolist()} is no pair of axes, header is damaged")
    if slope == 0:
        raise InputError(f"{path}: rescale slope is 0, so every voxel is one value; export the original CT series")
    held = path.stat().st_size * (volume.MAX_DEFLATE_RATIO if packed else 1)
    check_shape(path, (*tags[11:13].astype(int).tolist(), 1), np.dtype(np.uint8), held // max(bits // 8, 1))
    return tags


def _numbers(path: Path, header: Dataset, tag: str, count: int) -> np.ndarray:
    value = header.get(tag)
    if value in (None, ""):
        raise InputError(f"{path}: has no {tag}, so it gives no HU; export the original CT series")
    numbers = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if numbers.shape != (count,) or not np.isfinite(numbers).all():
        raise ValueError(f"{tag} is {value!r}, expected {count} numbers")
    return numbers


def _step(path: Path, files: list[Path], along: np.ndarray) -> float:
    """Distance between slices that lie ``along`` the normal, in mm. Raises InputError where it is not one distance."""
    steps = np.diff(along)
    least, most = steps.min(), steps.max()
    if least < 1e-3:
        first = steps.argmin()
        place = f"{along[first]:.2f} mm ({files[first].name}, {files[first + 1].name})"
        raise InputError(f"{path}: two slices lie at {place}; keep one reconstruction and one phase")
    if most - least > _STEP_TOLERANCE * least:
        problem = f"slices are {least:.2f} to {most:.2f} mm apart, expected one distance; resample the series"
        multiples = np.rint(steps / least)
        if np.abs(steps / least - multiples).max() < 2 * _STEP_TOLERANCE:
            gap = "between {:.2f} and {:.2f} mm (others are {:.2f})".format(*along[steps.argmax() :][:2], least)
            problem = f"{multiples.sum() - len(steps):.0f} slice(s) are missing, for example {gap}; export it again"
        raise InputError(f"{path}: {problem}")
    return float(along[-1] - along[0]) / (len(files) - 1)


def _pixels(path: Path, slope: float, intercept: float, shape: tuple[int, int]) -> np.ndarray:
    """(row, column) float32 HU of ``shape``. SimpleITK applies slope and intercept itself."""
    import pydicom
    import SimpleITK

    with refusing(path, "pixels cannot be read", "copy it again"):
        data = pydicom.dcmread(path)
        if data.file_meta.TransferSyntaxUID in _READ_BY_PYDICOM:
            pixels = data.pixel_array.astype(np.float32) * np.float32(slope) + np.float32(intercept)
        else:
            image = SimpleITK.ReadImage(path, SimpleITK.sitkFloat32, "GDCMImageIO")
            pixels = SimpleITK.GetArrayFromImage(image)[0]
    if pixels.shape != shape:
        raise InputError(f"{path}: pixels are {pixels.shape}, the header says {shape}; copy it again")
    return pixels


def _is_scout(header: Dataset) -> bool:
    return "LOCALIZER" in [str(kind).upper() for kind in np.atleast_1d(header.get("ImageType") or [])]


def _text(header: Dataset, tag: str) -> str:
    return "" if (value := header.get(tag)) is None else str(value).strip()
