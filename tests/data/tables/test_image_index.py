"""From the number of an examination to its image."""

from __future__ import annotations

import pytest

from data.tables.image_index import ImageIndex

FILES = (
    "images/12.nii.gz", "images/012.nii.gz", "images/scan_7_b.nii", "P8/ct.mha", "CT9/001.dcm", "CT9/002.dcm",
    "masks/12.nii.gz", "images/12_seg.nii.gz", "labelsTr/7.nii.gz", "t/5_0000.nii.gz", "t/5a.nii.gz",
    "x/0044.nii.gz", "y/y-44.nii.gz", "notes/12.txt", "pair/66.hdr", "pair/66.img", ".nii",
)  # fmt: skip


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> ImageIndex:
    root = tmp_path_factory.mktemp("images")
    for name in FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return ImageIndex(root)


@pytest.mark.parametrize(
    ("number", "images"),
    [
        ("12", ["images/12.nii.gz"]),
        ("012", ["images/012.nii.gz"]),
        ("7", ["images/scan_7_b.nii"]),
        ("p8", ["P8/ct.mha"]),
        ("ct9", ["CT9"]),
        ("5", ["t/5_0000.nii.gz"]),
        ("66", ["pair/66.hdr"]),
        ("44", ["y/y-44.nii.gz"]),
        ("00044", ["x/0044.nii.gz", "y/y-44.nii.gz"]),
        ("404", []),
    ],
)
def test_the_best_match_decides_and_two_equal_ones_are_both_given(index, number, images):
    assert [path.relative_to(index.root).as_posix() for path in index.find(number)] == images


def test_slices_without_a_suffix_are_a_series_and_other_files_are_none(tmp_path):
    for name, content in (
        ("12345/IM0001", b"\0" * 128 + b"DICM"),
        ("777/README", b"text"),
        ("9/1.2.840.7", b"\0" * 128 + b"DICM"),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(content)
    index = ImageIndex(tmp_path)
    assert index.find("12345") == [tmp_path / "12345"] and index.find("9") == [tmp_path / "9"] and not index.find("777")


@pytest.mark.parametrize("cell", ["~$scan.nii.gz", "~nosuchuser/scan.nii.gz", "a\0b.nii.gz"])
def test_what_is_no_path_is_a_path_that_is_not_there(tmp_path, cell):
    assert tmp_path in ImageIndex(tmp_path).path(cell).parents
