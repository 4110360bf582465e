"""What a search tells in the morning: the best checkpoint, a summary to read, a table to sort."""

from __future__ import annotations

import csv
import io
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from config.errors import InputError
from engine.checkpoint import load_checkpoint, read_torch_file, save_torch_file
from engine.training.overnight import BEST_FILE, Point, Row

BEST_COPY = "vision_bridge_overnight_best.pt"
SUMMARY = "overnight_best_summary.txt"
LEADERBOARD = "overnight_leaderboard.csv"

OBJECTIVES = {
    "proxy_l2": (
        "proxy_l2, the mean square of the visual tokens. Its minimum is the zero output, so a low val_loss is NO "
        "proof of quality: it only ranks runs whose tokens are still alive (token_std, effective_rank). "
        "--objective align compares the tokens with the reports instead."
    ),
    "align": "align, the contrast of each scan's tokens with all reports: lower is better agreement.",
}
NUMBERS = ("val_loss", "epoch", "token_std", "image_std", "effective_rank", "seconds")


@dataclass(frozen=True)
class Settings:
    """What the summary says about the search as a whole."""

    study: str
    objective: str
    epochs: int
    seed: int
    output: Path
    stage2_flags: tuple[str, ...]


def choose_best(rows: Sequence[Row]) -> tuple[Row | None, list[str]]:
    """The first row (they come sorted) whose checkpoint is here and alive, and what was passed over for it."""
    passed: list[str] = []
    for row in rows:
        if row.state != "finished":
            continue
        try:
            collapsed = load_checkpoint(row.folder / BEST_FILE).collapsed
        except InputError as error:
            passed.append(f"{row.point} (val_loss {row.result.val_loss:.6g}, run on {row.host}) passed over: {error}")
            continue
        if not collapsed:
            return row, passed
        passed.append(f"{row.point} passed over: its checkpoint is stamped as collapsed now")
    return None, passed


def write_report(rows: Sequence[Row], settings: Settings) -> tuple[Row | None, list[str]]:
    """Write the three files into the output folder; returns the best row, and lines about what did not go well."""
    best, problems = choose_best(rows)
    if best is not None:
        content = read_torch_file(best.folder / BEST_FILE, "checkpoint")
        save_torch_file(content, settings.output / BEST_COPY)
    text = "\n".join(summary_lines(rows, best, problems, settings)) + "\n"
    for name, content in ((SUMMARY, text), (LEADERBOARD, leaderboard(rows))):
        try:
            write_text_atomically(settings.output / name, content)
        except PermissionError:  # Windows: a spreadsheet holds it open; that must not end the night
            problems.append(f"{name} is open in another program and was not updated; close it")
    return best, problems


def summary_lines(rows: Sequence[Row], best: Row | None, problems: Sequence[str], settings: Settings) -> list[str]:
    lines = [
        f"Overnight search of Stage 1, {datetime.now():%Y-%m-%d %H:%M}",
        f"study {settings.study}: {settings.epochs} epochs, seed {settings.seed}",
        *textwrap.wrap(f"objective: {OBJECTIVES[settings.objective]}", 110),
    ]
    lines += ["", *_best_lines(best, settings), "", "all runs, best first:", *table(rows)]
    if problems:
        lines += ["", *problems]
    return lines


def _best_lines(best: Row | None, settings: Settings) -> list[str]:
    copy = settings.output / BEST_COPY
    if best is None:
        stale = f"; {copy} is of an earlier search" if copy.is_file() else ""
        return [f"best: none yet, no run has ended with living tokens{stale}"]
    lines = [
        f"best: {best.point}",
        f"best lr: {best.point.lr!r}",
        f"best batch_size: {best.point.batch_size}",
        f"best val_loss: {best.result.val_loss:.6g}",
        f"best epoch: {best.result.epoch} of {settings.epochs}",
        f"checkpoint: {copy} (copy of {best.folder / BEST_FILE})",
    ]
    if best.result.epoch == 0:
        lines.append("NOTE: epoch 0 is the untrained bridge on the nnU-Net encoder; training made no run better.")
    command = ["python", "train_vlm.py", "--epochs", "20", "--batch_size", "1", "--lr", "2e-5"]
    command += ["--vision_checkpoint", str(copy), *settings.stage2_flags]
    return [*lines, "", "go on with Stage 2:", "    " + " ".join(quoted(word) for word in command)]


def quoted(word: str) -> str:
    """As PowerShell, cmd and sh understand it."""
    return f'"{word}"' if any(c.isspace() or c in "&();'" for c in word) else word


def table(rows: Sequence[Row]) -> list[str]:
    """The runs as aligned text."""
    head = ("#", "lr", "batch", "state", "val_loss", "epoch", "token_std", "eff_rank", "time", "log or reason")
    cells = [head]
    for number, row in enumerate(rows, start=1):
        r = row.result
        numbers = [_number(v) for v in (r.val_loss, r.epoch, r.token_std, r.effective_rank)] if r else ["-"] * 4
        time = duration(r.seconds) if r and r.seconds is not None else "-"
        where = row.reason or str(row.folder)
        cells.append((str(number), repr(row.point.lr), str(row.point.batch_size), row.state, *numbers, time, where))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    return ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]


def leaderboard(rows: Sequence[Row]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["rank", "lr", "batch_size", "state", *NUMBERS, "host", "folder", "reason"])
    for number, row in enumerate(rows, start=1):
        numbers = [getattr(row.result, name) if row.result else None for name in NUMBERS]
        point = [repr(row.point.lr), row.point.batch_size]
        writer.writerow([number, *point, row.state, *numbers, row.host, row.folder, row.reason])
    return stream.getvalue()


def write_text_atomically(path: Path, text: str) -> None:
    """With a byte-order mark for tables, without which Excel misreads a Chinese path."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8-sig" if path.suffix == ".csv" else "utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _number(value: float | int | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def remaining(rows: Sequence[Row], points: Sequence[Point]) -> str:
    """The time left, from the runs of this study that went through in one go."""
    took = [row.result.seconds for row in rows if row.result and row.result.seconds is not None]
    left = sum(row.state in ("open", "running", "interrupted") for row in rows if row.point in points)
    if not left:
        return "nothing left"
    return f"about {duration(left * sum(took) / len(took))} left" if took else "time left unknown"
