"""Tables as people keep them: CSV from Excel in any of its encodings, .xlsx, JSON and JSONL; every cell is text.

Rows are numbered as a spreadsheet shows them (header = 1): a report may span several lines of a CSV, and a blank line
counts as a row. Entries of a JSON list count from 1, lines of a JSONL file too.

JSON holds records with plain keys (``image``, ``report``, ...) or LLaVA's layout, where each question with its answer
is one row: ``{"image": FILE, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}``.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.errors import InputError
from data.checks.problems import Problem

if TYPE_CHECKING:
    import pandas as pd

_CJK = re.compile("[\u4e00-\u9fff]")
_MAX_MEGABYTES = 512  # of XML; a workbook of ten thousand reports has some
# Of pandas: no header, number or missing value is guessed.
_AS_TEXT = {"header": None, "dtype": str, "na_filter": False}
_SPARE_COLUMNS = 64  # read beyond the header: a comma outside quotation marks leaves text there
_QUOTING = "a text with a comma, a line break or a quotation mark stands between quotation marks, one inside is doubled"
_SPEAKERS = ("human", "user"), ("gpt", "assistant", "model")  # who asks, who answers
_RECORD = 'expected {"image": FILE, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'


@dataclass(frozen=True)
class Table:
    """``rows``: number and cells by column; ``notes``: how the file was read; ``problems``: rows left out."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    notes: list[str]
    problems: list[Problem]


def read_table(path: Path) -> Table:
    """Read ``path`` by its suffix: .csv, .tsv, .txt, .xlsx, .xlsm, .json or .jsonl.

    Raises InputError: of another kind, not decodable, or without a header.
    """
    suffix = path.suffix.lower()
    if suffix == ".xls":
        raise InputError(f"{path}: the old .xls format is not read; save it as .xlsx or as 'CSV UTF-8' in Excel")
    if suffix in (".xlsx", ".xlsm"):
        return _table(path, *_read_workbook(path))
    text, notes = decode(path)
    if suffix in (".json", ".jsonl"):
        return _read_records(path, text, notes)
    return _table(path, _read_csv(path, text), notes)


def decode(path: Path) -> tuple[str, list[str]]:
    """Text of a file in UTF-8, UTF-16 or GB18030 (a superset of GBK), and a note where it is not UTF-8.

    Raises InputError for any other encoding, because a wrong guess garbles the reports.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    if encoding == "utf-8-sig" and content[:200].count(0) > len(content[:200]) // 4:  # every other byte of ASCII is 0
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
    remedy = "save it as 'CSV UTF-8' in Excel"
    try:
        return content.decode(encoding), ["read as UTF-16"] if encoding.startswith("utf-16") else []
    except UnicodeDecodeError as error:
        if encoding.startswith("utf-16"):
            raise InputError(f"{path} is damaged UTF-16 text ({error.reason}); {remedy}") from error
        line = content[: error.start].count(b"\n") + 1
    # GB18030 decodes nearly any bytes: damaged UTF-8 is excluded, and 95 % of the characters must be common ones.
    as_utf8, as_gbk = content.decode("utf-8", "replace"), content.decode("gb18030", "replace")
    foreign = re.sub("[\x00-\x7f]", "", as_gbk)
    common = foreign.encode("gb2312", "ignore").decode("gb2312")
    damaged_utf8 = len(_CJK.findall(as_utf8)) > as_utf8.count("\ufffd")
    if damaged_utf8 or "\ufffd" in as_gbk or len(common) < 0.95 * len(foreign):
        damage = f"(line {line}): it is damaged there, or in another encoding"
        raise InputError(f"{path} is neither UTF-8 nor GBK text {damage}; {remedy}")
    return as_gbk, ["read as GBK"]


def _read_csv(path: Path, text: str) -> pd.DataFrame:
    """Cells of every row, NaN beyond its end. The separator is a comma, or a tab or semicolon where the header has no
    comma."""
    import pandas as pd

    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = "," if "," in header else max("\t;", key=header.count)
    layout = {"sep": delimiter, "names": range(header.count(delimiter) + 1 + _SPARE_COLUMNS), "index_col": False}
    try:
        # The Python engine refuses a quotation mark that is never closed. Its warning, unlike its error, has the row.
        with warnings.catch_warnings(action="error", category=pd.errors.ParserWarning):
            options = {"engine": "python", "on_bad_lines": "warn", "skip_blank_lines": False}
            return pd.read_csv(io.StringIO(text, newline=""), **layout, **options, **_AS_TEXT)
    except pd.errors.ParserWarning as warning:
        row, _, reason = str(warning).strip().removeprefix("Skipping line ").partition(": ")
        raise InputError(f"{path} is not a readable CSV at row {row}: {reason}; {_QUOTING}") from warning


def _read_workbook(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Cells of the only sheet that has any, and a note of merged ones. Raises InputError for several sheets, or a file
    that is no workbook."""
    import openpyxl
    import pandas as pd

    try:
        with zipfile.ZipFile(path) as packed:
            megabytes = sum(member.file_size for member in packed.infolist()) >> 20
        if megabytes > _MAX_MEGABYTES:
            words = f"unpacks to {megabytes} MB, more than a table of reports"
            raise InputError(f"{path}: {words}; save it as CSV UTF-8")
        workbook = pd.read_excel(path, sheet_name=None, engine="openpyxl", **_AS_TEXT)
        # Only a workbook read as a whole names its merged cells. Pandas reads another row by row: with a stray cell far
        # away it would walk through millions of empty ones of the whole.
        whole = openpyxl.load_workbook(path)
        sheets = {name: cells for name, cells in workbook.items() if not cells.empty}
        merged = [area for name in sheets for area in whole[name].merged_cells.ranges]
    except InputError:
        raise
    except Exception as error:  # openpyxl raises whatever damaged XML leads to
        detail = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a readable workbook ({detail}); save it again, or as 'CSV UTF-8'") from error
    if len(sheets) > 1:
        words = f"{len(sheets)} sheets have cells ({', '.join(sheets)})"
        raise InputError(f"{path}: {words}; keep one, or save it as CSV UTF-8")
    # Excel's errors (#N/A) are NaN; '_x000D_' is how it stores a carriage return.
    cells = next(iter(sheets.values()), pd.DataFrame()).fillna("").replace("_x000[dD]_\n?", "\n", regex=True)
    used, filled = (cells != "").any(axis=1), 0
    for area in merged:  # the text is in the first of them alone: the others' patient would be unknown
        column, first = area.min_col - 1, area.min_row - 1
        rows = [row for row in range(first + 1, min(area.max_row, len(cells))) if used[row]]
        if first > 0 and rows and column < cells.shape[1] and cells.iat[first, column]:  # first > 0: below the header
            cells.iloc[rows, column] = cells.iat[first, column]
            filled += len(rows)
    return cells, [f"merged cells: {filled} below the first take its text"] if filled else []


