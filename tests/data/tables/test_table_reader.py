"""Tables as they come: encodings, Excel, JSON, other names of columns, sections, numbers instead of files."""

from __future__ import annotations

import json
from pathlib import Path

import openpyxl
import pytest

from config.errors import InputError
from data.tables.caption_table import join_sections, read_caption_table, scan_caption_table, text_problem
from data.tables.columns import ALIASES, find_columns
from data.tables.image_index import ImageIndex

REPORT = '右肺上叶见结节，约12mm，边界"清"。\n\n左肺未见异常。'
CHINESE = f'影像路径,问题,报告\na.nii.gz,"请描述，影像",{json.dumps(REPORT, ensure_ascii=False)}\n'.replace(
    json.dumps(REPORT, ensure_ascii=False), '"' + REPORT.replace('"', '""') + '"'
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "m.nii.gz"):
        (tmp_path / name).touch()
    return tmp_path


def written(folder: Path, content: str | bytes, name: str = "train.csv") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder / name


def workbook(folder: Path, sheets: dict[str, list[list[object]]], name: str = "train.xlsx") -> Path:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(folder / name)
    return folder / name


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        read_caption_table(path, **options)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "gb2312", "utf-16"])
def test_every_encoding_of_excel_gives_the_same_row(folder, encoding):
    filler = "a.nii.gz,Q,Normal.\n" * 2000  # the first Chinese character far from the start
    for text in (CHINESE, f"image_path,question,answer\n{filler}" + CHINESE.partition("\n")[2]):
        row = read_caption_table(written(folder, text.encode(encoding)))[-1]
        assert (row.image_path, row.question, row.answer) == (folder / "a.nii.gz", "请描述，影像", REPORT)


def test_the_encoding_is_said(folder):
    assert "read as GBK" in scan_caption_table(written(folder, CHINESE.encode("gbk"))).notes
    assert "read as UTF-16" in scan_caption_table(written(folder, CHINESE.encode("utf-16"))).notes


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_known_by_the_zeros_of_its_plain_letters(folder, encoding):
    text = "image_path,answer\na.nii.gz,右肺结节。\n"
    assert read_caption_table(written(folder, text.encode(encoding)))[0].answer == "右肺结节。"


def test_tabs_and_semicolons_separate_too(folder):
    for mark, encoding in (("\t", "utf-16"), (";", "utf-8")):
        text = f"image_path{mark}answer\na.nii.gz{mark}Normal, no nodule.\n"
        assert read_caption_table(written(folder, text.encode(encoding)))[0].answer == "Normal, no nodule."


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
def test_a_text_that_would_come_out_garbled_is_refused_with_its_line(folder, content, line):
    message = refusal(written(folder, content))
    assert f"neither UTF-8 nor GBK text (line {line})" in message and "CSV UTF-8" in message


def test_damaged_utf16(folder):
    assert "UTF-16" in refusal(written(folder, CHINESE.encode("utf-16")[:-1]))


# ---------------------------------------------------------------- columns and sections


def test_aliases_are_unique_and_found_in_any_spelling():
    names = [name.lower() for aliases in ALIASES.values() for name in aliases]
    assert len(names) == len(set(names))
    for role, aliases in ALIASES.items():
        for alias in aliases:
            assert find_columns([f" {alias.upper().replace('_', ' ')}（必填） "])[0].keys() == {role}


def test_chinese_columns_of_a_hospital_export_become_a_four_section_report(folder):
    text = "序号,影像路径,患者编号,所见,结论,建议,病理倾向\n1,a.nii.gz,P7,右肺上叶见结节。,右肺上叶结节,随访,良性\n"
    scan = scan_caption_table(written(folder, text))
    assert scan.rows[0].answer == "所见：右肺上叶见结节。结论：右肺上叶结节。建议：随访。病理倾向：良性。"
    assert scan.rows[0].patient == "P7" and scan.rows[0].question == "" and scan.problems == []
    assert "column '所见' is taken as findings" in scan.notes


def test_sections_keep_their_own_stops_and_headings_and_english_gets_english_ones():
    assert (
        join_sections({"findings": "所见：双肺清晰！", "impression": " 结论: 未见异常"})
        == "所见：双肺清晰！结论：未见异常。"
    )
    assert (
        join_sections({"findings": "Clear lungs", "impression": "Normal."})
        == "Findings: Clear lungs. Impression: Normal."
    )
    assert join_sections({"findings": "", "impression": "结论："}) == ""


def test_an_empty_section_is_said_and_an_empty_report_refused(folder):
    path = written(folder, "image,findings,impression\na.nii.gz,Clear.,\nb.nii.gz,,\n")
    scan = scan_caption_table(path)
    assert [(p.row, p.fatal) for p in scan.problems] == [(2, False), (3, True)]
    assert "no impression" in scan.problems[0].problem and "'answer' is empty" in scan.problems[1].problem
    assert [row.answer for row in scan.rows] == ["Findings: Clear."]


def test_a_whole_report_wins_over_its_sections_and_that_is_said(folder):
    scan = scan_caption_table(written(folder, "path,image,report,findings\nb.nii.gz,a.nii.gz,Whole.,Part.\n"))
    assert scan.rows[0].answer == "Whole." and scan.rows[0].image_path.name == "a.nii.gz"
    assert any("'path'" in note and "not used" in note for note in scan.notes)


# ---------------------------------------------------------------- Excel and JSON


def test_workbook(folder):
    rows = [["影像号", "报告", "患者"], [12, "双肺_x000D_\n清晰，\n无结节。", 7.0], [], ["0013", "左肺结节。", "x"]]
    (folder / "0012.nii.gz").touch()
    (folder / "0013.nii.gz").touch()
    first, second = read_caption_table(workbook(folder, {"Sheet1": rows, "Sheet2": []}))
    assert (first.number, second.number) == (2, 4) and first.patient == "7"
    assert first.answer == "双肺\n清晰，\n无结节。" and first.image_path == folder / "0012.nii.gz"


