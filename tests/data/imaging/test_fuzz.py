"""Damaged files by the hundred: each is read or refused in one line; no other exception, no flood of memory."""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import openpyxl
import pytest
import SimpleITK

from config.errors import InputError
from data.imaging.reader import files_of, read_header, read_volume
from data.tables.caption_table import scan_caption_table
from tests.data.imaging.images import dicom_slice, write_series

resource = pytest.importorskip("resource", reason="memory is limited by a call that only Unix has")
PER_KIND = 120  # damaged files of each kind
MEMORY_BYTES = 3 << 30  # above what the process has already


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    return np.random.default_rng(1).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)


@pytest.fixture(autouse=True)
def limited_memory() -> Iterator[None]:
    """An allocation of what a damaged header announces fails, instead of filling the machine."""
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, before[1]))
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    resource.setrlimit(resource.RLIMIT_AS, before)


def damaged(content: bytes, rng: np.random.Generator, head: int) -> bytes:
    """Cut, flipped, overwritten, or with random numbers in its first ``head`` bytes."""
    data = bytearray(content)
    kind = rng.integers(5)
    if kind == 0:
        del data[rng.integers(len(data)) :]
    elif kind == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 6)):
            data[place] ^= 1 << rng.integers(8)
    elif kind == 2:
        for place in rng.integers(0, min(head, len(data)), rng.integers(1, 12)):
            data[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.integers(256)])
    elif kind == 3:
        start = rng.integers(0, min(head, len(data)))
        data[start : start + 8] = rng.bytes(8)
    else:
        start, length = rng.integers(0, len(data)), rng.integers(1, 40)
        data[start : start + length] = b"" if rng.random() < 0.5 else rng.bytes(length) * 2
    return bytes(data)


def refused(path: Path, *readers: Callable[[Path], object]) -> bool:
    """Whether one of ``readers`` refuses the file; the first refusal ends it, as for a user."""
    try:
        for read in readers or (files_of, read_header, read_volume):
            read(path)
    except InputError as error:
        assert "\n" not in str(error) and str(error)
        return True
    return False


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "packed.nii.gz", "a.hdr", "n2.nii", "a.mha", "a.nrrd", "z.mha"])
def test_damaged_volumes(tmp_path, scan, name):
    """``packed``: damaged, then packed anew, so that the damage reaches the header and not the checksum alone."""
    rng = np.random.default_rng(sum(name.encode()))
    source = tmp_path / f"source_{name}"
    if name.endswith((".mha", ".nrrd")):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(scan), source, name.startswith("z"))
    else:
        kind = nib.Nifti2Image if name.startswith("n2") else nib.Nifti1Pair if name.endswith("hdr") else nib.Nifti1Image
        nib.save(kind(scan.transpose(2, 1, 0), np.diag([-1, -1, 2, 1])), source)
    content = source.read_bytes()
    packed = name.startswith("packed")
    content = gzip.decompress(content) if packed else content
    path, outcomes = tmp_path / name, []
    if name.endswith("hdr"):
        path.with_suffix(".img").write_bytes(source.with_suffix(".img").read_bytes())
    for _ in range(PER_KIND):
        broken = damaged(content, rng, 540 if name.startswith("n2") else 348)
        path.write_bytes(gzip.compress(broken, 1) if packed else broken)
        outcomes.append(refused(path))
    assert sum(outcomes) > PER_KIND // 10


@pytest.mark.parametrize("name", ["plain", "compressed"])
def test_damaged_series(tmp_path, scan, name):
    rng = np.random.default_rng(7)
    files = write_series(tmp_path / "s", scan)
    if name == "compressed":  # pydicom's own RLE: decoding runs on damaged bytes
        for index, file in enumerate(files):
            piece = dicom_slice(scan[index], 3.0 * index, RescaleIntercept=0)
            piece.compress("1.2.840.10008.1.2.5")
            piece.save_as(file, enforce_file_format=True)
    content = files[1].read_bytes()
    outcomes = []
    for _ in range(PER_KIND // 2):
        files[1].write_bytes(damaged(content, rng, len(content)))
        outcomes.append(refused(tmp_path / "s"))
    assert sum(outcomes) > PER_KIND // 10


CSV = '影像路径,问题,报告,患者\na.nii.gz,"问,题","双肺""清晰""。\n无结节。",P1\nb.nii.gz,Q,右肺结节。,P2\n'
TURNS = '[{"from": "human", "value": "<image>\\nQ"}, {"from": "gpt", "value": "N"}]'
JSON = f'[{{"image": "a.nii.gz", "conversations": {TURNS}}}]'


@pytest.mark.parametrize("name", ["u.csv", "g.csv", "w.csv", "t.json", "t.jsonl", "t.xlsx"])
def test_damaged_tables(tmp_path, name):
    rng = np.random.default_rng(sum(name.encode()))
    (tmp_path / "a.nii.gz").touch()
    book = openpyxl.Workbook()
    for row in (["image_path", "报告"], ["a.nii.gz", "双肺清晰。"], ["b.nii.gz", "右肺结节，12mm。"]):
        book.active.append(row)
    book.save(tmp_path / "source.xlsx")
    encoding = {"u": "utf-8-sig", "g": "gbk", "w": "utf-16"}.get(name[0], "utf-8")
    text = CSV if name.endswith(".csv") else JSON
    content = (tmp_path / "source.xlsx").read_bytes() if name.endswith("xlsx") else text.encode(encoding)
    for _ in range(PER_KIND // 2 if name.endswith("xlsx") else PER_KIND):
        (tmp_path / name).write_bytes(damaged(content, rng, len(content)))
        refused(tmp_path / name, scan_caption_table)
