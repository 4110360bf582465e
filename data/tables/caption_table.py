"""Tables of images and reports, one case a row, and the prompt JSON.

The standard form is ``image_path,question,answer[,mask_path]`` (RadFM's). ``columns`` lists other names of these
columns, ``image_index`` the file of an examination number. Sections in separate columns are joined into one report.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config.errors import InputError
from data.checks.problems import Problem, from_error, raise_errors
from data.imaging.reader import SUFFIXES
from data.report_language.sections import HEADINGS, HISTORY, SECTIONS, split_sections, unwrapped
from data.tables.columns import find_columns
from data.tables.image_index import ImageIndex
from data.tables.table_reader import decode, read_table

logger = logging.getLogger(__name__)

PathMap = dict[str, str]
NAMED_BY = "caption_csv_train / caption_csv_val in the configuration"
_EXPECTED = "expected image_path,question,answer[,mask_path]"
_NOT_FOUND = "fix the row, or set image_root / path_map in the configuration"
_SCIENTIFIC = re.compile(r"\d(\.\d+)?E\+\d+", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_STOPS = "。.！!？?；;"


@dataclass(frozen=True)
class CaptionRow:
    """One row, its paths made absolute."""

    number: int  # of the row as a spreadsheet shows it (header = 1)
    image_path: Path  # may be the folder of a DICOM series
    question: str
    answer: str
    mask_path: Path | None
    patient: str = ""


@dataclass(frozen=True)
class TableScan:
    """The usable rows of a table, all its problems, and notes on how it was read."""

    rows: list[CaptionRow]
    problems: list[Problem]
    notes: list[str]


def read_caption_table(path: Path, image_root: Path | None = None, path_map: PathMap | None = None) -> list[CaptionRow]:
    """As :func:`scan_caption_table`, for a table in which every row must be good. Raises InputError for a missing file,
    column, cell or image; it names the table and the row."""
    scan = scan_caption_table(path, image_root, path_map)
    for note in scan.notes:
        logger.info("%s: %s", path, note)
    raise_errors(scan.problems, path)
    return scan.rows


def scan_caption_table(
    path: Path, image_root: Path | None = None, path_map: PathMap | None = None, named_by: str = NAMED_BY
) -> TableScan:
    """Read a table and check that its images and masks exist; a bad row is a problem of the result.

    Args:
        path: .csv (UTF-8, UTF-16 or GBK), .xlsx, .json or .jsonl.
        image_root: where relative paths start and examination numbers are looked up; the table's folder if ``None``.
        path_map: prefixes of another machine, see ``config/paths.yaml``.
        named_by: the flag or key that ``path`` came from, for the message where there is no such file.

    Raises InputError where the table itself cannot be read, has no image or no report column, or no rows.
    """
    _require(path, "table", named_by)
    table = read_table(path)
    if table.problems and not table.rows:
        return TableScan([], table.problems, table.notes)
    roles, notes = find_columns(table.columns)
    found = f"found {' '.join(','.join(table.columns).split())[:300]}; {_EXPECTED}"
    if "image_path" not in roles and "id" not in roles:
        raise InputError(f"{path} has no column 'image_path' (nor a number of the examination); {found}")
    if "answer" not in roles and not roles.keys() & SECTIONS:
        raise InputError(f"{path} has no column 'answer' (nor findings or impression); {found}")
    if not table.rows:
        raise InputError(f"{path} has a header but no rows; expected one case a row")
    roles, notes = _without_doubles(roles, notes, table.rows)
    index = ImageIndex(image_root or path.parent, path_map)
    rows, problems = [], list(table.problems)
    for number, cells in table.rows:
        row, of_row = _row(number, {role: cells.get(name, "").strip() for role, name in roles.items()}, index)
        problems += of_row
        rows += [row] if row else []
    return TableScan(rows, sorted(problems), [*table.notes, *notes, *_of_reports(rows, table.rows, roles)])


def _without_doubles(
    roles: dict[str, str], notes: list[str], rows: Sequence[tuple[int, dict[str, str]]]
) -> tuple[dict[str, str], list[str]]:
    """Roles and notes, where whole reports and sections stand in columns of their own, of those with more text."""
    parts = [role for role in SECTIONS if role in roles]
    if "answer" not in roles or not parts:
        return roles, notes
    whole, of_parts = (
        sum(len(cells.get(roles[role], "")) for _, cells in rows for role in of) for of in (["answer"], parts)
    )
    dropped = ["answer"] if of_parts > whole else parts
    names = [f"'{roles[role]}'" for role in dropped]
    kept = [f"'{roles[role]}'" for role in ("answer", *parts) if role in roles and role not in dropped]
    notes = [note for note in notes if not any(note.startswith(f"column {name} is taken") for name in names)]
    notes.append(f"not used: {', '.join(names)}; the report is in {', '.join(kept)}, with more text")
    return {role: name for role, name in roles.items() if role not in dropped}, notes


def _of_reports(
    rows: Sequence[CaptionRow], cells: Sequence[tuple[int, dict[str, str]]], roles: dict[str, str]
) -> list[str]:
    """What is to be known of the reports' text."""
    notes = []
    given = dict(cells)
    lines = [(row.answer, given[row.number][roles["answer"]].strip()) for row in rows] if "answer" in roles else []
    if joined := sum(len(now.splitlines()) < len(cell.splitlines()) for now, cell in lines):
        notes.append(f"{joined} report(s) are broken into lines inside sentences: their lines are joined")
    if with_history := sum(any(part.name == HISTORY for part in split_sections(row.answer)) for row in rows):
        notes.append(
            f"{with_history} report(s) have a history, an indication or a technique, which no image shows and the "
            "model would learn to write; keep findings and impression alone"
        )
    return notes


