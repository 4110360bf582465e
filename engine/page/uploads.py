"""What a browser sends, made into a scan for the reader.

No name that a client or an archive gives is ever opened: files are stored under numbers, and of a name only a known
suffix is kept. A zip is unpacked member by member, and never past its limits. Errors name a file as the user knows it.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import AsyncIterable
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import InputError
from data.imaging.volume import refusing

MOST_FILES = 5000
MOST_ZIP_RATIO = 100  # unpacked to packed; a CT has 2 to 4, a phantom with much air 20
MOST_VOXELS = 400_000_000  # 512 x 512 x 1500
LEAST_FREE = 2 << 30  # bytes of the disk that uploads leave alone
NAME_LENGTH = 120
VOLUMES = (".nii.gz", ".nii", ".mha", ".nrrd")
ZIP = ".zip"
_CHUNK = 1 << 20
EXPECTED = "expected a chest CT as .nii.gz, .nii, .mha, .nrrd, a DICOM series, or a zip of one"


class TooLarge(InputError):
    """An upload beyond a limit."""


@dataclass
class Upload:
    """Files of one scan in ``folder``, as they come. ``names``: what the user calls each stored file."""

    folder: Path
    most_bytes: int
    names: dict[str, str] = field(default_factory=dict)
    bytes: int = 0
    _begun: int = 0

    async def receive(self, name: str, announced: int | None, chunks: AsyncIterable[bytes]) -> None:
        """Store one file. Raises TooLarge, and keeps nothing of it then."""
        if len(self.names) >= MOST_FILES:
            raise TooLarge(f"more than {MOST_FILES} files: send one series, or a zip of it")
        self._check(announced or 0)
        stored = self.folder / f"{self._begun:06d}{_suffix(name)}"
        self._begun += 1
        self.names[stored.name] = shown_name(name)
        received = 0
        try:
            with stored.open("xb") as stream:
                async for chunk in chunks:
                    self._check(len(chunk))
                    stream.write(chunk)
                    received += len(chunk)
                    self.bytes += len(chunk)  # of all files that come at this time
        except BaseException:  # also a lost connection
            stored.unlink(missing_ok=True)
            self.names.pop(stored.name)
            self.bytes -= received
            raise

    def _check(self, more: int) -> None:
        if self.bytes + more > self.most_bytes:
            raise TooLarge(
                f"more than {self.most_bytes >> 20} MB: crop the scan to the chest, or raise --max_upload_mb"
            )
        if shutil.disk_usage(self.folder).free - more < LEAST_FREE:
            raise TooLarge("the disk of temporary files is nearly full: make room on it")


def shown_name(name: str) -> str:
    """The last part of a client's name, printable and short."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return "".join(c if c.isprintable() else "?" for c in last)[:NAME_LENGTH] or "unnamed"


def _suffix(name: str) -> str:
    """Of the known suffixes, the one that a name has; ``.dcm`` for any other, whose content decides."""
    return next((s for s in (*VOLUMES, ZIP) if name.lower().endswith(s)), ".dcm")


def arrange(folder: Path, names: dict[str, str]) -> Path:
    """The scan among the stored files, ready for :mod:`data.imaging.reader`: a file, or the folder of a DICOM series.

    ``names``: of the files in ``folder``; those of an unpacked zip are added.
    Raises InputError: nothing readable, more than one scan or patient, or a zip beyond its limits.
    """
    stored = sorted(folder / name for name in names)
    if not stored:
        raise InputError(f"nothing came: {EXPECTED}")
    zips = [path for path in stored if path.suffix == ZIP]
    if zips:
        if len(stored) > 1:
            raise InputError(f"{len(stored)} files, a zip among them: send one zip, or the files of one scan")
        stored = _unpack(zips[0], names)
    volumes = [path for path in stored if path.name.endswith(VOLUMES)]
    slices = [path for path in stored if path not in volumes and _is_dicom(path)]
    if len(volumes) > 1 or (volumes and slices):
        first, second = (names[path.name] for path in (*volumes, *slices)[:2])
        raise InputError(f"{len(volumes) + len(slices)} scans in one upload ({first}, {second}): send one at a time")
    if volumes:
        if volumes[0].stat().st_size == 0:
            raise InputError(f"{names[volumes[0].name]}: file is empty (0 bytes), copy it again")
        return volumes[0]
    if not slices:
        raise InputError(f"{names[stored[0].name]}: no CT in it; {EXPECTED}")
    for path in stored:
        if path not in slices:  # a text, a thumbnail
            path.unlink()
    _check_patients(slices)
    return slices[0].parent


