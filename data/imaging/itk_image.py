"""MetaImage (``.mha``, ``.mhd`` with its ``.raw`` or ``.zraw``) and NRRD (``.nrrd``), read by SimpleITK.

SimpleITK does not give a header's voxel file, its compression and whether it states a direction. These keys are read
here, so that a header that promises more than the file holds is refused before anything is allocated.
"""

from __future__ import annotations

import locale
import math
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from config.errors import InputError
from data.imaging import volume
from data.imaging.nifti import sibling
from data.imaging.volume import ImageHeader, StoredImage, check_shape, refusing

SUFFIXES = (".mha", ".mhd", ".nrrd")
_MAX_HEADER = 1 << 16
_PLAIN = ("raw", "txt", "text", "ascii", "hex")  # NRRD's encodings that do not pack
_METAIMAGE_TYPE = re.compile(r"met_(u?(char|short|int|long|long_long)|float|double)", re.IGNORECASE)
_DIRECTIONS = ("transformmatrix", "rotation", "orientation", "space directions")


def read_header(path: Path) -> ImageHeader:
    """The checked header. Raises InputError if the file is missing, empty, damaged, or no scalar 3D image."""
    return _open(path)[0]


def read_stored(path: Path) -> StoredImage:
    """Header and voxels (i, j, k)."""
    import SimpleITK

    header, reader = _open(path)
    fields, start = _fields(path)
    with refusing(path, "image data cannot be read", "the file is truncated or damaged, copy it again", zlib.error):
        if fields.get("compresseddata", "").lower() == "true":  # SimpleITK gives any voxels for damaged MetaImage data
            voxels = _voxel_file(path, fields)
            needed = math.prod(header.shape) * header.dtype.itemsize
            _check_packed(voxels.read_bytes()[start if voxels == path else 0 :], needed)
        array = SimpleITK.GetArrayFromImage(reader.Execute())
    return StoredImage(header, array.transpose(2, 1, 0))


def _check_packed(packed: bytes, needed: int) -> None:
    """Unpack piece by piece, keeping nothing. Raises zlib.error where the data are damaged, or unpack to more than
    ``needed`` bytes: what would fill the memory."""
    unpacker, length = zlib.decompressobj(47), 0
    while packed and not unpacker.eof:
        length += len(unpacker.decompress(packed, 1 << 24))
        packed = unpacker.unconsumed_tail
        if length > needed:
            raise zlib.error(f"it unpacks to more than the {needed} bytes of its voxels")
    if not unpacker.eof or length < needed:
        raise zlib.error("incomplete or truncated stream")


def files_of(path: Path) -> list[Path]:
    """The file, and for a header alone (``.mhd``) its voxel file too, if it names one that is there."""
    try:
        return list(dict.fromkeys([path, _voxel_file(path, _fields(path)[0])]))
    except InputError:  # the reader raises it
        return [path]


def _open(path: Path) -> tuple[ImageHeader, Any]:
    """The checked header, and SimpleITK's reader of the voxels."""
    import SimpleITK

    fields, start = _fields(path)
    voxels = _voxel_file(path, fields)
    held = voxels.stat().st_size - (start if voxels == path else 0)
    if fields.get("compresseddata", "").lower() == "true" or fields.get("encoding", "raw").lower() not in _PLAIN:
        held *= volume.MAX_DEFLATE_RATIO
    key = "sizes" if path.suffix.lower() == ".nrrd" else "dimsize"
    if not re.fullmatch(r"-?\d+(\s+-?\d+)*", fields.get(key, "")):
        raise InputError(f"{path}: not a readable image (no '{key}' in its header); copy it again")
    shape = tuple(int(length) for length in fields[key].split())
    if len(shape) != 3:
        raise InputError(f"{path}: image has shape {shape}, expected three axes; extract one 3D volume")
    check_shape(voxels, shape, np.dtype(np.uint8), held)  # first: SimpleITK's integers cannot hold every length
    if not _METAIMAGE_TYPE.fullmatch(kind := fields.get("elementtype", "met_char")):
        raise InputError(f"{path}: voxels are of type '{kind}', expected integers or floats in HU")
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    if sys.platform == "win32":  # SimpleITK hands UTF-8 to fopen, which opens nothing Chinese in another code page
        locale.setlocale(locale.LC_CTYPE, ".UTF8")
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if key == "sizes" else "MetaImageIO")
    reader.SetFileName(str(path))
    with refusing(path, "not a readable image", "copy it again"):
        reader.ReadImageInformation()
        pixel = SimpleITK.Image([1] * 3, reader.GetPixelID(), reader.GetNumberOfComponents())
        dtype = SimpleITK.GetArrayViewFromImage(pixel).dtype
    if reader.GetNumberOfComponents() != 1:
        raise InputError(f"{path}: voxels are colours or vectors, expected one HU value each; export the CT itself")
    if reader.GetSize() != shape or math.prod(shape) < 2:
        raise InputError(f"{path}: header says {shape} voxels, read {reader.GetSize()}; the header is damaged")
    check_shape(voxels, shape, dtype, held)
    zooms = np.array(reader.GetSpacing())
    affine = volume.affine_from_lps(np.reshape(reader.GetDirection(), (3, 3)) * zooms, reader.GetOrigin())
    volume.check_affine(path, affine)
    given = any(key in fields for key in _DIRECTIONS)
    notes = () if given else ("header gives no direction; voxels are taken as stored in LPS order",)
    return ImageHeader(path, shape, dtype, affine, zooms, notes), reader


def _voxel_file(path: Path, fields: dict[str, str]) -> Path:
    """The file that holds the voxels: ``path``, or for a ``.mhd`` the one file beside it that it names."""
    if fields.get("encoding", "").lower() in ("bzip2", "bz2"):
        raise InputError(f"{path}: its voxels are packed with bzip2, expected gzip or raw; save it with gzip")
    name = fields.get("data file", fields.get("datafile", fields.get("elementdatafile", "LOCAL")))
    if name.upper() == "LOCAL":
        return path
    if (suffix := path.suffix.lower()) != ".mhd":
        raise InputError(f"{path}: its voxels lie in another file; save image and header as one {suffix}")
    if not name.lower().endswith((".raw", ".zraw")) or Path(name.replace("\\", "/")).name != name:
        raise InputError(f"{path}: names '{name}' as its voxels, expected one .raw or .zraw file beside it")
    voxels = sibling(path, name)
    if not voxels.is_file():
        raise InputError(f"{path}: is half of a pair, and {name} is missing beside it; copy both")
    return voxels


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Keys of the text header in lower case, and the byte where it ends."""
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    with path.open("rb") as stream:
        head = stream.read(_MAX_HEADER)
    if not head:
        raise InputError(f"{path}: file is empty (0 bytes), copy it again")
    is_nrrd = path.suffix.lower() == ".nrrd"
    if is_nrrd and not head.startswith(b"NRRD"):
        raise InputError(f"{path}: not a readable image (no NRRD mark); copy it again")
    fields: dict[str, str] = {}
    position = 0
    for line in head.split(b"\n"):
        position += len(line) + 1
        text = line.decode("utf-8", "replace").strip()
        if is_nrrd and not text:  # a blank line ends NRRD's header
            return fields, position
        key, mark, value = text.partition(":" if is_nrrd else "=")
        if mark and not text.startswith("#"):
            fields[key.strip().lower()] = value.strip()
        if not is_nrrd and key.strip().lower() == "elementdatafile":
            return fields, position
    raise InputError(f"{path}: not a readable image (its header has no end); copy it again")
