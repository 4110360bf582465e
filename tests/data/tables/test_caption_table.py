"""Tables and prompt files as people write them: what is read, what is refused, and with which words."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from config.errors import InputError
from data.tables.caption_table import CaptionRow, question_of, read_caption_table, read_prompts

HEADER = "image_path,question,answer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table's folder with three images and a mask; the reader looks at their existence alone."""
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz", "m.nii.gz"):
        (tmp_path / name).touch()
    return tmp_path


def table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "train.csv"
    path.write_bytes(text.encode(encoding))
    return path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        read_caption_table(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


# ---------------------------------------------------------------- what is read


def test_rows_become_absolute_paths_and_stripped_texts(folder):
    path = table(folder, f"{HEADER},mask_path\na.nii.gz, What? , Nodule. ,m.nii.gz\nb.nii.gz,,Normal.,\n")
    assert read_caption_table(path) == [
        CaptionRow(2, folder / "a.nii.gz", "What?", "Nodule.", folder / "m.nii.gz"),
        CaptionRow(3, folder / "b.nii.gz", "", "Normal.", None),
    ]


def test_columns_may_stand_in_any_order_beside_others(folder):
    path = table(folder, " answer ,patient,image_path,question\nNormal.,7,a.nii.gz,Q\n")
    [row] = read_caption_table(path)
    assert (row.image_path, row.question, row.answer, row.mask_path) == (folder / "a.nii.gz", "Q", "Normal.", None)


def test_byte_order_mark_windows_line_ends_and_chinese(folder):
    path = table(folder, f"{HEADER}\r\na.nii.gz,问题,右肺上叶结节。\r\n", encoding="utf-8-sig")
    [row] = read_caption_table(path)
    assert (row.question, row.answer) == ("问题", "右肺上叶结节。")


def test_quotes_commas_and_line_breaks_inside_a_report(folder):
    report = 'Lungs: "clear", no nodule.\r\n\nImpression:\n1. normal, 2. none'
    path = folder / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([HEADER.split(","), ["a.nii.gz", "Q, 1", report], ["b.nii.gz", "", "Normal."]])
    first, second = read_caption_table(path)
    assert first.answer == report and first.question == "Q, 1"
    assert second.number == 3, "a row is counted once, however many lines it has"


def test_row_numbers_are_those_of_a_spreadsheet(folder):
    """Blank lines and cells of several lines do not shift the number that an error names."""
    rows = ['a.nii.gz,Q,"one\ntwo\nthree"', "", "b.nii.gz,Q,Normal.", "", "", "c.nii.gz,Q,Normal."]
    path = table(folder, "\n".join([HEADER, *rows, ""]))
    assert [row.number for row in read_caption_table(path)] == [2, 4, 7]
    (folder / "c.nii.gz").unlink()
    assert "row 7: file not found" in refusal(path)


def test_a_long_report_is_read_whole(folder):
    report = "No nodule. " * 10_000
    path = table(folder, f"{HEADER}\na.nii.gz,Q,{report}\n")
    assert read_caption_table(path)[0].answer == report.strip()


def test_image_root_and_path_map(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tables")
    path = table(elsewhere, f"{HEADER},mask_path\na.nii.gz,Q,Normal.,\nD:\\CT\\b.nii.gz,Q,Normal.,d:/ct/m.nii.gz\n")
    rows = read_caption_table(path, image_root=folder, path_map={"d:/ct/": f"{folder.as_posix()}/"})
    assert [row.image_path for row in rows] == [folder / "a.nii.gz", folder / "b.nii.gz"]
    assert rows[1].mask_path == folder / "m.nii.gz"
    message = refusal(path, image_root=folder)
    assert "row 3" in message and "path_map" in message


# ---------------------------------------------------------------- what is refused


def test_missing_table_names_the_keys(folder):
    assert "caption_csv_train" in refusal(folder / "absent.csv")
    assert "quickstart.py" in refusal(folder / "quickstart" / "train.csv")


@pytest.mark.parametrize("text", ["", "\n", "\ufeff", "\r\n\r\n"])
def test_empty_file(folder, text):
    assert f"is empty; expected a header: {HEADER}" in refusal(table(folder, text))


@pytest.mark.parametrize("text", [HEADER, f"{HEADER}\n", f"{HEADER}\r\n\r\n"])
def test_header_without_rows(folder, text):
    assert "header but no rows" in refusal(table(folder, text))


@pytest.mark.parametrize("column", ["image_path", "answer"])
def test_missing_column_is_named_with_those_found(folder, column):
    columns = [name for name in (*HEADER.split(","), "mask_path") if name != column]
    message = refusal(table(folder, f"{','.join(columns)}\na.nii.gz,b,c\n"))
    assert f"no column '{column}'" in message and f"found {','.join(columns)}" in message


def test_a_table_without_header_shows_what_was_found(folder):
    assert "no column 'image_path'" in refusal(table(folder, "a.nii.gz,Q,Normal.\n"))


def test_a_column_that_stands_twice(folder):
    assert "two columns 'answer'" in refusal(table(folder, f"{HEADER},answer\na.nii.gz,Q,one,two\n"))


@pytest.mark.parametrize(
    ("cells", "empty"), [(",Q,Normal.", "image_path"), ("a.nii.gz,Q,", "answer"), ("a.nii.gz,Q, ", "answer")]
)
def test_empty_cell_names_row_and_column(folder, cells, empty):
    message = refusal(table(folder, f"{HEADER}\na.nii.gz,Q,Normal.\n{cells}\n"))
    assert f"row 3: '{empty}' is empty" in message


def test_short_row_is_an_empty_cell(folder):
    assert "row 2: 'answer' is empty" in refusal(table(folder, f"{HEADER}\na.nii.gz,Q\n"))


def test_unquoted_comma_in_a_report_is_not_cut_off_in_silence(folder):
    message = refusal(table(folder, f"{HEADER}\na.nii.gz,Q,Normal.\nb.nii.gz,Q,No nodule, no effusion.\n"))
    assert "row 3: 4 cells under 3 columns" in message and "quotation marks" in message


def test_empty_cells_beyond_the_header_are_harmless(folder):
    assert read_caption_table(table(folder, f"{HEADER},,\na.nii.gz,Q,Normal.,,\n"))[0].answer == "Normal."


@pytest.mark.parametrize("row", ['a.nii.gz,Q,"No nodule.', 'a.nii.gz,Q,"No" nodule.'])
def test_a_quotation_mark_never_closed_does_not_swallow_the_rows_after_it(folder, row):
    message = refusal(table(folder, f"{HEADER}\n{row}\nb.nii.gz,Q,Normal.\nc.nii.gz,Q,Normal.\n"))
    assert "row 2" in message and "quotation mark" in message


def test_a_cell_over_the_limit_of_the_csv_module_is_one_line_not_a_traceback(folder):
    path = table(folder, f"{HEADER}\na.nii.gz,Q,Normal.\nb.nii.gz,Q,{'x' * (csv.field_size_limit() + 1)}\n")
    assert "row 3" in refusal(path)


def test_missing_image_and_mask_name_row_and_file(folder):
    message = refusal(table(folder, f"{HEADER},mask_path\nz.nii.gz,Q,Normal.,\na.nii.gz,Q,Normal.,z.nii.gz\n"))
    assert f"row 2: file not found: {folder / 'z.nii.gz'}" in message and "1 more problem" in message
    message = refusal(table(folder, f"{HEADER},mask_path\na.nii.gz,Q,Normal.,z.nii.gz\n"))
    assert f"row 2: file not found: {folder / 'z.nii.gz'}" in message and "more" not in message


def test_a_folder_is_no_image(folder):
    (folder / "dicom").mkdir()
    assert "row 2: file not found" in refusal(table(folder, f"{HEADER}\ndicom,Q,Normal.\n"))


def test_a_report_in_the_column_of_the_image(folder):
    """Longer than a file's name can be: the operating system refuses it, and so do we, with the row."""
    assert "row 2: file not found" in refusal(table(folder, f"{HEADER}\n{'No nodule. ' * 100},Q,a.nii.gz\n"))


# ---------------------------------------------------------------- prompts and questions


def test_prompts_are_read_and_stripped(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"caption_prompt": [" 描述影像。", "Report?"], "other": 1}), encoding="utf-8-sig")
    assert read_prompts(path) == ["描述影像。", "Report?"]


