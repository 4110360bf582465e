"""Some hundred bad inputs, each with the one line that a user reads: what, where, and how to fix it."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from config.errors import InputError
from data.imaging.reader import read_mask, read_volume
from data.tables.caption_table import read_caption_table, read_prompts
from tests.data.imaging.images import dicom_slice, marked, store_as, write_series

AFFINE = np.diag([-1.5, -2.0, 3.0, 1.0])


def nifti(array: np.ndarray, affine: np.ndarray | None = AFFINE, **fields: object) -> Callable[[Path], None]:
    """Write header and voxels by hand, so that no library corrects the ``fields``."""

    def make(path: Path) -> None:
        image = nib.Nifti1Image(array, affine, dtype=array.dtype)
        header = image.header.copy()
        header["vox_offset"] = 352
        for name, value in fields.items():
            header[name] = value
        content = header.binaryblock + b"\0" * 4 + array.tobytes(order="F")
        path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)

    return make


def raw(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content)


def itk(array: np.ndarray, vector: bool = False, **replaced: str) -> Callable[[Path], None]:
    """Write by SimpleITK, then change lines of the text header."""

    def make(path: Path) -> None:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array, isVector=vector), path)
        content = path.read_bytes()
        for key, value in replaced.items():
            line = next(one for one in content.split(b"\n") if one.lower().startswith(key.encode()))
            content = content.replace(line, value.encode(), 1)
        path.write_bytes(content)

    return make


def series(**tags: object) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for index in range(3):
            piece = dicom_slice(np.zeros((5, 6), np.uint16), 3.0 * index, **tags)
            piece.save_as(path / f"{index}.dcm", enforce_file_format=True)

    return make


def folder_with(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path.mkdir(), (path / name).write_bytes(content))


def truncated_gzip(path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 1000, (9, 9, 90)).astype(np.int16)
    nifti(noise)(path)
    path.write_bytes(path.read_bytes()[:-2000])


def half_pair(path: Path) -> None:
    nib.save(nib.Nifti1Pair(marked(), AFFINE), path)
    path.with_suffix(".img").unlink()


GOOD = marked().transpose(2, 1, 0)
COLOUR = np.zeros((3, 3, 3), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
SINGULAR = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])


def with_one(value: float) -> np.ndarray:
    """A good image with ``value`` in one voxel."""
    return np.where(np.arange(GOOD.size).reshape(GOOD.shape) == 0, value, GOOD).astype(np.float32)


IMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("absent.nii.gz", lambda path: None, "file not found"),
    ("absent.mha", lambda path: None, "file not found"),
    ("empty.nii.gz", raw(b""), "file is empty (0 bytes)"),
    ("text.nii.gz", raw(b"not even gzip"), "not a readable NIfTI"),
    ("text.nii", raw(b"no image " * 100), "not a readable NIfTI"),
    ("packed_text.nii.gz", raw(gzip.compress(b"no image " * 100)), "not a readable NIfTI"),
    ("scan.png", raw(b"\x89PNG\r\n\x1a\n" + b"\0" * 200), "pictures and text are no CT"),
    ("no_suffix", raw(b"hello"), "pictures and text are no CT"),
    ("cut.nii.gz", truncated_gzip, "truncated"),
    ("cut.nii", lambda path: (nifti(GOOD)(path), path.write_bytes(path.read_bytes()[:-1])), "truncated"),
    ("flat.nii.gz", nifti(GOOD[:, :, 0]), "expected three axes"),
    ("series.nii.gz", nifti(np.stack([GOOD, GOOD], axis=-1)), "expected three axes"),
    ("bomb.nii.gz", nifti(GOOD, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]), "more than a file of"),
    ("no_axis.nii", nifti(GOOD, dim=[3, 6, 0, 4, 1, 1, 1, 1]), "axis is empty"),
    ("many_axes.nii", nifti(GOOD, dim=[99, 6, 5, 4, 1, 1, 1, 1]), "not a readable NIfTI"),
    ("colour.nii.gz", nifti(COLOUR), "voxels are colours (RGB)"),
    ("complex.nii.gz", nifti(GOOD.astype(np.complex64)), "voxels are complex numbers"),
    ("type.nii", nifti(GOOD, datatype=7777), "not a readable NIfTI"),
    ("units.nii", nifti(GOOD, xyzt_units=7), "unknown unit of length"),
    ("nan.nii.gz", nifti(with_one(np.nan)), "1 voxels are NaN and 0 infinite"),
    ("inf.nii.gz", nifti(with_one(np.inf)), "0 voxels are NaN and 1 infinite"),
    ("constant.nii.gz", nifti(np.full((4, 4, 4), -1000, np.int16)), "every voxel is -1000"),
    ("slope.nii", nifti(GOOD, scl_slope=np.inf), "NIfTI"),
    ("steep.nii", nifti(GOOD, scl_slope=3e38, scl_inter=1), "infinite"),
    ("singular.nii", nifti(GOOD, srow_x=SINGULAR[0], srow_y=SINGULAR[1], srow_z=SINGULAR[2]), "not independent"),
    ("coarse.nii", nifti(GOOD, srow_z=[0, 0, 5000, 0]), "are outside 0.01 to 100.0 mm"),
    ("nan_affine.nii", nifti(GOOD, srow_x=[np.nan, 0, 0, 0]), "header is damaged"),
    ("half.hdr", half_pair, "half of a pair, and half.img is missing"),
    ("analyze.hdr", lambda path: nib.save(nib.AnalyzeImage(GOOD, AFFINE), path), "which side is left"),
    ("cut.mha", lambda path: (itk(marked())(path), path.write_bytes(path.read_bytes()[:-9])), "more than a file of"),
    ("huge.mha", itk(marked(), dimsize="DimSize = 9999 9999 9999"), "more than a file of"),
    ("flat.mha", itk(marked()[0]), "expected three axes"),
    ("outside.mha", itk(marked(), elementdatafile="ElementDataFile = /etc/passwd"), "voxels lie in another file"),
    ("vector.mha", itk(np.zeros((3, 4, 5, 3), np.uint8), vector=True), "colours or vectors"),
    ("type.mha", itk(marked(), elementtype="ElementType = MET_STRING"), "'MET_STRING', expected integers"),
    ("text.mha", raw(b"no header here\n" * 9), "its header has no end"),
    ("size.mha", itk(marked(), dimsize="DimSize = a b c"), "no 'dimsize' in its header"),
    ("still.mha", itk(marked(), elementspacing="ElementSpacing = 0 1 1"), "mm"),
    ("text.nrrd", raw(b"PLAIN text\n"), "no NRRD mark"),
    ("outside.nrrd", itk(marked(), encoding="encoding: raw\ndata file: /etc/passwd"), "voxels lie in another file"),
    ("cut.nrrd", lambda path: (itk(marked())(path), path.write_bytes(path.read_bytes()[:-9])), "more than a file of"),
    ("none", Path.mkdir, "no DICOM file"),
    ("pictures", folder_with("a.png", b"\x89PNG"), "no DICOM file"),
    ("garbage", folder_with("bad.dcm", b"\0" * 128 + b"DICM" + b"\xff" * 50), "not a readable DICOM file"),
    ("text", folder_with("bad.dcm", b"hello" * 100), "not a readable DICOM file"),
    ("mr", series(Modality="MR"), "modality MR, expected CT"),
    ("colours", series(SamplesPerPixel=3), "colours, expected HU"),
    ("frames", series(NumberOfFrames=4), "several frames in one file"),
    ("no_rescale", series(RescaleSlope=None), "has no RescaleSlope"),
    ("no_spacing", series(PixelSpacing=None), "has no PixelSpacing"),
    ("no_place", series(ImagePositionPatient=None), "no position in the patient"),
    ("scout", series(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), "a scout"),
    ("pixels", series(PixelData=b"\0" * 20), "pixels cannot be read"),
    ("gap", lambda path: write_series(path, marked())[1].unlink(), "1 slice(s) are missing"),
    ("two", lambda path: [write_series(path, marked(), n, SeriesInstanceUID=f"1.{n}") for n in "12"], "2 CT series"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "words"), IMAGES, ids=[name for name, *_ in IMAGES])
def test_images(tmp_path, name, make, words):
    make(tmp_path / name)
    expect(lambda: read_volume(tmp_path / name), tmp_path, words)


def expect(read: Callable[[], object], folder: Path, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert words in message and str(folder) in message, message
    assert "\n" not in message and len(message.replace(str(folder), "")) < 500


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.zeros((6, 5, 3), np.uint8), "own grid"),
        (np.full((6, 5, 4), 0.5, np.float32), "fractions"),
        (np.full((6, 5, 4), -1, np.int16), "whole labels"),
        (np.full((6, 5, 4), np.nan, np.float32), "whole labels"),
        (np.full((6, 5, 4), 40000, np.uint16), "whole labels"),
    ],
)
def test_masks(tmp_path, labels, words):
    store_as(tmp_path / "scan.nii.gz", marked(), "LPS")
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "mask.nii.gz")
    image = read_volume(tmp_path / "scan.nii.gz")
    expect(lambda: read_mask(tmp_path / "mask.nii.gz", image), tmp_path, words)


def bomb() -> bytes:
    """A workbook whose directory declares 600 MB of XML."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("xl/workbook.xml", b"x")
    content = packed.getvalue()
    size = content.rindex(b"PK\1\2") + 24
    return content[:size] + struct.pack("<I", 600 << 20) + content[size + 4 :]