def test_workbooks_that_are_refused(folder):
    header = ["image_path", "answer"]
    assert "2 sheets have cells (a, b)" in refusal(workbook(folder, {"a": [header], "b": [header]}))
    assert "no rows" in refusal(workbook(folder, {"a": [header]}))
    assert "is empty" in refusal(workbook(folder, {"a": []}))
    assert "not a readable workbook" in refusal(written(folder, "image_path,answer\n", "text.xlsx"))
    assert ".xls format is not read" in refusal(written(folder, b"\xd0\xcf\x11\xe0", "old.xls"))


CONVERSATION = [
    {"from": "human", "value": "<image>\nDescribe."},
    {"from": "gpt", "value": "Clear lungs."},
    {"from": "human", "value": "Nodules?"},
    {"from": "gpt", "value": "None."},
]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_instruction_files(folder, name):
    records = [
        {"id": "1", "image": "a.nii.gz", "conversations": CONVERSATION},
        {"image": ["b.nii.gz"], "question": "Q", "answer": "双肺清晰。"},
    ]
    lines = json.dumps(records) if name == "train.json" else "\n".join(map(json.dumps, records))
    rows = read_caption_table(written(folder, lines, name))
    assert [(row.number, row.image_path.name, row.question, row.answer) for row in rows] == [
        (1, "a.nii.gz", "Describe.", "Clear lungs."),
        (1, "a.nii.gz", "Nodules?", "None."),
        (2, "b.nii.gz", "Q", "双肺清晰。"),
    ]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"image": "a.nii.gz", "conversations": CONVERSATION[:1]}, "a question has no answer"),
        ({"image": "a.nii.gz", "conversations": CONVERSATION[1:]}, "out of turn"),
        ({"image": "a.nii.gz", "conversations": "hello"}, "no list of turns"),
        ({"image": "a.nii.gz", "conversations": [{"from": "human", "value": 3}]}, "has no text"),
        ({"image": ["a.nii.gz", "b.nii.gz"], "report": "x"}, "names 2 images"),
        ("text", "is a str, not a record"),
    ],
)
def test_records_that_are_none(folder, record, words):
    good = {"image": "a.nii.gz", "report": "Normal."}
    message = refusal(written(folder, json.dumps([good, record]), "train.json"))
    assert "row 2" in message and words in message


@pytest.mark.parametrize("content", ["", "{", '{"train": []}', "3", "[" * 100_000, "[" + "9" * 5000 + "]"])
def test_json_that_is_no_table(folder, content):
    assert "expected" in refusal(written(folder, content, "train.json"))


# ---------------------------------------------------------------- numbers instead of files


def index(tmp_path: Path, *names: str) -> ImageIndex:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return ImageIndex(tmp_path)


def test_the_best_match_decides_and_two_equal_ones_do_not(tmp_path):
    found = index(
        tmp_path, "images/12.nii.gz", "images/012.nii.gz", "images/scan_7_b.nii", "P8/ct.mha", "CT9/001.dcm",
        "CT9/002.dcm", "masks/12.nii.gz", "images/12_seg.nii.gz", "labelsTr/7.nii.gz", "t/5_0000.nii.gz", "t/5a.nii.gz",
        "x/0044.nii.gz", "y/y-44.nii.gz", "notes/12.txt", "pair/66.hdr", "pair/66.img",
    )  # fmt: skip

    def names(number: str) -> list[str]:
        return [path.relative_to(tmp_path).as_posix() for path in found.find(number)]

    assert names("12") == ["images/12.nii.gz"] and names("012") == ["images/012.nii.gz"]
    assert names("7") == ["images/scan_7_b.nii"] and names("p8") == ["P8/ct.mha"] and names("ct9") == ["CT9"]
    assert names("5") == ["t/5_0000.nii.gz"] and names("66") == ["pair/66.hdr"]
    assert names("44") == ["y/y-44.nii.gz"] and names("00044") == ["x/0044.nii.gz", "y/y-44.nii.gz"]
    assert names("404") == [] and names("") == []


def test_numbers_in_a_table(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    index(root, "P1/ct.nii.gz", "P2/ct.nii.gz", "P2/ct2.nii.gz")
    path = written(folder, "影像号,报告\nP1,Normal.\nP2,Normal.\nP3,Normal.\n1.2E+15,Normal.\n")
    scan = scan_caption_table(path, image_root=root)
    assert [row.image_path for row in scan.rows] == [root / "P1" / "ct.nii.gz"]
    words = [problem.problem for problem in scan.problems]
    assert "fits 2 images" in words[0] and "no image below" in words[1] and "Excel has rounded" in words[2]
    assert [problem.row for problem in scan.problems] == [3, 4, 5]


def test_a_folder_of_slices_is_an_image_and_an_empty_one_is_not(folder):
    index(folder, "series/1.dcm")
    (folder / "empty").mkdir()
    scan = scan_caption_table(written(folder, "image_path,answer\nseries,Normal.\nempty,Normal.\n"))
    assert [row.image_path.name for row in scan.rows] == ["series"] and scan.problems[0].row == 3


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Clear\x00 lungs", "U+0000"),
        ("Clear \ud800 lungs", "U+D800"),
        ("右肺\ufffd\ufffd结节", "lost in a conversion"),
        ("锟斤拷锟斤拷", "lost in a conversion"),
        ("右肺结节\r\n\t12mm ≥ 5 μm ①", ""),
    ],
)
def test_text_problems(text, words):
    assert (words in text_problem(text)) if words else text_problem(text) == ""