@pytest.mark.parametrize(
    "content",
    [
        b"{}",
        b"[]",
        b'["Report?"]',
        b'{"caption_prompt": []}',
        b'{"caption_prompt": "Report?"}',
        b'{"caption_prompt": ["Report?", 3]}',
        b'{"caption_prompt": ["Report?", " "]}',
        b'{"caption_prompt": ["Report?"',
        b"",
        '{"caption_prompt": ["问题"]}'.encode("gbk"),
    ],
)
def test_bad_prompts_are_one_line_that_names_the_file(tmp_path, content):
    path = tmp_path / "prompts.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_prompts_name_the_key(tmp_path):
    with pytest.raises(InputError, match="caption_prompt_json"):
        read_prompts(tmp_path / "absent.json")


def row(number: int, question: str = "") -> CaptionRow:
    return CaptionRow(number, Path(f"case_{number}.nii.gz"), question, "Normal.", None)


def test_own_question_comes_first():
    assert question_of(row(2, "Own?"), ["Other?"], seed=0) == "Own?"
    assert question_of(row(2, "Own?"), [], seed=0) == "Own?"


def test_drawn_question_depends_on_seed_and_row_and_nothing_else():
    prompts = [f"Question {i}?" for i in range(8)]

    def drawn(seed: int) -> list[str]:
        return [question_of(row(number), prompts, seed) for number in range(2, 34)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert len(set(drawn(0))) > 4, "rows differ"
    # Recorded: another release of Python, or another machine, must draw the same.
    assert drawn(42)[:4] == [prompts[i] for i in [3, 4, 0, 7]]


def test_neither_question_nor_prompts_names_row_and_file():
    with pytest.raises(InputError, match=r"row 5 \(case_5.nii.gz\) has no question.*caption_prompt_json"):
        question_of(row(5), [], seed=0)
