"""What is wrong with a row, in words for the person who made the table: one problem, one remedy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from config.errors import InputError

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, order=True)
class Problem:
    """A problem and its remedy, one line each."""

    row: int  # as a spreadsheet shows it, 0 for the table as a whole
    problem: str
    remedy: str = ""
    image: str = ""  # the file, or the cell that names it
    level: Level = "error"  # the row cannot be used; a warning may be an oversight, a note needs no action
    table: str = ""

    @property
    def fatal(self) -> bool:
        return self.level == "error"

    def __str__(self) -> str:
        where = f"row {self.row}: " if self.row else ""
        return f"{where}{self.problem}{'; ' if self.remedy else ''}{self.remedy}"


def from_error(row: int, image: object, error: Exception) -> Problem:
    """The problem of an InputError, whose text is ``FILE: problem; remedy``."""
    text = " ".join(str(error).split()).removeprefix(f"{image}: ")
    problem, _, remedy = text.rpartition("; ") if "; " in text else (text, "", "")
    return Problem(row, problem, remedy, str(image))


def raise_errors(problems: Iterable[Problem], table: object = "") -> None:
    """Raise InputError where a problem is fatal; its line names the first and counts the others."""
    fatal = [problem for problem in problems if problem.fatal]
    if not fatal:
        return
    first = fatal[0]
    place = ", ".join(part for part in (str(table), f"row {first.row}" if first.row else "") if part)
    more = f" (and {len(fatal) - 1} more problems)" if len(fatal) > 1 else ""
    remedy = f"{first.remedy}; " if first.remedy else ""
    begin = f"{place}: " if place else ""
    raise InputError(f"{begin}{first.problem}{more}; {remedy}scripts/check_data.py lists all at once")