def check_size(shape: tuple[int, ...]) -> None:
    """Raises InputError for a scan that would fill the memory."""
    voxels = 1
    for length in shape:
        voxels *= int(length)
    if voxels > MOST_VOXELS:
        words = " x ".join(map(str, shape))
        raise InputError(f"the scan has {words} voxels, the page reads up to {MOST_VOXELS // 10**6} million: crop it")


def in_users_words(line: str, folder: Path, names: dict[str, str], scan: str) -> str:
    """An error's line without paths of this machine: stored files have the names that the user knows."""
    for path in (*sorted(folder.rglob("*"), key=lambda p: -len(str(p))), folder):
        for written in (str(path), path.as_posix()):  # nibabel writes slashes on Windows too
            line = line.replace(written, names.get(path.name, scan))
    for stored, name in names.items():
        line = line.replace(stored, name)
    return " ".join(line.split())


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _check_patients(slices: list[Path]) -> None:
    """Raises InputError for images of several patients. A DICOMDIR lists images and is none."""
    import pydicom
    from pydicom.uid import MediaStorageDirectoryStorage

    tags, patients = ["PatientID", "PatientName"], set()
    for path in slices:
        with refusing(path, "not a readable DICOM file", "copy it again", pydicom.errors.InvalidDicomError):
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=tags)
            if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                continue
            patients.add(tuple(str(header.get(tag, "")) for tag in tags))
    if len(patients) > 1:
        raise InputError(f"images of {len(patients)} patients in one upload: send the series of one")


def _unpack(archive: Path, names: dict[str, str]) -> list[Path]:
    """Members of a zip as numbered files beside it; the zip is removed. Raises InputError beyond a limit."""
    shown = names[archive.name]
    folder = archive.parent / "zip"
    folder.mkdir()
    allowed = MOST_ZIP_RATIO * archive.stat().st_size + (1 << 20)
    found: list[Path] = []
    try:
        with zipfile.ZipFile(archive) as content:
            members = [m for m in content.infolist() if not m.is_dir() and not _is_clutter(m.filename)]
            if len(members) > MOST_FILES:
                raise InputError(f"{shown}: holds {len(members)} files, at most {MOST_FILES} are read")
            if sum(member.file_size for member in members) > allowed:
                raise InputError(f"{shown}: would unpack to more than {MOST_ZIP_RATIO} times its size, as no CT does")
            for member in members:
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{shown}: is encrypted, or packed in an unusual way: send the files unpacked")
                if member.filename.lower().endswith(ZIP):
                    raise InputError(f"{shown}: holds another zip: unpack it and send the files of one scan")
                target = folder / f"{len(found):06d}{_suffix(member.filename)}"
                names[target.name] = shown_name(member.filename)
                with content.open(member) as source, target.open("xb") as stream:
                    while chunk := source.read(_CHUNK):  # the sizes that a zip announces may lie
                        allowed -= len(chunk)
                        if allowed < 0:
                            raise InputError(f"{shown}: unpacks to more than it announces; make the zip again")
                        stream.write(chunk)
                found.append(target)
    except InputError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise InputError(f"{shown}: is no readable zip (truncated or damaged): make it again") from error
    finally:
        archive.unlink(missing_ok=True)
    if not found:
        raise InputError(f"{shown}: the zip is empty: {EXPECTED}")
    return found


def _is_clutter(name: str) -> bool:
    """What systems add to folders and archives."""
    parts = name.replace("\\", "/").split("/")
    return "__MACOSX" in parts or parts[-1].startswith(".") or parts[-1] in ("Thumbs.db", "desktop.ini")
