"""MetaImage (``.mha``) and NRRD (``.nrrd``), read by SimpleITK.

Both formats begin with a header of text. It is read here first, so that a header which promises more than the
file holds is refused before anything is allocated, and a file that names other files is refused by name.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from config.errors import InputError
from data.imaging.volume import MAX_DEFLATE_RATIO, ImageHeader, StoredImage, check_affine, check_shape, one_line

_MAX_HEADER = 1 << 16
_METAIMAGE_TYPES = {
    "met_char": "i1", "met_uchar": "u1", "met_short": "i2", "met_ushort": "u2", "met_int": "i4", "met_uint": "u4",
    "met_float": "f4", "met_double": "f8", "met_long": "i4", "met_ulong": "u4",
    "met_long_long": "i8", "met_ulong_long": "u8",
}  # fmt: skip
_NRRD_TYPES = {
    name: code
    for code, names in {
        "i1": "signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for name in names.split(", ")
}


def read_header(path: Path) -> ImageHeader:
    """The checked header. Raises InputError if the file is missing, empty, damaged, or no scalar 3D image."""
    shape, dtype = _announced(path)
    reader = _reader(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(f"{path}: not a readable image ({_reason(error)}); copy it again") from error
    if reader.GetSize() != shape or reader.GetNumberOfComponents() != 1:
        raise InputError(f"{path}: header says {shape} voxels, read {reader.GetSize()}; the header is damaged")
    zooms = np.array(reader.GetSpacing(), dtype=np.float64)
    lps = np.eye(4)
    lps[:3, :3] = np.array(reader.GetDirection(), dtype=np.float64).reshape(3, 3) * zooms
    lps[:3, 3] = reader.GetOrigin()
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps
    check_affine(path, affine)
    notes = () if _says_direction(path) else ("header gives no direction; voxels are taken as stored in LPS order",)
    return ImageHeader(path, shape, dtype, affine, zooms, notes)


def read_stored(path: Path) -> StoredImage:
    """Header and voxels (i, j, k)."""
    import SimpleITK

    header = read_header(path)
    try:
        array = SimpleITK.GetArrayFromImage(_reader(path).Execute())
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"{path}: image data cannot be read ({_reason(error)}); the file is truncated or damaged, copy it again"
        ) from error
    return StoredImage(header, array.transpose(2, 1, 0))


def _reader(path: Path):  # noqa: ANN202  (SimpleITK is imported where it is needed: it takes a while)
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    reader = SimpleITK.ImageFileReader()
    reader.SetImageIO("MetaImageIO" if path.name.lower().endswith(".mha") else "NrrdImageIO")
    reader.SetFileName(str(path))
    return reader


def _announced(path: Path) -> tuple[tuple[int, int, int], np.dtype]:
    """Shape (i, j, k) and type that the text header promises, after checking that the file can hold them."""
    if not path.is_file():
        raise InputError(f"{path}: file not found")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: file is empty (0 bytes), copy it again")
    fields, start = _fields(path)
    is_mha = path.name.lower().endswith(".mha")
    size_key, type_key, types = (
        ("dimsize", "elementtype", _METAIMAGE_TYPES) if is_mha else ("sizes", "type", _NRRD_TYPES)
    )
    if is_mha and fields.get("elementdatafile", "").upper() != "LOCAL":
        raise InputError(f"{path}: its voxels lie in another file; save image and header as one .mha")
    if not is_mha and ("data file" in fields or "datafile" in fields):
        raise InputError(f"{path}: its voxels lie in another file; save image and header as one .nrrd")
    try:
        shape = tuple(int(length) for length in fields[size_key].split())
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a readable image (no '{size_key}' in its header); copy it again") from error
    if is_mha and fields.get("elementnumberofchannels", "1").strip() != "1":
        raise InputError(f"{path}: voxels are colours or vectors, expected one HU value each; export the CT itself")
    code = types.get(fields.get(type_key, "").strip().lower())
    if code is None:
        raise InputError(f"{path}: voxels are of type '{fields.get(type_key, '')}', expected integers or floats in HU")
    packed = (
        fields.get("compresseddata", "").strip().lower() == "true"
        if is_mha
        else fields.get("encoding", "raw").strip().lower() not in ("raw", "txt", "text", "ascii", "hex")
    )
    held = (path.stat().st_size - start) * (MAX_DEFLATE_RATIO if packed else 1)
    if len(shape) != 3:
        raise InputError(f"{path}: image has shape {shape}, expected three axes; extract one 3D volume")
    check_shape(path, shape, np.dtype(code), held)
    if math.prod(shape) < 2:
        raise InputError(f"{path}: image has shape {shape}, expected a volume")
    return shape, np.dtype(code)


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """Keys of the header in lower case, and where the voxels begin."""
    is_mha = path.name.lower().endswith(".mha")
    with path.open("rb") as stream:
        head = stream.read(_MAX_HEADER)
    if not is_mha and not head.startswith(b"NRRD"):
        raise InputError(f"{path}: not a readable image (no NRRD mark); copy it again")
    fields: dict[str, str] = {}
    position = 0
    for line in head.split(b"\n"):
        position += len(line) + 1
        text = line.decode("utf-8", "replace").strip()
        if not is_mha and not text:  # a blank line ends NRRD's header
            return fields, position
        key, mark, value = text.partition("=" if is_mha else ":")
        if mark and not text.startswith("#"):
            fields[key.strip().lower()] = value.strip()
        if is_mha and key.strip().lower() == "elementdatafile":
            return fields, position
    raise InputError(f"{path}: not a readable image (its header has no end); copy it again")


def _says_direction(path: Path) -> bool:
    fields, _ = _fields(path)
    keys = (
        ("transformmatrix", "rotation", "orientation") if path.name.lower().endswith(".mha") else ("space directions",)
    )
    return any(key in fields for key in keys)


def _reason(error: BaseException) -> str:
    """SimpleITK's messages run over many lines; the last one says what happened."""
    return one_line(error).split("ITK ERROR:")[-1].split("Error:")[-1].strip()[:200]
