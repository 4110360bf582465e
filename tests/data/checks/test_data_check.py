"""All problems of a row, and of tables as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.errors import InputError
from data.checks.data_check import check_image, check_validation, compare_rows, quick_check
from data.checks.problems import raise_errors
from data.tables.caption_table import CaptionRow
from tests.data.imaging.images import marked, store_as


def row(number: int, image: str | Path, answer: str = "Normal chest.", **options: object) -> CaptionRow:
    return CaptionRow(number, Path(image), options.pop("question", "Q?"), answer, options.pop("mask", None), **options)


def test_all_problems_of_one_row_are_reported_at_once(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    store_as(tmp_path / "m.nii.gz", marked()[:3], "LPS")
    bad = row(7, tmp_path / "a.nii.gz", "Q?", mask=tmp_path / "m.nii.gz")
    checked, quick = check_image(bad), check_image(bad, quick=True)
    for part in ("report is only 'Q?'", "same text", "mm long", "own grid"):
        assert part in " | ".join(map(str, checked.problems)) and part in " | ".join(map(str, quick.problems))
    assert {problem.row for problem in checked.problems} == {7}
    assert checked.volume is not None and quick.volume is None


def test_an_empty_mask_is_a_note(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    store_as(tmp_path / "m.nii.gz", 0 * marked(), "LPS")
    problems = check_image(row(2, tmp_path / "a.nii.gz", mask=tmp_path / "m.nii.gz")).problems
    assert [p.level for p in problems if p.problem == "the mask is empty"] == ["note"]


def test_quick_check_names_the_first_bad_file_and_counts_the_others(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    good = row(2, tmp_path / "a.nii.gz")
    assert {problem.level for problem in quick_check(train=[good], val=[good])} == {"warning"}
    (tmp_path / "b.nii.gz").write_bytes(b"")
    bad = [row(n, tmp_path / "b.nii.gz") for n in (3, 4)]
    with pytest.raises(InputError, match=r"row 3: .*b\.nii\.gz: file is empty .*and 1 more problems.*check_data\.py"):
        quick_check(train=[good, *bad], val=[good])


def test_duplicates_and_leaks_are_found_by_path_patient_and_content(tmp_path):
    train = [row(2, "a", patient="P1"), row(3, "a"), row(4, "a", "Another report."), row(5, "b"), row(6, "c")]
    train += [row(7, "c", question="Nodules?")]  # a second question about one image is no duplicate
    val = [row(2, "d", patient="P1"), row(3, "e")]
    found = compare_rows(train, val, {Path("b"): "same", Path("e"): "same"})
    words = [(p.table, p.row, p.problem) for p in found]
    assert ("train", 3, "says the same as row 2: same image, question and report") in words
    assert ("train", 4, "has the image of row 3 and another report") in words
    assert ("val", 2, "patient 'P1' is in the training table too (row 2)") in words
    assert ("val", 3, "this image is in the training table too (row 5)") in words
    assert any("5 of 6 reports are the same text" in problem for *_, problem in words)
    assert len(words) == 5 and not any(problem.fatal for problem in found)


@pytest.mark.parametrize(
    ("answers", "words"), [(["A"], "a single case"), (["A"] * 3, "3 cases with the same report"), (["A", "B"], "")]
)
def test_a_validation_table_without_different_reports_is_refused(answers, words):
    problems = check_validation([row(number, str(number), answer) for number, answer in enumerate(answers, start=2)])
    assert len(problems) == bool(words)
    if words:
        with pytest.raises(InputError, match=rf"^val\.csv: .*{words}.*at least 2 cases with different reports"):
            raise_errors(problems, "val.csv")


def test_a_scan_stored_twice_has_one_digest(tmp_path):
    store_as(tmp_path / "a.nii.gz", marked(), "LPS")
    store_as(tmp_path / "b.nii", marked(), "SRP")
    store_as(tmp_path / "c.nii", marked() + 1, "LPS")
    digests = [check_image(row(2, tmp_path / name)).digest for name in ("a.nii.gz", "b.nii", "c.nii")]
    assert digests[0] == digests[1] != digests[2]
