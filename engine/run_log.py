"""What a run tells: lines for people, a CSV and a JSON-lines file for programs, a picture at the end."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """Appends one record per logged step or epoch to ``path`` (JSON lines) and prints lines above the bar."""

    def __init__(self, path: Path, *, active: bool, resumed: bool) -> None:
        """``active``: only the main process writes. A new run starts a new file."""
        self.path, self.active = path, active
        if active and not resumed:
            path.unlink(missing_ok=True)

    def say(self, text: str) -> None:
        if self.active:
            tqdm.write(text)

    def record(self, **values: Any) -> None:
        if self.active:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(values, ensure_ascii=False) + "\n")


class CsvLog:
    """One line per logged step; a resumed run drops the lines after the step that it goes on from."""

    def __init__(self, path: Path, columns: Sequence[str], *, active: bool, resumed_step: int | None) -> None:
        self.path, self.columns, self.active = path, list(columns), active
        if not active:
            return
        kept: list[dict[str, str]] = []
        if resumed_step is not None and path.is_file():
            with path.open(encoding="utf-8", newline="") as stream:
                kept = [row for row in csv.DictReader(stream) if int(row["step"]) <= resumed_step]
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def write(self, **values: Any) -> None:
        if self.active:
            with self.path.open("a", encoding="utf-8", newline="") as stream:
                csv.DictWriter(stream, self.columns).writerow(values)


def progress_bar(total: int, done: int, description: str, *, active: bool) -> tqdm:
    """A bar with the time left, on a terminal only: a log file keeps its lines clean."""
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="step",
        dynamic_ncols=True,
        disable=None if active else True,
    )


def plot_losses(path: Path, curves: dict[str, tuple[Sequence[float], Sequence[float]]], title: str) -> None:
    """Loss curves as a PNG: name → (steps, values)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, (steps, values) in curves.items():
        axes.plot(steps, values, marker="o" if len(steps) < 60 else None, markersize=3, label=name)
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
