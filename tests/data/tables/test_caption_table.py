"""Rows, reports and questions of tables; what is refused stands in tests/data/checks/test_bad_inputs.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import InputError
from config.schema import Config
from data.tables.caption_table import (
    CaptionRow,
    join_sections,
    question_of,
    read_caption_table,
    read_prompts,
    scan_caption_table,
    text_problem,
)

HEADER = "image_path,question,answer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A table's folder with three images and a mask; only their existence is read."""
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz", "m.nii.gz"):
        (tmp_path / name).touch()
    return tmp_path


def table(folder: Path, text: str) -> Path:
    (folder / "train.csv").write_bytes(text.encode())
    return folder / "train.csv"


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as caught:
        read_caption_table(path, **options)
    return str(caught.value)


# ---------------------------------------------------------------- rows


def test_rows_become_absolute_paths_and_stripped_texts(folder):
    path = table(folder, f"{HEADER},mask_path\na.nii.gz, What? , Nodule. ,m.nii.gz\nb.nii.gz,,Normal.,\n")
    assert read_caption_table(path) == [
        CaptionRow(2, folder / "a.nii.gz", "What?", "Nodule.", folder / "m.nii.gz"),
        CaptionRow(3, folder / "b.nii.gz", "", "Normal.", None),
    ]


