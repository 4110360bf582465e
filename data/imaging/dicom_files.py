"""Which files are DICOM, and which lie below a folder: what can be said without parsing one."""

from __future__ import annotations

from pathlib import Path

from config.errors import InputError

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_MAX_FILES = 20_000


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
