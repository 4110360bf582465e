"""MetaImage and NRRD: headers with their voxels in a second file, and what their headers may not say."""

from __future__ import annotations

import numpy as np
import pytest

from config.errors import InputError
from data.cache import VolumeCache, file_digest
from data.imaging.reader import files_of, read_header, read_mask, read_volume
from data.tables.image_index import ImageIndex
from tests.data.imaging.images import PLAN_2D, SPACING, marked, write_itk


@pytest.mark.parametrize(("packed", "suffix"), [(False, ".raw"), (True, ".zraw")])
def test_mhd_is_read_with_the_voxel_file_that_it_names(tmp_path, packed, suffix):
    path, voxels = tmp_path / "scan.mhd", tmp_path / f"scan{suffix}"
    write_itk(path, marked(), packed=packed)
    volume = read_volume(path)
    assert np.array_equal(volume.array, marked()) and volume.spacing == SPACING and read_header(path).notes == ()
    write_itk(tmp_path / "mask.mhd", (marked() > 0).astype(np.uint8), packed=packed)
    assert read_mask(tmp_path / "mask.mhd", volume)[3, 4, 5] == 1
    assert files_of(path) == [path, voxels]
    assert ImageIndex(tmp_path).find("scan") == [path]
    voxels.write_bytes(voxels.read_bytes()[:-9])
    with pytest.raises(InputError, match="truncated"):
        read_volume(path)
    voxels.unlink()
    with pytest.raises(InputError, match=rf"half of a pair, and scan\{suffix} is missing beside it; copy both"):
        read_header(path)


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd", "scan.nrrd"])
def test_a_scan_in_a_chinese_folder(tmp_path, name):
    """On Windows SimpleITK itself opens no such file."""
    write_itk(tmp_path / name, marked())
    folder = tmp_path / "报告 影像"
    folder.mkdir()
    for path in tmp_path.glob("scan.*"):
        path.rename(folder / path.name)
    assert np.array_equal(read_volume(folder / name).array, marked())


@pytest.mark.parametrize("name", ["scan.mha", "scan.mhd"])
def test_damaged_packed_voxels_are_refused(tmp_path, name):
    """SimpleITK prints a warning and gives whatever lies in memory."""
    write_itk(tmp_path / name, marked(), packed=True)
    file = tmp_path / ("scan.zraw" if name == "scan.mhd" else name)
    content = bytearray(file.read_bytes())
    content[-12] ^= 255
    file.write_bytes(content)
    with pytest.raises(InputError, match="image data cannot be read .*truncated or damaged, copy it again"):
        read_volume(tmp_path / name)


def test_the_digest_of_an_mhd_covers_its_voxel_file(tmp_path):
    write_itk(tmp_path / "scan.mhd", marked())
    cache = VolumeCache(tmp_path / "cache", PLAN_2D)
    entry, digest = cache.entry(tmp_path / "scan.mhd"), file_digest(tmp_path / "scan.mhd")
    write_itk(tmp_path / "scan.mhd", marked() // 2)
    assert cache.entry(tmp_path / "scan.mhd") != entry and file_digest(tmp_path / "scan.mhd") != digest


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("scan.mhd", b"scan.raw", b"/etc/passwd", "expected one .raw or .zraw file beside it"),
        ("scan.mhd", b"scan.raw", b"../scan.raw", "expected one .raw or .zraw file beside it"),
        ("scan.mhd", b"DimSize = 6 5 4", b"DimSize = 6 5 9", "more than a file of 240 bytes"),
        ("scan.nrrd", b"encoding: raw", b"encoding: bzip2", "packed with bzip2, expected gzip or raw"),
    ],
)
def test_headers_that_are_refused(tmp_path, name, old, new, words):
    write_itk(tmp_path / name, marked())
    content = (tmp_path / name).read_bytes()
    assert old in content
    (tmp_path / name).write_bytes(content.replace(old, new))
    with pytest.raises(InputError) as caught:
        read_volume(tmp_path / name)
    assert words in str(caught.value) and "\n" not in str(caught.value)
