"""RadFM-style tables: ``image_path,question,answer[,mask_path]``, one case a row, and prompt JSON.

Nothing is dropped in silence: one bad row refuses the table and names the row.
"""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from config.errors import InputError
from config.schema import resolve_path

REQUIRED = ("image_path", "question", "answer")
OPTIONAL = ("mask_path",)


@dataclass(frozen=True)
class CaptionRow:
    """One row, its paths made absolute. ``number`` is the line a spreadsheet shows (header = 1)."""

    number: int
    image_path: Path
    question: str
    answer: str
    mask_path: Path | None


def read_caption_table(
    path: Path, *, image_root: Path | None = None, path_map: dict[str, str] | None = None
) -> list[CaptionRow]:
    """Read and check a table; every image and mask must exist.

    Args:
        path: CSV in UTF-8 (a byte-order mark, as Excel writes it, is fine).
        image_root: where relative paths start; the table's own folder if ``None``.
        path_map: prefixes of another machine, see ``config/paths.yaml``.

    Raises:
        InputError: a missing file, column, cell or image; names the table and the row.
    """
    if not path.is_file():
        raise InputError(
            f"table not found: {path}; set caption_csv_train / caption_csv_val in the configuration{_hint(path)}"
        )
    base = image_root or path.parent
    rows: list[CaptionRow] = []
    problems: list[str] = []
    for number, record in _records(path):
        cells = {name: record.get(name, "").strip() for name in REQUIRED + OPTIONAL}
        for name in ("image_path", "answer"):
            if not cells[name]:
                problems.append(f"row {number}: '{name}' is empty")
        image = resolve_path(cells["image_path"], base, path_map)
        mask = resolve_path(cells["mask_path"], base, path_map) if cells["mask_path"] else None
        for file in (image, mask):
            if cells["image_path"] and file is not None and not _is_file(file):
                problems.append(f"row {number}: file not found: {file}")
        rows.append(CaptionRow(number, image, cells["question"], cells["answer"], mask))
    if not rows:
        raise InputError(f"{path} has a header but no rows; expected one case a row")
    if problems:
        more = f" (and {len(problems) - 1} more problems in this table)" if len(problems) > 1 else ""
        raise InputError(
            f"{path}, {problems[0]}{more}; mend the row, or set image_root / path_map in the configuration"
        )
    return rows


def _records(path: Path) -> list[tuple[int, dict[str, str]]]:
    """Row number and cells by column. The row is counted, not the line: a report may span several lines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (line {error.object[: error.start].count(10) + 1}): "
            "save it as 'CSV UTF-8' in Excel"
        ) from error
    # Strict, because a quotation mark that is never closed would swallow the rows after it in silence.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[list[str]] = []
    try:
        rows.extend(reader)
    except csv.Error as error:
        raise InputError(
            f"{path} is not a readable CSV at row {len(rows) + 1}: {error}; a text with a comma, a line break or a "
            "quotation mark stands between quotation marks, and one inside it is doubled"
        ) from error
    header = [name.strip() for name in rows[0]] if rows else []
    if not any(header):
        raise InputError(f"{path} is empty; expected a header: {','.join(REQUIRED)}[,mask_path]")
    wrong = [f"no column '{name}'" for name in REQUIRED if name not in header]
    wrong += [f"two columns '{name}'" for name in REQUIRED + OPTIONAL if header.count(name) > 1]
    if wrong:
        raise InputError(f"{path} has {wrong[0]}; expected {','.join(REQUIRED)}[,mask_path], found {','.join(header)}")
    for number, cells in enumerate(rows, start=1):
        if any(cell.strip() for cell in cells[len(header) :]):
            raise InputError(
                f"{path}, row {number}: {len(cells)} cells under {len(header)} columns; "
                "put a text that contains commas between quotation marks"
            )
    # A blank line is no row, yet a spreadsheet counts it.
    return [(number, dict(zip(header, cells, strict=False))) for number, cells in enumerate(rows[1:], 2) if cells]


def _is_file(path: Path) -> bool:
    """False also for what cannot be a path at all, such as a report in the wrong column."""
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


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