def read_reports(path: Path) -> list[str]:
    """Reports without images: the lines of a .txt, or the report column (or columns of sections) of a table.

    Raises InputError: the file is missing, cannot be read, or holds no report.
    """
    _require(path, "reports", "--extra_reports")
    if path.suffix.lower() == ".txt":
        texts = decode(path)[0].splitlines()
    else:
        table = read_table(path)
        raise_errors(table.problems, path)
        roles, _ = find_columns(table.columns)
        rows = [{role: cells.get(name, "").strip() for role, name in roles.items()} for _, cells in table.rows]
        texts = [unwrapped(cells["answer"] if "answer" in cells else join_sections(cells)) for cells in rows]
    texts = [text.strip() for text in texts if text.strip()]
    if not texts:
        raise InputError(f"{path} holds no report: expected one a line (.txt), or a table with a column 'answer'")
    if problem := next(filter(None, map(text_problem, texts)), ""):
        raise InputError(f"{path}: a report {problem}; correct the text, or export it again")
    return texts


def _row(number: int, cells: dict[str, str], index: ImageIndex) -> tuple[CaptionRow | None, list[Problem]]:
    """``cells`` by role. The row, or None where a problem is fatal; and its problems."""
    found: list[Problem] = []
    image = None
    try:
        image = _image(cells.get("image_path", ""), cells.get("id", ""), index)
    except InputError as error:
        found.append(from_error(number, "", error))
    mask = index.path(cells["mask_path"]) if cells.get("mask_path") else None
    if mask and not _exists(mask):
        found.append(Problem(number, f"file not found: {mask}", _NOT_FOUND))
    answer = unwrapped(cells["answer"] if "answer" in cells else join_sections(cells))
    missing = [name for name in ("findings", "impression") if "answer" not in cells and cells.get(name) == ""]
    if not answer:
        found.append(Problem(number, "'answer' is empty", "fill it in"))
    elif missing:
        words = f"the report has no {' and no '.join(missing)}"
        found.append(Problem(number, words, "fill the cell in, if the report has it", level="warning"))
    question = cells.get("question", "")
    for name, text in (("question", question), ("answer", answer)):
        if problem := text_problem(text):
            found.append(Problem(number, f"'{name}' {problem}", "correct the text in the table, or export it again"))
    named = str(image or cells.get("image_path") or cells.get("id", ""))
    problems = [replace(problem, image=named) for problem in found]
    if image is None or any(problem.fatal for problem in problems):
        return None, problems
    return CaptionRow(number, image, question, answer, mask, cells.get("patient", "")), problems


