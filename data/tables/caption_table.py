"""Tables of image and report, one case a row, in whatever way people keep them; and prompt JSON.

The plain form is ``image_path,question,answer[,mask_path]`` (RadFM's). Other names of these columns are known
(``columns``), findings and impression in columns of their own are joined into the four-section report, and
a number of an examination stands for its file (:mod:`data.tables.image_index`).
Nothing is dropped in silence: one bad row refuses the table and names the row.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from config.errors import InputError
from config.schema import resolve_path
from data.checks.problems import Level, Problem
from data.imaging.reader import SUFFIXES
from data.phantom.wording import WORDINGS
from data.tables.columns import SECTIONS, find_columns
from data.tables.image_index import ImageIndex
from data.tables.table_reader import read_table

logger = logging.getLogger(__name__)

_PLAIN = "image_path,question,answer[,mask_path]"
_NOT_FOUND = "mend the row, or set image_root / path_map in the configuration"
_SCIENTIFIC = re.compile(r"\d(\.\d+)?E\+\d+", re.IGNORECASE)
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_STOPS = "。.！!？?；;"


@dataclass(frozen=True)
class CaptionRow:
    """One row, its paths made absolute. ``number`` is the line a spreadsheet shows (header = 1).

    ``image_path`` may be the folder of a DICOM series. ``patient`` is empty where the table names none.
    """

    number: int
    image_path: Path
    question: str
    answer: str
    mask_path: Path | None
    patient: str = ""


@dataclass(frozen=True)
class TableScan:
    """A table read to its end: the rows that can be used, every problem, and how the columns were understood."""

    path: Path
    rows: list[CaptionRow]
    problems: list[Problem]
    notes: list[str] = field(default_factory=list)


def read_caption_table(
    path: Path, *, image_root: Path | None = None, path_map: dict[str, str] | None = None
) -> list[CaptionRow]:
    """Read and check a table; every image and mask must exist.

    Args:
        path: .csv (UTF-8, UTF-16 or GBK), .xlsx, .json or .jsonl.
        image_root: where relative paths start and examination numbers are looked up; the table's folder if ``None``.
        path_map: prefixes of another machine, see ``config/paths.yaml``.

    Raises:
        InputError: a missing file, column, cell or image; names the table and the row.
    """
    scan = scan_caption_table(path, image_root=image_root, path_map=path_map)
    for note in scan.notes:
        logger.info("%s: %s", path, note)
    problems = [problem for problem in scan.problems if problem.fatal]
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more problems in this table)" if len(problems) > 1 else ""
        remedy = first.remedy or "mend the row"
        raise InputError(
            f"{path}, row {first.row}: {first.problem}{more}; {remedy}; scripts/check_data.py lists all at once"
        )
    return scan.rows


def scan_caption_table(
    path: Path, *, image_root: Path | None = None, path_map: dict[str, str] | None = None
) -> TableScan:
    """As :func:`read_caption_table`, but a bad row is a problem in the list and not the end.

    Raises:
        InputError: the table itself cannot be read, has no image or no report column, or no rows.
    """
    if not path.is_file():
        raise InputError(
            f"table not found: {path}; set caption_csv_train / caption_csv_val in the configuration{_hint(path)}"
        )
    table = read_table(path)
    if table.problems and not table.rows:
        return TableScan(path, [], sorted(table.problems), table.notes)
    roles, notes = find_columns(table.columns)
    listed = " ".join(",".join(table.columns).split())[:300]
    if "image_path" not in roles and "id" not in roles:
        raise InputError(
            f"{path} has no column 'image_path' (nor a number of the examination); found {listed}; {_form()}"
        )
    if "answer" not in roles and not any(section in roles for section in SECTIONS):
        raise InputError(f"{path} has no column 'answer' (nor findings or impression); found {listed}; {_form()}")
    if not table.rows:
        raise InputError(f"{path} has a header but no rows; expected one case a row")
    base = image_root or path.parent
    files = _Files(base, path_map, ImageIndex(base))
    rows: list[CaptionRow] = []
    problems = list(table.problems)
    for number, cells in table.rows:
        named = {role: cells.get(column, "").strip() for role, column in roles.items()}
        row, found = _row(number, named, files)
        problems += found
        if row is not None:
            rows.append(row)
    return TableScan(path, rows, sorted(problems), [*table.notes, *notes])


@dataclass(frozen=True)
class _Files:
    base: Path
    path_map: dict[str, str] | None
    index: ImageIndex

    def image(self, cell: str, number: str) -> tuple[Path | None, str, str]:
        """The image that a row names; else why not, and what to do."""
        path = resolve_path(cell, self.base, self.path_map) if cell else None
        if path is not None and _exists(path):
            return path, "", ""
        is_number = path is None or not ("/" in cell or "\\" in cell or cell.lower().endswith(SUFFIXES))
        wanted = cell or number
        if is_number and len(wanted) < 100:
            if _SCIENTIFIC.fullmatch(wanted):
                return (
                    None,
                    f"'{wanted}' is a number that Excel has rounded",
                    "format the column as text, enter it again",
                )
            fits = self.index.find(wanted)
            if len(fits) == 1:
                return fits[0], "", ""
            if fits:
                listed = ", ".join(str(fit) for fit in fits[:3])
                return (
                    None,
                    f"'{wanted}' fits {len(fits)} images ({listed})",
                    "write the file's path, or narrow image_root",
                )
            if path is None:
                return (
                    None,
                    f"no image below {self.base} is named '{wanted}'",
                    "set image_root, or write the file's path",
                )
        return None, f"file not found: {path}", _NOT_FOUND

    def mask(self, cell: str) -> Path:
        return resolve_path(cell, self.base, self.path_map)


def _row(number: int, cells: dict[str, str], files: _Files) -> tuple[CaptionRow | None, list[Problem]]:
    """The row, or None where a problem is fatal; and its problems."""
    named = cells.get("image_path", "") or cells.get("id", "")
    problems = []

    def note(problem: str, remedy: str = "", level: Level = "error") -> None:
        problems.append(Problem(number, problem, remedy, str(image or named), level))

    image: Path | None = None
    if not named:
        note("'image_path' is empty")
    else:
        image, problem, remedy = files.image(cells.get("image_path", ""), cells.get("id", ""))
        if image is None:
            note(problem, remedy)
    mask = files.mask(cells["mask_path"]) if cells.get("mask_path") else None
    if mask is not None and not _exists(mask):
        note(f"file not found: {mask}", _NOT_FOUND)
    answer, missing = _answer(cells)
    if not answer:
        note("'answer' is empty")
    elif missing:
        note(f"the report has no {' and no '.join(missing)}", "fill the cell in, if the report has it", "warning")
    for name, text in (("question", cells.get("question", "")), ("answer", answer)):
        problem = text_problem(text)
        if problem:
            note(f"'{name}' {problem}", "correct the text in the table, or export it again")
    if any(problem.fatal for problem in problems):
        return None, problems
    return CaptionRow(number, image, cells.get("question", ""), answer, mask, cells.get("patient", "")), problems


def text_problem(text: str) -> str:
    """Why a text cannot be trained on, or an empty text."""
    bad = _CONTROL.search(text)
    if bad:
        return f"holds a character that is no text (U+{ord(bad[0]):04X})"
    if "\ufffd" in text or "锟斤拷" in text:
        return "holds characters that were lost in a conversion of its encoding"
    return ""


def _answer(cells: dict[str, str]) -> tuple[str, list[str]]:
    """The report, and which of its sections (those with a column) are empty."""
    if "answer" in cells:
        return cells["answer"], []
    given = {section: cells[section] for section in SECTIONS if section in cells}
    missing = [section for section in ("findings", "impression") if section in given and not given[section]]
    return join_sections({section: text for section, text in given.items() if text}), missing


def join_sections(sections: dict[str, str]) -> str:
    """``所见：…。结论：…。建议：…。病理倾向：…。``, or in English where no text is Chinese; empty ones are left out."""
    chinese = any("\u4e00" <= character <= "\u9fff" for text in sections.values() for character in text)
    wording = WORDINGS["zh" if chinese else "en"]
    parts = []
    for section, heading in zip(SECTIONS, wording.headings, strict=True):
        text = re.sub(rf"^\s*{heading}\s*[:：]", "", sections.get(section, ""), flags=re.IGNORECASE).strip()
        if text:
            parts.append(
                wording.section.format(heading=heading, text=text) + ("" if text[-1:] in _STOPS else wording.stop)
            )
    return wording.space.join(parts)


def _exists(path: Path) -> bool:
    """A file, or a folder that holds something. False also for what cannot be a path, such as a report."""
    try:
        return path.is_file() or (path.is_dir() and any(path.iterdir()))
    except (OSError, ValueError):  # a name that is too long, or has a zero byte
        return False


def _form() -> str:
    return f"expected {_PLAIN}"


def _hint(path: Path) -> str:
    return "; the synthetic data set is made by: python scripts/quickstart.py" if "quickstart" in path.parts else ""


def read_prompts(path: Path) -> list[str]:
    """The list under ``caption_prompt`` of a prompt JSON.

    Raises:
        InputError: missing, not JSON, or no list of texts under that key.
    """
    if not path.is_file():
        raise InputError(f"prompt file not found: {path}; set caption_prompt_json in the configuration{_hint(path)}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON in UTF-8: {error}") from error
    prompts = content.get("caption_prompt") if isinstance(content, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f'{path}: expected {{"caption_prompt": ["question", ...]}} with at least one question')
    return [prompt.strip() for prompt in prompts]


def question_of(row: CaptionRow, prompts: Sequence[str], seed: int) -> str:
    """The row's question, else one drawn from ``prompts``: the same for the same seed and row.

    Raises:
        InputError: the row has none and there are no prompts.
    """
    if row.question:
        return row.question
    if not prompts:
        raise InputError(
            f"row {row.number} ({row.image_path.name}) has no question: fill it in, or set caption_prompt_json"
        )
    return random.Random(f"{seed}/{row.number}").choice(list(prompts))
