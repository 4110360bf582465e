"""What a run reports: lines for people, a CSV and a JSON-lines file for programs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from config.errors import InputError
from config.files import atomic_path, previous, write_text


class RunLog:
    """Appends one record per logged step or epoch to ``path`` (JSON lines) and prints lines above the bar."""

    def __init__(
        self,
        path: Path,
        *,
        active: bool,
        resumed: tuple[int, int] | None,
        track: Callable[..., None] | None = None,
    ) -> None:
        """``active``: only the main process writes. A new run starts a new file. One that is resumed, at a step and
        after so many whole epochs, drops what comes later, and a last line that a crash cut short. ``track``: gets the
        numbers too, by names such as ``epoch/val_loss``, and the step."""
        self.path, self.active, self.track = path, active, track
        if active and resumed is None:
            path.unlink(missing_ok=True)
        elif active and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _is_before(json.loads(line), *resumed)]
            if kept != lines:
                write_text(path, "".join(kept))

    def say(self, text: str) -> None:
        if self.active and text:
            tqdm.write(text)

    def record(self, **values: Any) -> None:
        if self.active:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values, ensure_ascii=False) + "\n")
            if self.track:
                shown = {name: v for name, v in values.items() if isinstance(v, int | float) and name != "step"}
                self.track({f"{values['event']}/{name}": v for name, v in shown.items()}, step=values["step"])


def _is_before(record: dict[str, Any], step: int, epoch: int) -> bool:
    return record.get("step", 0) <= step and (record.get("event") != "epoch" or record["epoch"] <= epoch)


class CsvLog:
    """One line per logged step; a resumed run drops the lines after the step that it goes on from.

    Excel locks a file that it shows: lines wait until it is closed, the run goes on.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, active: bool, resumed_step: int | None) -> None:
        """Raises: InputError when the file of a run that goes on is no such table, or is locked."""
        self.path, self.columns, self.active = path, list(columns), active
        self._waiting: list[dict[str, Any]] = []
        if not active:
            return
        try:
            kept = [] if resumed_step is None or not path.is_file() else self._until(resumed_step)
            with atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, self.columns)
                writer.writeheader()
                writer.writerows(kept)
        except PermissionError as error:
            raise InputError(f"{path} cannot be written: close the program that shows it, and start again") from error

    def _until(self, step: int) -> list[dict[str, str]]:
        """The lines up to ``step``; a last line that a crash cut short is dropped."""
        with self.path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if reader.fieldnames != self.columns:
                raise InputError(f"{self.path}: expected the columns {','.join(self.columns)}; move the file away")
            return [row for row in reader if None not in row.values() and int(row["step"]) <= step]

    def write(self, **values: Any) -> None:
        if not self.active:
            return
        self._waiting.append(values)
        try:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                csv.DictWriter(stream, self.columns).writerows(self._waiting)
        except PermissionError:
            if len(self._waiting) == 1:
                tqdm.write(f"note: {self.path} is open in another program; its lines follow when it is closed")
            return
        self._waiting.clear()


def keep_later_rows(paths: Sequence[Path], step: int) -> None:
    """Copies of the logs whose last rows are later than the step that a run goes on from, which drops them."""
    for path in filter(Path.is_file, paths):
        text = path.read_text(encoding="utf-8")
        steps = re.findall(r'^(\d+),|"step": (\d+)', text, flags=re.MULTILINE)
        if any(int(of_csv or of_json) > step for of_csv, of_json in steps):
            kept = previous(path)
            write_text(kept, text)
            print(f"note: {path.name} goes on from step {step}; its later rows are kept in {kept.name}", flush=True)


def progress_bar(total: int, done: int, description: str, *, active: bool) -> tqdm:
    """A bar with the time left, on a terminal only: a log file keeps its lines clean."""
    return tqdm(
        total=total, initial=done, desc=description, unit="step", dynamic_ncols=True, disable=None if active else True
    )
