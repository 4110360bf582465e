"""Doubts about images that can be read, and about tables as a whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.errors import InputError
from data.checks.data_check import check_image, compare_rows, quick_check
from data.checks.image_checks import check_header, check_volume
from data.imaging.reader import read_header, read_volume
from data.imaging.volume import ImageHeader, Volume
from data.phantom.canvas import Grid
from data.phantom.case import make_case
from data.tables.caption_table import CaptionRow
from tests.data.imaging.images import marked, store_as

GRID = Grid((40, 96, 96), (8.0, 3.6, 3.6))


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    """(z, y, x) HU of a healthy phantom."""
    return make_case(3, [], GRID).hu


def as_volume(hu: np.ndarray) -> Volume:
    z, y, x = GRID.spacing
    return Volume(hu.astype(np.float32), GRID.spacing, np.diag([-x, -y, z, 1.0]), "LPS", Path("scan"), "LPS")


def words(volume: Volume) -> str:
    return " | ".join(f"{problem.level}: {problem}" for problem in check_volume(volume))


def row(number: int, image: str, answer: str = "Normal chest.", **options: object) -> CaptionRow:
    return CaptionRow(number, Path(image), options.pop("question", "Q?"), answer, options.pop("mask", None), **options)


# ---------------------------------------------------------------- values


def test_a_chest_in_hu_raises_no_doubt(chest):
    assert words(as_volume(chest)) == ""


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda hu: np.clip(hu + 1024, 0, None), "error: values run from 0 to"),
        (lambda hu: np.clip(hu + 1024, 0, None), "intercept (-1024) is missing"),
        (lambda hu: np.clip((hu + 1350) / 1500, 0, 1), "scaled to 0 to 1"),
        (lambda hu: np.rint(np.clip((hu + 1350) / 1500, 0, 1) * 255), "8-bit image"),
        (lambda hu: (hu + 300) / 400, "normalised, not HU"),
        (lambda hu: hu / 5 - 50, "hardly any air"),
        (lambda hu: hu - 1024, "hardly any soft tissue"),
        (
            lambda hu: np.where(np.indices(hu.shape)[2] < 10, -3024, hu),
            "note: 10 % of the voxels are padding (lowest -3024)",
        ),
        (lambda hu: hu[:, ::-1], "warning: the spine lies in front"),
        (lambda hu: hu[::-1, ::-1], "warning: the spine lies in front"),
        (lambda hu: hu[:, :, ::-1], ""),  # mirrored sides cannot be told, and are not guessed
        (lambda hu: hu[20:], "lungs go on beyond the lower end"),
        (lambda hu: hu[14:20], "beyond the lower and the upper end"),
        (lambda hu: np.where(hu < -500, 0, hu) - 1000 * (np.indices(hu.shape)[1] < 12), "0.0 litres of air inside"),
    ],
)
def test_values_that_are_doubted(chest, change, expected):
    said = words(as_volume(change(chest)))
    assert expected in said if expected else said == ""


def test_real_scans_raise_no_doubt_and_their_mirror_images_do(shared):
    for name in ("CIP_ct-64.nii.gz", "LungDx-A0001.nii.gz"):
        volume = read_volume(shared / "ct" / name)
        assert check_volume(volume) == []
        assert "spine" in words(replace(volume, array=np.ascontiguousarray(volume.array[:, ::-1])))


# ---------------------------------------------------------------- headers


def header(shape: tuple[int, int, int], zooms: tuple[float, float, float], turn: float = 0.0) -> ImageHeader:
    """(i, j, k) in LPS order, turned about x by ``turn`` degrees."""
    angle = np.radians(turn)
    turned = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag([-zooms[0], -zooms[1], zooms[2]])
    return ImageHeader(Path("scan"), shape, np.dtype(np.int16), affine, np.array(zooms))


@pytest.mark.parametrize(
    ("shape", "zooms", "turn", "expected"),
    [
        ((512, 512, 300), (0.7, 0.7, 1.0), 0, ""),
        ((512, 512, 300), (0.7, 0.7, 1.0), 5, ""),
        ((512, 512, 60), (0.7, 0.7, 1.0), 0, "60 mm long"),
        ((512, 512, 900), (0.7, 0.7, 1.0), 0, "more than a chest"),
        ((512, 512, 300), (0.2, 0.2, 1.0), 0, "pixels are 0.2"),
        ((512, 512, 300), (0.2, 0.2, 1.0), 0, "field of view is 102 x 102"),
        ((512, 512, 20), (0.7, 0.7, 15.0), 0, "15 mm apart"),
        ((512, 512, 300), (0.7, 0.7, 1.0), 25, "oblique by 25 degrees"),
    ],
)
def test_headers_that_are_doubted(shape, zooms, turn, expected):
    said = " | ".join(map(str, check_header(header(shape, zooms, turn))))
    assert expected in said if expected else said == ""


def test_what_the_file_left_in_doubt_is_among_them(shared):
    found = check_header(read_header(shared / "nifti" / "12_q_s_conflict_LRflip.nii.gz"))
    assert any("check left and right" in str(problem) for problem in found)


# ---------------------------------------------------------------- rows


def test_one_row_with_everything_wrong_is_told_all_of_it(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    store_as(tmp_path / "m.nii.gz", marked()[:3], "LPS")
    checked = check_image(row(7, tmp_path / "a.nii.gz", "Q?", mask=tmp_path / "m.nii.gz"))
    said = " | ".join(map(str, checked.problems))
    for part in ("report is only 'Q?'", "same text", "mm long", "own grid"):
        assert part in said
    assert {problem.row for problem in checked.problems} == {7} and checked.volume is not None
    quick = check_image(row(7, tmp_path / "a.nii.gz", "Q?", mask=tmp_path / "m.nii.gz"), quick=True)
    assert "own grid" in " | ".join(map(str, quick.problems)) and quick.volume is None


def test_quick_check_names_the_first_bad_file_and_counts_the_others(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    good = row(2, tmp_path / "a.nii.gz")
    quick_check([good], [good])
    (tmp_path / "b.nii.gz").write_bytes(b"")
    bad = [row(n, tmp_path / "b.nii.gz") for n in (3, 4)]
    with pytest.raises(InputError, match=r"row 3: .*b\.nii\.gz: file is empty .*and 1 more problems.*check_data\.py"):
        quick_check([good, *bad], [good])


def test_duplicates_and_leaks_are_found_by_path_patient_and_content(tmp_path):
    train = [row(2, "a", patient="P1"), row(3, "a"), row(4, "a", "Another report."), row(5, "b"), row(6, "c")]
    train += [row(7, "c", question="Nodules?")]  # a second question about one image is no duplicate
    val = [row(2, "d", patient="P1"), row(3, "e")]
    found = compare_rows(train, val, {Path("b"): "same", Path("e"): "same"})
    said = [(p.table, p.row, p.problem) for p in found]
    assert ("train", 3, "says the same as row 2: same image, question and report") in said
    assert ("train", 4, "has the image of row 3 and another report") in said
    assert ("val", 2, "patient 'P1' is in the training table too (row 2)") in said
    assert ("val", 3, "this image is in the training table too (row 5)") in said
    assert any("5 of 6 reports are the same text" in problem for *_, problem in said)
    assert len(said) == 5 and not any(problem.fatal for problem in found)


def test_a_scan_stored_twice_has_one_digest(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    store_as(tmp_path / "b.nii", marked(), "SRP")
    store_as(tmp_path / "c.nii", marked() + 1, "LPS")
    digests = [check_image(row(2, tmp_path / name)).digest for name in ("a.nii.gz", "b.nii", "c.nii")]
    assert digests[0] == digests[1] != digests[2]
