"""Any image that the system takes, by one call: NIfTI, a DICOM series (folder or one of its files), .mha, .nrrd."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np

from config.errors import InputError
from data.imaging import nifti
from data.imaging.dicom_files import DICOM_SUFFIXES, files_below, is_dicom
from data.imaging.volume import ImageHeader, Volume, to_mask, to_volume

ITK_SUFFIXES = (".mha", ".nrrd")
SUFFIXES = (*nifti.SUFFIXES, *ITK_SUFFIXES, *DICOM_SUFFIXES)


def read_volume(path: Path | str, orientation: str = "LPS") -> Volume:
    """A CT volume in HU, turned into canonical ``orientation``; what its header leaves in doubt is logged.

    Raises InputError, in one line with the remedy, for whatever cannot be trusted.
    """
    path = Path(path)
    return to_volume(_format_of(path).read_stored(path), orientation)


def read_mask(path: Path | str, like: Volume) -> np.ndarray:
    """A label volume (z, y, x) on the grid of ``like``. Raises InputError as ``volume.to_mask`` does."""
    path = Path(path)
    return to_mask(_format_of(path).read_stored(path), like)


def read_header(path: Path | str) -> ImageHeader:
    """What the file says of itself, checked, without reading voxels. Raises InputError as :func:`read_volume`."""
    path = Path(path)
    return _format_of(path).read_header(path)


def files_of(path: Path) -> list[Path]:
    """Every file whose content decides the image, in a fixed order; the path itself where it does not exist.

    For a series these are all files of the folder, so that nothing need be parsed to notice a change.
    """
    if path.is_dir():
        return files_below(path)
    name = path.name.lower()
    if name.endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        return nifti.files_of(path)
    if path.is_file() and _is_dicom(path):
        return [path, *files_of(path.parent)]
    return [path]


def _format_of(path: Path) -> ModuleType:
    """The module that reads ``path``. DICOM and SimpleITK are imported where they are needed: both take a while."""
    if path.name.lower().endswith(ITK_SUFFIXES):
        from data.imaging import itk_image

        return itk_image
    if path.is_dir() or (path.is_file() and _is_dicom(path)):
        from data.imaging import dicom

        return dicom
    if path.is_file() and not path.name.lower().endswith(SUFFIXES):
        raise InputError(
            f"{path}: expected .nii.gz, .nii, .hdr + .img, .mha, .nrrd, or the folder of a DICOM series; "
            "pictures and text are no CT"
        )
    return nifti


def _is_dicom(path: Path) -> bool:
    """A name that says another format is believed, so that a broken .nii.gz is told as one."""
    return not path.name.lower().endswith((*nifti.SUFFIXES, *ITK_SUFFIXES)) and is_dicom(path)