def test_image_root_and_path_map(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("tables")
    path = table(elsewhere, f"{HEADER},mask_path\na.nii.gz,Q,Normal.,\nD:\\CT\\b.nii.gz,Q,Normal.,d:/ct/m.nii.gz\n")
    root = Config(image_root=str(folder)).table_root
    rows = read_caption_table(path, image_root=root, path_map={"d:/ct/": f"{folder.as_posix()}/"})
    assert [row.image_path for row in rows] == [folder / "a.nii.gz", folder / "b.nii.gz"]
    assert rows[1].mask_path == folder / "m.nii.gz"
    message = refusal(path, image_root=root)
    assert "row 3" in message and "path_map" in message
    assert "row 2: file not found" in refusal(path, image_root=Config().table_root)


def test_the_first_problem_is_named_and_the_others_are_counted(folder):
    path = table(folder, f"{HEADER},mask_path\nz.nii.gz,Q,Normal.,\na.nii.gz,Q,Normal.,z.nii.gz\n")
    message = refusal(path)
    assert f"{path}, row 2: file not found: {folder / 'z.nii.gz'} (and 1 more problems)" in message
    assert "check_data.py lists all at once" in message


def test_numbers_of_examinations(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name in ("P1/ct.nii.gz", "P2/ct.nii.gz", "P2/ct2.nii.gz"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    path = table(folder, "影像号,报告\nP1,Normal.\nP2,Normal.\nP3,Normal.\n1.2E+15,Normal.\n")
    scan = scan_caption_table(path, image_root=root)
    assert [row.image_path for row in scan.rows] == [root / "P1" / "ct.nii.gz"]
    words = ("fits 2 images", "no image below", "Excel has rounded")
    for problem, row, expected in zip(scan.problems, (3, 4, 5), words, strict=True):
        assert problem.row == row and expected in problem.problem and problem.remedy


def test_a_folder_of_slices_is_an_image_and_an_empty_one_is_not(folder):
    for name in ("series", "empty"):
        (folder / name).mkdir()
    (folder / "series" / "1.dcm").touch()
    scan = scan_caption_table(table(folder, "image_path,answer\nseries,Normal.\nempty,Normal.\n"))
    assert [row.image_path.name for row in scan.rows] == ["series"] and scan.problems[0].row == 3


def test_pandas_is_imported_by_the_first_table_only():
    command = "import sys, data.tables.caption_table; sys.exit('pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], cwd=Path(__file__).parents[3], check=True, timeout=120)


# ---------------------------------------------------------------- reports


def test_chinese_columns_of_a_hospital_export_become_a_four_section_report(folder):
    text = "序号,影像路径,患者编号,所见,结论,建议,病理倾向\n1,a.nii.gz,P7,右肺上叶见结节。,右肺上叶结节,随访,良性\n"
    scan = scan_caption_table(table(folder, text))
    assert scan.rows[0].answer == "所见：右肺上叶见结节。结论：右肺上叶结节。建议：随访。病理倾向：良性。"
    assert scan.rows[0].patient == "P7" and scan.rows[0].question == "" and scan.problems == []
    assert "column '所见' is taken as findings" in scan.notes


@pytest.mark.parametrize(
    ("sections", "report"),
    [
        ({"findings": "所见：双肺清晰！", "impression": " 结论: 未见异常"}, "所见：双肺清晰！结论：未见异常。"),
        ({"findings": "Clear lungs", "impression": "Normal."}, "Findings: Clear lungs. Impression: Normal."),
        ({"recommendation": "CT", "tendency": "benign"}, "Recommendation: CT. Pathology tendency: benign."),
        ({"findings": "", "impression": "结论："}, ""),
    ],
)
def test_sections_keep_their_own_stops_and_headings_and_english_gets_english_ones(sections, report):
    assert join_sections(sections) == report


def test_an_empty_section_is_reported_and_an_empty_report_refused(folder):
    scan = scan_caption_table(table(folder, "image,findings,impression\na.nii.gz,Clear.,\nb.nii.gz,,\n"))
    assert [(p.row, p.fatal) for p in scan.problems] == [(2, False), (3, True)]
    assert "no impression" in scan.problems[0].problem and "'answer' is empty" in scan.problems[1].problem
    assert [row.answer for row in scan.rows] == ["Findings: Clear."]


def test_a_whole_report_wins_over_its_sections_and_that_is_reported(folder):
    scan = scan_caption_table(table(folder, "path,image,report,findings\nb.nii.gz,a.nii.gz,Whole.,Part.\n"))
    assert scan.rows[0].answer == "Whole." and scan.rows[0].image_path.name == "a.nii.gz"
    assert any("'path'" in note and "not used" in note for note in scan.notes)


def test_a_column_of_reports_with_less_text_than_the_sections_is_not_the_report(folder):
    text = "影像路径,检查所见,诊断意见,报告\na.nii.gz,右肺上叶见结节。,右肺上叶结节。,已审核\n"
    scan = scan_caption_table(table(folder, text))
    assert scan.rows[0].answer == "所见：右肺上叶见结节。结论：右肺上叶结节。"
    assert any("not used: '报告'; the report is in '检查所见', '诊断意见'" in note for note in scan.notes)
    assert not any("'报告' is taken" in note for note in scan.notes)


def test_a_hint_is_an_impression_and_a_path_may_stand_in_quotes(folder):
    scan = scan_caption_table(table(folder, '影像路径,所见,提示\n"""a.nii.gz""",右肺上叶见结节。,右肺结节\n'))
    assert scan.rows[0].answer == "所见：右肺上叶见结节。结论：右肺结节。" and not scan.problems


WRAPPED = {
    "No evidence of effusion or\npneumothorax. A nodule in the\nright upper lobe measuring\n8 mm.": (
        "No evidence of effusion or pneumothorax. A nodule in the right upper lobe measuring 8 mm."
    ),
    "双肺未见明显\r\n结节及实变影。\r\n纵隔未见异常。": "双肺未见明显结节及实变影。\n纵隔未见异常。",
    "双侧胸廓对称，气管居中，双肺纹理清晰，右肺见结节，大小约1\n2mm，边缘光滑。\n结论：结节。": (
        "双侧胸廓对称，气管居中，双肺纹理清晰，右肺见结节，大小约12mm，边缘光滑。\n结论：结节。"
    ),
}
LISTS = [
    "1. 右肺上叶结节\n2. 左侧胸腔积液",
    "右肺上叶结节\n左侧胸腔积液",
    "Lungs: clear\nPleura: no effusion.",
    "右肺结节。\n\n结论：结节。",
    "双肺纹理增多明显\n右肺上叶结节",
    "Pleural effusion, left\nNodule, right upper lobe",
]


@pytest.mark.parametrize(("text", "joined"), [*WRAPPED.items(), *((text, text) for text in LISTS)])
def test_lines_broken_inside_sentences_are_joined_and_lists_are_not(folder, text, joined):
    quoted = text.replace('"', '""')
    scan = scan_caption_table(table(folder, f'image_path,answer\na.nii.gz,"{quoted}"\n'))
    assert scan.rows[0].answer == joined
    assert any("lines are joined" in note for note in scan.notes) == (text != joined)


def test_line_ends_of_windows_are_not_called_broken_lines(folder):
    scan = scan_caption_table(table(folder, 'image_path,answer\na.nii.gz,"所见：双肺清晰。\r\n结论：正常。"\n'))
    assert scan.rows[0].answer == "所见：双肺清晰。\n结论：正常。" and not scan.notes


def test_a_history_is_said(folder):
    scan = scan_caption_table(table(folder, 'image_path,answer\na.nii.gz,"INDICATION: nodule.\nFINDINGS: Clear."\n'))
    assert any(note.startswith("1 report(s) have a history") for note in scan.notes)


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


# ---------------------------------------------------------------- prompts and questions


def test_prompts_are_read_and_stripped(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps({"caption_prompt": [" 描述影像。", "Report?"], "other": 1}), encoding="utf-8-sig")
    assert read_prompts(path) == ["描述影像。", "Report?"]


def row(number: int, question: str = "") -> CaptionRow:
    return CaptionRow(number, Path(f"case_{number}.nii.gz"), question, "Normal.", None)


def test_own_question_comes_first_and_a_row_without_any_is_named():
    assert question_of(row(2, "Own?"), ["Other?"], seed=0) == question_of(row(2, "Own?"), [], seed=0) == "Own?"
    with pytest.raises(InputError, match=r"row 5 \(case_5.nii.gz\) has no question.*caption_prompt_json"):
        question_of(row(5), [], seed=0)


def test_drawn_question_depends_on_seed_and_row_and_nothing_else():
    prompts = [f"Question {i}?" for i in range(8)]
    drawn = [[question_of(row(number), prompts, seed) for number in range(2, 34)] for seed in (0, 42)]
    assert drawn[0] != drawn[1] and len(set(drawn[0])) > 4, "rows differ"
    # Recorded: another release of Python, or another machine, must draw the same.
    assert drawn[1][:4] == [prompts[i] for i in [3, 4, 0, 7]]
