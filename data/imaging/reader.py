"""Any image that the system takes, by one call: NIfTI, DICOM (folder or one of its files), .mha, .mhd + .raw, .nrrd."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from config.errors import InputError
from data.imaging import dicom, itk_image, nifti
from data.imaging.volume import ImageHeader, Volume, as_stored, to_mask, to_volume

SUFFIXES = (*nifti.SUFFIXES, *itk_image.SUFFIXES, *dicom.DICOM_SUFFIXES)


def read_volume(path: Path | str, orientation: str = "LPS") -> Volume:
    """A CT volume in HU, turned into ``orientation``, or in the file's own axis order for "file".

    What its header leaves in doubt is logged. Raises InputError for whatever cannot be trusted.
    """
    return to_volume(_format_of(path).read_stored(Path(path)), orientation)


def read_mask(path: Path | str, like: Volume) -> np.ndarray:
    """A label volume (z, y, x) on the grid of ``like``. Raises InputError as ``volume.to_mask`` does."""
    return to_mask(_format_of(path).read_stored(Path(path)), like)


def read_header(path: Path | str) -> ImageHeader:
    """What the file says of itself, checked, without reading voxels. Raises InputError as :func:`read_volume`."""
    return _format_of(path).read_header(Path(path))


def name_of(path: Path) -> str:
    """The name of an image file without the ending of its format; of a folder, its whole name."""
    ending = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), "")
    return path.name[: len(path.name) - len(ending)]


def files_of(path: Path) -> list[Path]:
    """Every file whose content decides the image, in a fixed order."""
    if path.is_dir():
        return dicom.files_of(path)
    for module in (nifti, itk_image):
        if path.name.lower().endswith(module.SUFFIXES):
            return module.files_of(path)
    if path.is_file() and dicom.is_dicom(path):
        return dicom.files_of(path)
    return [path]


@dataclass(frozen=True)
class FoundScan:
    """A scan in a folder of scans. ``path``: for :func:`read_volume`, of a DICOM series one of its files; ``name``:
    unlike that of any other, a relative path with forward slashes; ``problem``: why it cannot be read, or empty."""

    path: Path
    name: str
    problem: str = ""


def scans_below(root: Path, without: Path | None = None) -> list[FoundScan]:
    """Every scan below ``root``, by name: files of the formats above, and each CT series of DICOM files.

    Hidden files and what lies below ``without`` are left out, and so are DICOM objects that are no volume (scouts,
    secondary captures, reports). A folder whose DICOM files make no series is one scan with a problem, and so is a
    series of several frames a file, or of another modality where there is no CT beside it.
    """
    found = []
    for here, folders, files in os.walk(root):
        folder = Path(here)
        folders[:] = [name for name in folders if not name.startswith(".") and folder / name != without]
        slices, present = False, {name.lower() for name in files}
        for file in (folder / name for name in files if not name.startswith(".")):
            lower = file.name.lower()
            if lower.replace(".img", ".hdr") in present - {lower}:
                continue  # the voxels of that header
            if lower.endswith((*nifti.SUFFIXES, *itk_image.SUFFIXES)):
                found.append(FoundScan(file, file.relative_to(root).as_posix()))
            elif file.is_file() and file.stat().st_size:
                slices = slices or dicom.is_dicom(file)
        found += _series_of(folder, root) if slices else []
    return sorted(found, key=lambda scan: scan.name)


def _series_of(folder: Path, root: Path) -> list[FoundScan]:
    """The CT series of a folder, without those of its subfolders."""
    name = folder.relative_to(root).as_posix()
    try:
        every = dicom.series_in(folder, deep=False)
    except InputError as error:
        return [FoundScan(folder, name, str(error))]
    volumes = [series for series in every if not series.problem]
    missed = [s for s in every if s.may_be_a_scan and not (volumes and s.problem.startswith("modality"))]
    return [
        FoundScan(series.files[0], f"{name}/{series.label}".removeprefix("./"), series.problem)
        for series in [*volumes, *missed]
    ]


def _format_of(path: Path | str) -> ModuleType:
    """The module that reads ``path``. A name of another format counts before DICOM's mark in the file."""
    path = Path(path)
    if path.name.lower().endswith(itk_image.SUFFIXES):
        return itk_image
    if path.name.lower().endswith(nifti.SUFFIXES) and not path.is_dir() or not path.exists():
        return nifti
    if path.is_dir() or dicom.is_dicom(path):
        return dicom
    raise InputError(
        f"{path}: expected .nii.gz, .nii, .hdr + .img, .mha, .mhd + .raw, .nrrd, or the folder of a DICOM series; "
        "of a .raw file name the .mhd; pictures and text are no CT"
    )


def write_on_grid(path: Path, array: np.ndarray, image: Path, axcodes: str = "LPS") -> None:
    """Write (z, y, x), whose axes run to ``axcodes``, as NIfTI on the grid of the file ``image``.

    Shape, axes and affine are those that the file has, so that viewers lay one over the other.
    """
    header = read_header(image)
    nifti.write_volume(path, as_stored(array, header, axcodes), tuple(header.zooms[::-1]), header.affine)
