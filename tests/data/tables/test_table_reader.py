"""Tables as they come: encodings, multi-line cells, Excel, JSON; no cell is guessed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import openpyxl
import pytest

from config.errors import InputError
from data.tables.table_reader import read_table

REPORT = '右肺上叶见结节，约12mm，边界"清"。\n\n左肺未见异常。'
LITERAL = ["右肺结节。", "NA", "null", "007", "12.0", "1,000", "1e5", "True", "2024-01-02", "", " x "]


def written(folder: Path, content: str | bytes, name: str = "train.csv") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder / name


def as_csv(*rows: list[str], delimiter: str = ",") -> str:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows(rows)
    return stream.getvalue()


def workbook(folder: Path, sheets: dict[str, list[list[object]]]) -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(folder / "train.xlsx")
    return folder / "train.xlsx"


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "gb2312", "utf-16"])
@pytest.mark.parametrize("filler", [0, 2000])  # with 2000 rows the first Chinese character is far from the start
def test_every_encoding_of_excel_gives_the_same_row(tmp_path, encoding, filler):
    rows = [["image", "问题" if not filler else "question"], *[["a.nii.gz", "Q"]] * filler, ["请描述，影像", REPORT]]
    table = read_table(written(tmp_path, as_csv(*rows).encode(encoding)))
    assert table.rows[-1] == (filler + 2, dict(zip(rows[0], rows[-1], strict=True)))
    assert table.notes == {"utf-1": ["read as UTF-16"], "utf-8": []}.get(encoding[:5], ["read as GBK"])


ENCODINGS = [("\t", "utf-16"), (";", "utf-8"), (",", "utf-8"), (",", "utf-16-le"), (",", "utf-16-be")]


@pytest.mark.parametrize(("delimiter", "encoding"), ENCODINGS)
def test_a_cell_is_the_text_that_was_written(tmp_path, delimiter, encoding):
    """UTF-16 also without a byte-order mark, where it is known by its zeros."""
    names = [f"c{i}" for i in range(len(LITERAL))]
    path = written(tmp_path, as_csv(names, LITERAL, delimiter=delimiter).encode(encoding))
    assert read_table(path).rows == [(2, dict(zip(names, LITERAL, strict=True)))]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("image_path,answer\na.nii.gz,右肺结节。\nb.nii.gz,左肺结节".encode()[:-1], 3),  # cut within a character
        ("image_path,answer\na.nii.gz,右肺结节。\n".encode().replace("肺".encode(), b"\xe8\x82"), 2),
        ("image_path,answer\na.nii.gz,poumon clair, côté gauche à vérifier\n".encode("latin-1"), 2),
        ("image_path,answer\na.nii.gz,右肺結節、左肺清晰\n".encode("big5"), 2),
        (b"image_path,answer\na.nii.gz,\xff\xff\xff\n", 2),
    ],
)
def test_a_text_that_would_come_out_garbled_is_refused_with_its_line(tmp_path, content, line):
    message = refusal(written(tmp_path, content))
    assert f"neither UTF-8 nor GBK text (line {line})" in message and "CSV UTF-8" in message


def test_row_numbers_are_those_of_a_spreadsheet(tmp_path):
    """Blank lines and cells of several lines do not shift the number that an error names."""
    rows = ["a,b,c", 'x,Q,"one\ntwo\r\nthree"', "", "y,Q,Normal.", "", " , ,", "z,Q,Normal.", "z,Q,Normal,4", ""]
    table = read_table(written(tmp_path, "\n".join(rows)))
    assert [number for number, _ in table.rows] == [2, 4, 7]
    assert [(problem.row, problem.problem) for problem in table.problems] == [(8, "4 cells under 3 columns")]
    assert table.rows[0][1]["c"] == "one\ntwo\r\nthree"


def test_empty_cells_beyond_the_header_are_harmless(tmp_path):
    table = read_table(written(tmp_path, "a,b,,\n1,2,,\n3,4,,,,\n"))
    assert [cells["b"] for _, cells in table.rows] == ["2", "4"] and table.columns == ["a", "b"]


def test_a_row_of_far_too_many_cells_is_named(tmp_path):
    assert "row 3: Expected" in refusal(written(tmp_path, as_csv(["a", "b"], ["1", "2"], ["x"] * 99)))


# ---------------------------------------------------------------- Excel and JSON


def test_workbook(tmp_path):
    rows = [
        ["影像号", "报告", "患者"],
        [12, "双肺_x000D_\n清晰，\n无结节。", 7.0],
        [],
        ["0013", "NA", 1.5],
        ["x", "#N/A"],
    ]
    table = read_table(workbook(tmp_path, {"Sheet1": rows, "Sheet2": []}))
    assert [number for number, _ in table.rows] == [2, 4, 5]
    assert [list(cells.values()) for _, cells in table.rows] == [
        ["12", "双肺\n清晰，\n无结节。", "7"],
        ["0013", "NA", "1.5"],
        ["x", "", ""],  # an error of Excel is an empty cell
    ]


def test_merged_cells_of_a_workbook_are_filled_downwards(tmp_path):
    """A patient with two series, as people merge cells; the header and what lies beyond the table stay."""
    rows = [
        ["image", "患者", "报告"],
        ["a", "P1", "甲"],
        ["b", None, "乙"],
        ["c", "P2", "丙"],
        ["d"],
        ["e", "P3", "丁"],
    ]
    rows += [[], ["f", "P4", "戊"], []]  # P3 reaches into a blank row, and P4's record is two rows high
    path = workbook(tmp_path, {"Sheet1": rows})
    book = openpyxl.load_workbook(path)
    for area in ("B2:B3", "B4:B5", "C4:C5", "A1:A2", "B6:B7", "A8:A9", "B8:B9", "C8:C9", "H2:I4"):
        book.active.merge_cells(area)
    book.save(path)
    table = read_table(path)
    assert [list(cells.values())[1:] for _, cells in table.rows] == [
        ["P1", "甲"],
        ["P1", "乙"],
        ["P2", "丙"],
        ["P2", "丙"],
        ["P3", "丁"],
        ["P4", "戊"],
    ]
    assert table.notes == ["merged cells: 3 below the first take its text"]


def test_a_formatted_cell_far_away_costs_nothing(tmp_path):
    path = workbook(tmp_path, {"Sheet1": [["image", "报告"], ["a", "甲"]]})
    book = openpyxl.load_workbook(path)
    book.active["XFD1048576"].font = openpyxl.styles.Font(bold=True)
    book.save(path)
    assert read_table(path).rows == [(2, {"image": "a", "报告": "甲"})]


def test_workbooks_that_are_refused(tmp_path):
    header = ["image_path", "answer"]
    assert "2 sheets have cells (a, b)" in refusal(workbook(tmp_path, {"a": [header], "b": [header]}))
    assert "is empty" in refusal(workbook(tmp_path, {"a": []}))


CONVERSATION = [
    {"from": "human", "value": "<image>\nDescribe."},
    {"from": "gpt", "value": "Clear lungs."},
    {"from": "human", "value": "Nodules?"},
    {"from": "gpt", "value": "None."},
]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_instruction_files(tmp_path, name):
    records = [
        {"id": "1", "image": "a.nii.gz", "conversations": [{"from": "system", "value": "Be brief."}, *CONVERSATION]},
        {"image": ["b.nii.gz"], "question": "Q", "answer": "双肺清晰。"},
    ]
    lines = json.dumps(records) if name == "train.json" else "\n".join(map(json.dumps, records))
    table = read_table(written(tmp_path, lines, name))
    assert [(number, cells["image"], cells["question"], cells["answer"]) for number, cells in table.rows] == [
        (1, "a.nii.gz", "Describe.", "Clear lungs."),
        (1, "a.nii.gz", "Nodules?", "None."),
        (2, "b.nii.gz", "Q", "双肺清晰。"),
    ]
    assert table.columns == ["id", "image", "question", "answer"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"image": "a.nii.gz", "conversations": CONVERSATION[:1]}, "a question has no answer"),
        ({"image": "a.nii.gz", "conversations": []}, "a question has no answer"),
        ({"image": "a.nii.gz", "conversations": CONVERSATION[1:]}, "out of turn"),
        ({"image": "a.nii.gz", "conversations": "hello"}, "no list of turns"),
        ({"image": "a.nii.gz", "conversations": [{"from": "human", "value": 3}]}, "has no text"),
        ({"image": ["a.nii.gz", "b.nii.gz"], "report": "x"}, "names 2 images"),
        ("text", "is a str, not a record"),
    ],
)
def test_records_that_are_none(tmp_path, record, words):
    good = {"image": "a.nii.gz", "report": "Normal."}
    table = read_table(written(tmp_path, json.dumps([good, record]), "train.json"))
    [problem] = table.problems
    assert problem.row == 2 and words in problem.problem and table.rows == [(1, good)]


@pytest.mark.parametrize("content", ["", "{", '{"train": []}', "3", "[" * 100_000, "[" + "9" * 5000 + "]"])
def test_json_that_is_no_table(tmp_path, content):
    assert "expected" in refusal(written(tmp_path, content, "train.json"))
