"""What is wrong with a row, in words for the person who made the table: one problem, one remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, order=True)
class Problem:
    """``row``: the row a spreadsheet shows, 0 for the table as a whole.

    ``image`` is the file or the cell that names it; ``problem`` and ``remedy`` are one line each.
    ``level``: with an error the row cannot be used; a warning may be an oversight; a note is only to be known.
    """

    row: int
    problem: str
    remedy: str = ""
    image: str = ""
    level: Level = "error"
    table: str = ""

    @property
    def fatal(self) -> bool:
        return self.level == "error"

    def __str__(self) -> str:
        where = f"row {self.row}: " if self.row else ""
        return f"{where}{self.problem}{'; ' if self.remedy else ''}{self.remedy}"


def from_error(row: int, image: object, error: Exception) -> Problem:
    """An InputError reads ``FILE: problem; remedy``."""
    text = " ".join(str(error).split()).removeprefix(f"{image}: ")
    problem, mark, remedy = text.rpartition("; ")
    return Problem(row, problem, remedy, str(image)) if mark else Problem(row, text, "", str(image))