GOOD_ROW = "image_path,question,answer\na.nii.gz,Q,Normal.\n"
TABLES: list[tuple[str, str | bytes, str]] = [
    ("empty.csv", "", "is empty; expected a header: image_path,question,answer"),
    ("blank.csv", "\r\n\r\n", "is empty; expected a header"),
    ("header.csv", "image_path,answer", "header but no rows"),
    ("no_header.csv", "a.nii.gz,Q,Normal.\n", "found a.nii.gz,Q,Normal.; expected image_path"),
    ("no_image.csv", "question,answer\nQ,N\n", "no column 'image_path' (nor a number of the examination); found qu"),
    ("no_report.csv", "image_path,question\na.nii.gz,Q\n", "no column 'answer'"),
    ("twice.csv", "image_path,answer,answer\na.nii.gz,1,2\n", "two columns 'answer'"),
    ("open.csv", GOOD_ROW + 'a.nii.gz,Q,"No nodule.\na.nii.gz,Q,N\n', "not a readable CSV at row 3: unexpected end"),
    ("quote.csv", GOOD_ROW + 'a.nii.gz,Q,"No" nodule.\na.nii.gz,Q,N\n', "not a readable CSV at row 3"),
    ("long.csv", GOOD_ROW + "a.nii.gz,Q," + "x" * 131073, "row 3: field larger than field limit"),
    ("no_answer.csv", GOOD_ROW + "a.nii.gz,Q, \n", "row 3: 'answer' is empty"),
    ("no_path.csv", GOOD_ROW + ",Q,Normal.\n", "row 3: 'image_path' is empty"),
    ("report_as_path.csv", GOOD_ROW + "No nodule" * 30 + ",Q,a.nii.gz\n", "row 3: file not found"),
    ("windows.csv", GOOD_ROW + "d:\\ct\\z.nii.gz,Q,Normal.\n", "path_map"),
    ("mask.csv", "image_path,answer,mask\na.nii.gz,Normal.,m.nii.gz\n", "row 2: file not found"),
    ("cut_utf16.csv", GOOD_ROW.encode("utf-16")[:-1], "damaged UTF-16 text"),
    ("book.xlsx", "no workbook", "not a readable workbook"),
    ("bomb.xlsx", bomb(), "unpacks to 600 MB"),
    ("old.xls", b"\xd0\xcf\x11\xe0", ".xls format"),
    ("line.jsonl", '{"image": "a.nii.gz", "report": "Normal."}\n{', "line 2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), TABLES, ids=[name for name, *_ in TABLES])
def test_tables(tmp_path, name, content, words):
    (tmp_path / "a.nii.gz").touch()
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    expect(lambda: read_caption_table(tmp_path / name), tmp_path, words)


# The last is in GBK.
PROMPTS = [f'{{"caption_prompt": {value}}}' for value in ("[]", '"Q?"', '["Q?", " "]', '["问题"]')]


@pytest.mark.parametrize("content", ["", "{}", '["Report?"]', *PROMPTS])
def test_prompts(tmp_path, content):
    (tmp_path / "prompts.json").write_bytes(content.encode("gbk"))
    expect(lambda: read_prompts(tmp_path / "prompts.json"), tmp_path, "caption_prompt" if content else "not JSON")


def test_missing_files_name_the_key_and_the_script_that_makes_the_shipped_ones(tmp_path):
    expect(lambda: read_caption_table(tmp_path / "no.csv"), tmp_path, "table not found")
    expect(lambda: read_prompts(tmp_path / "no.json"), tmp_path, "set caption_prompt_json")
    expect(lambda: read_caption_table(tmp_path / "quickstart" / "train.csv"), tmp_path, "quickstart.py")
