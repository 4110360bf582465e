"""Tables as people keep them: CSV from Excel in any of its encodings, .xlsx, JSON and JSONL; cells as text.

The row is counted as the spreadsheet shows it (header = 1): a report may span several lines of a CSV, and a blank
line is a row that is skipped. A JSON list counts its entries from 1, JSONL its lines.
"""

from __future__ import annotations

import csv
import datetime
import io
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree.ElementTree import ParseError

from config.errors import InputError
from data.checks.problems import Problem
from data.tables.instruction_file import read_instructions

_CJK = re.compile("[\u4e00-\u9fff]")
_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_MAX_UNPACKED = 1 << 29  # 512 MB of XML; a workbook of ten thousand reports has some megabytes
_QUOTING = (
    "a text with a comma, a line break or a quotation mark stands between quotation marks, and one inside it is doubled"
)


@dataclass(frozen=True)
class Table:
    """``rows``: number and cells by column; ``notes``: how the file was read; ``problems``: rows left out."""

    columns: list[str]
    rows: list[tuple[int, dict[str, str]]]
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_table(path: Path) -> Table:
    """Read ``path`` by its suffix: .csv, .tsv, .txt, .xlsx, .xlsm, .json or .jsonl.

    Raises:
        InputError: missing, of another kind, not decodable, or without a header.
    """
    if not path.is_file():
        raise InputError(f"table not found: {path}")
    suffix = path.suffix.lower()
    if suffix in (".xlsx", ".xlsm"):
        return _from_cells(path, *_workbook(path))
    if suffix == ".xls":
        raise InputError(f"{path}: the old .xls format is not read; save it as .xlsx or as 'CSV UTF-8' in Excel")
    text, notes = decode(path)
    if suffix in (".json", ".jsonl"):
        columns, records, problems = read_instructions(path, text)
        return Table(columns, records, notes, problems)
    return _from_cells(path, _csv_rows(path, text), notes)


def decode(path: Path) -> tuple[str, list[str]]:
    """Text of a file in UTF-8, UTF-16 or GB18030 (which holds GBK), and a note where it is not UTF-8.

    Raises InputError for anything else: a guess that garbles a report is worse than none.
    """
    content = path.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return _decode_utf16(path, content, "utf-16"), ["read as UTF-16"]
    if content[:200].count(0) > len(content[:200]) // 4:  # without a mark: every other byte of ASCII is zero
        encoding = "utf-16-le" if content[1:2] == b"\0" else "utf-16-be"
        return _decode_utf16(path, content, encoding), ["read as UTF-16"]
    try:
        return content.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        damage = error
    line = content[: damage.start].count(b"\n") + 1
    # GB18030 decodes nearly every byte string. It is believed only where the bytes are not UTF-8 with a flaw,
    # and where what comes out are characters in common use, all but a few.
    as_utf8 = len(_CJK.findall(content.decode("utf-8", "ignore")))
    flaws = content.decode("utf-8", "replace").count("\ufffd")
    if as_utf8 <= flaws:
        try:
            text = content.decode("gb18030")
        except UnicodeDecodeError:
            text = ""
        foreign = [character for character in text if character > "\x7f"]
        common = sum(_is_common(character) for character in foreign)
        if foreign and common >= 0.95 * len(foreign):
            return text, ["read as GBK"]
    raise InputError(
        f"{path} is neither UTF-8 nor GBK text (line {line}): it is damaged there, or in another encoding; "
        "save it as 'CSV UTF-8' in Excel"
    )


def _decode_utf16(path: Path, content: bytes, encoding: str) -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is damaged UTF-16 text ({error.reason}); save it as 'CSV UTF-8' in Excel") from error


def _is_common(character: str) -> bool:
    try:
        character.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def _csv_rows(path: Path, text: str) -> list[list[str]]:
    """Cells of every line. The separator is a comma, or what stands in the header instead of one."""
    header = text.lstrip("\ufeff\r\n").partition("\n")[0]
    delimiter = "," if "," in header else max("\t;", key=header.count)
    # Strict, because a quotation mark that is never closed would swallow the rows after it in silence.
    reader = csv.reader(io.StringIO(text.lstrip("\ufeff"), newline=""), strict=True, delimiter=delimiter)
    rows: list[list[str]] = []
    try:
        rows.extend(reader)
    except csv.Error as error:
        raise InputError(f"{path} is not a readable CSV at row {len(rows) + 1}: {error}; {_QUOTING}") from error
    return rows


def _workbook(path: Path) -> tuple[list[list[str]], list[str]]:
    """Cells of the one sheet that has any. Raises InputError for several, or a file that is no workbook."""
    import openpyxl

    try:
        with zipfile.ZipFile(path) as packed:
            unpacked = sum(member.file_size for member in packed.infolist())
        if unpacked > _MAX_UNPACKED:
            raise InputError(
                f"{path}: unpacks to {unpacked >> 20} MB, more than a table of reports; save it as CSV UTF-8"
            )
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            sheets = {}
            for sheet in book.worksheets:
                rows = [[_cell(value) for value in row] for row in sheet.iter_rows(values_only=True)]
                if any(any(row) for row in rows):
                    sheets[sheet.title] = rows
        finally:
            book.close()
    except (zipfile.BadZipFile, ParseError, KeyError, ValueError, TypeError, OSError, EOFError, AttributeError,
            IndexError, NotImplementedError, RuntimeError, zipfile.zlib.error) as error:  # fmt: skip
        if isinstance(error, InputError):
            raise
        detail = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a readable workbook ({detail}); save it again, or as 'CSV UTF-8'") from error
    if len(sheets) > 1:
        raise InputError(
            f"{path}: {len(sheets)} sheets have cells ({', '.join(sheets)}); keep one, or save it as CSV UTF-8"
        )
    return next(iter(sheets.values()), []), []


def _cell(value: object) -> str:
    """Text as Excel shows it: a whole number without '.0', Excel's '_x000D_' for a line break undone."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    return re.sub("_x000[dD]_\n?", "\n", str(value))


def _from_cells(path: Path, rows: list[list[str]], notes: list[str]) -> Table:
    header = [name.strip() for name in rows[0]] if rows else []
    if not any(header):
        raise InputError(f"{path} is empty; expected a header: image_path,question,answer[,mask_path]")
    for name in header:
        if name and header.count(name) > 1:
            raise InputError(f"{path} has two columns '{' '.join(name.split())[:100]}'; keep one")
    problems = []
    records = []
    for number, cells in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in cells):
            continue  # a blank line is no row, yet a spreadsheet counts it
        if any(cell.strip() for cell in cells[len(header) :]):
            problems.append(
                Problem(number, f"{len(cells)} cells under {len(header)} columns", f"put quotation marks: {_QUOTING}")
            )
            continue
        records.append((number, dict(zip(header, cells, strict=False))))
    return Table([name for name in header if name], records, notes, problems)