def _image(cell: str, number: str, index: ImageIndex) -> Path:
    """The image at the path in ``cell``, else the one with that number. Raises InputError: ``problem; remedy``."""
    path, wanted = index.path(cell), cell or number
    if cell and _exists(path):
        return path
    if not wanted:
        raise InputError("'image_path' is empty; fill it in")
    is_path = "/" in cell or "\\" in cell or cell.lower().endswith(SUFFIXES)
    if not is_path and _SCIENTIFIC.fullmatch(wanted):
        raise InputError(f"'{wanted}' is a number that Excel has rounded; format the column as text, enter it again")
    fits = [] if is_path else index.find(wanted)
    if len(fits) == 1:
        return fits[0]
    if fits:
        listed = f"'{wanted}' fits {len(fits)} images ({', '.join(map(str, fits[:3]))})"
        raise InputError(f"{listed}; write the file's path, or narrow image_root")
    if cell:
        raise InputError(f"file not found: {path}; {_NOT_FOUND}")
    raise InputError(f"no image below {index.root} is named '{wanted}'; set image_root, or write the file's path")


def _exists(path: Path) -> bool:
    """A file, or a folder with content. False also for what cannot be a path, such as a report."""
    try:
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    except (OSError, ValueError):  # a name that is too long, or has a zero byte
        return False


def text_problem(text: str) -> str:
    """Why a text cannot be trained on, or an empty text."""
    if bad := _CONTROL.search(text):
        return f"holds a character that is no text (U+{ord(bad[0]):04X})"
    if "\ufffd" in text or "锟斤拷" in text:
        return "holds characters that were lost in a conversion of its encoding"
    return ""


def join_sections(sections: dict[str, str]) -> str:
    """``所见：…。结论：…。建议：…。病理倾向：…。``, or in English where no text is Chinese; empty ones are left out."""
    chinese = re.search("[\u4e00-\u9fff]", "".join(sections.get(name, "") for name in SECTIONS)) is not None
    colon, stop, space = ("：", "。", "") if chinese else (": ", ".", " ")
    parts = []
    for section, heading in zip(SECTIONS, HEADINGS["zh" if chinese else "en"], strict=True):
        text = re.sub(rf"^\s*{heading}\s*[:：]", "", sections.get(section, ""), flags=re.IGNORECASE).strip()
        parts += [f"{heading}{colon}{text}{'' if text[-1] in _STOPS else stop}"] if text else []
    return space.join(parts)


def _require(path: Path, what: str, named_by: str) -> None:
    if not path.is_file():
        shipped = "quickstart" in path.parts  # as in the configuration of a fresh clone
        hint = "; the synthetic data set is made by: python scripts/quickstart.py" if shipped else ""
        raise InputError(f"{what} not found: {path}; set {named_by} to an existing file{hint}")


def read_prompts(path: Path) -> list[str]:
    """The list under ``caption_prompt`` of a prompt JSON. Raises InputError where there is none, or no such file."""
    _require(path, "prompt file", "caption_prompt_json in the configuration")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path} is not JSON in UTF-8: {error}") from error
    prompts = content.get("caption_prompt") if isinstance(content, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f'{path}: expected {{"caption_prompt": ["question", ...]}} with at least one question')
    return [prompt.strip() for prompt in prompts]


def question_of(row: CaptionRow, prompts: Sequence[str], seed: int) -> str:
    """The row's question, else one drawn from ``prompts``: the same for the same seed and row. Raises InputError where
    there is neither."""
    if row.question:
        return row.question
    if not prompts:
        where = f"row {row.number} ({row.image_path.name})"
        raise InputError(f"{where} has no question: fill it in, or set caption_prompt_json")
    return random.Random(f"{seed}/{row.number}").choice(list(prompts))
