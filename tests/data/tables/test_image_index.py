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