def _table(path: Path, cells: pd.DataFrame, notes: list[str]) -> Table:
    """``cells`` with the header first."""
    rows = [[cell for cell in row if isinstance(cell, str)] for row in cells.to_numpy().tolist()]
    header = [name.strip() for name in rows[0]] if rows else []
    if not any(header):
        raise InputError(f"{path} is empty; expected a header: image_path,question,answer[,mask_path]")
    for name in filter(None, header):
        if header.count(name) > 1:
            raise InputError(f"{path} has two columns '{' '.join(name.split())[:100]}'; keep one")
    table = Table([name for name in header if name], [], notes, [])
    for number, row in enumerate(rows[1:], start=2):
        if any(cell.strip() for cell in row[len(header) :]):
            words = f"{len(row)} cells under {len(header)} columns"
            table.problems.append(Problem(number, words, f"put quotation marks: {_QUOTING}"))
        elif any(cell.strip() for cell in row):
            table.rows.append((number, dict(zip(header, row, strict=False))))
    return table


def _read_records(path: Path, text: str, notes: list[str]) -> Table:
    """Rows of the JSON records, and a problem for each entry that is no record. Raises InputError for what is no JSON,
    or no list of records."""
    by_line = path.suffix.lower() == ".jsonl"
    entries, line = [], 0
    try:
        if by_line:
            for line, one in enumerate(text.split("\n"), start=1):
                entries += [(line, json.loads(one))] if one.strip() else []
        elif isinstance(content := json.loads(text), list):
            entries = list(enumerate(content, start=1))
    except (ValueError, RecursionError) as error:  # ValueError also for a number of more than 4300 digits
        where = f"line {line}: " if by_line else ""
        raise InputError(f"{path} is not JSON: {where}{error}; {_RECORD}") from error
    if not (by_line or isinstance(content, list)):
        keys = f" with the keys {', '.join(list(content)[:5])}" if isinstance(content, dict) else ""
        raise InputError(f"{path} holds a {type(content).__name__}{keys}, expected a list of records; {_RECORD}")
    rows, problems = [], []
    for number, record in entries:
        try:
            rows += [(number, row) for row in _record_rows(record)]
        except ValueError as error:
            image = str(record.get("image", "")) if isinstance(record, dict) else ""
            problems.append(Problem(number, str(error), _RECORD, image))
    return Table(list(dict.fromkeys(name for _, row in rows for name in row)), rows, notes, problems)


def _record_rows(record: object) -> list[dict[str, str]]:
    """One row per question and answer. Raises ValueError, with the reason, for what is no record."""
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not a record")
    plain = {key: _text(key, value) for key, value in record.items() if key not in ("conversations", "messages")}
    turns = record.get("conversations", record.get("messages"))
    if turns is None:
        return [plain]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'conversations' is no list of turns")
    texts: list[str] = []
    for turn in turns:
        speaker = str(turn.get("from", turn.get("role", ""))).lower()
        texts.append(turn.get("value", turn.get("content")))
        if not isinstance(texts[-1], str):
            raise ValueError(f"a turn of '{speaker}' has no text")
        if speaker == "system":
            texts.pop()
        elif speaker not in _SPEAKERS[(len(texts) - 1) % 2]:
            raise ValueError(f"a turn of '{speaker}' is out of turn")
    if not texts or len(texts) % 2:
        raise ValueError("a question has no answer")
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [{**plain, "question": ask.replace("<image>", "").strip(), "answer": answer} for ask, answer in pairs]


def _text(key: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]  # "image": ["one.nii.gz"]
    if isinstance(value, list) and key.lower() in ("image", "images"):
        raise ValueError(f"'{key}' names {len(value)} images, one is used")
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
