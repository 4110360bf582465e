"""The curves of runs, read from their logs: a figure, and one HTML page that holds it."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config.errors import InputError
from config.files import atomic_path, write_text

LOG_SUFFIX = "_log.jsonl"  # after the stage's name
LOSS_NAMES = ("train_loss", "caption_loss")
TOKENS = ("token_std", "image_std", "effective_rank")
_STYLE = """body{font:15px/1.5 sans-serif;margin:2em auto;max-width:1150px;padding:0 1em}svg{width:100%;height:auto}
table{border-collapse:collapse}td,th{border:1px solid #bbb;padding:.25em .6em;text-align:right}td:first-child,
th:first-child{text-align:left}th{background:#eee}tr.best td{background:#e3f1e5;font-weight:bold}"""


@dataclass
class Run:
    """One training. ``steps`` and ``epochs``: the records of its log; ``flags``: those of its command; ``damaged``:
    lines of the log that cannot be read, as a kill leaves them."""

    name: str
    log: Path
    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    damaged: int = 0

    @property
    def loss_name(self) -> str:
        return next((name for record in self.steps + self.epochs for name in LOSS_NAMES if name in record), "loss")

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch of the lowest validation loss that is not collapsed."""
        usable = [epoch for epoch in self.epochs if not epoch.get("collapsed")]
        return min(usable, key=lambda epoch: epoch["val_loss"], default=None)


def read_run(log: Path, name: str) -> Run:
    """Read ``log`` (JSON lines); of an epoch or step that a resumed run repeated, the later record counts.

    Raises InputError: no line of the file is one of such a log.
    """
    steps: dict[int, dict[str, Any]] = {}
    epochs: dict[int, dict[str, Any]] = {}
    damaged, lines = 0, log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        try:
            record = json.loads(line)
            part, key = (epochs, "epoch") if record["event"] == "epoch" else (steps, "step")
            part[record[key]] = record
        except (ValueError, KeyError, TypeError):
            damaged += 1
    if damaged == len(lines) > 0:
        raise InputError(f"{log} is not the log of a training (stage1{LOG_SUFFIX}, stage2{LOG_SUFFIX})")
    description = log.with_name(f"{log.name.removesuffix(LOG_SUFFIX)}_run.json")
    flags = json.loads(description.read_text(encoding="utf-8"))["flags"] if description.is_file() else {}
    ordered = ([part[key] for key in sorted(part)] for part in (steps, epochs))
    return Run(name, log, *ordered, flags, damaged)


def find_runs(places: Sequence[Path]) -> list[Run]:
    """Every run whose log is one of ``places``, or lies in one of these folders, however deep.

    Raises InputError: a place does not exist, or there is no run in any.
    """
    logs: dict[Path, None] = {}
    for place in places:
        if not place.exists():
            raise InputError(f"no such file or folder: {place}")
        logs |= dict.fromkeys([place] if place.is_file() else sorted(place.rglob(f"stage[12]{LOG_SUFFIX}")))
    if not logs:
        raise InputError(f"no stage1{LOG_SUFFIX} or stage2{LOG_SUFFIX} in {', '.join(map(str, places))}")
    parents = [log.resolve().parent for log in logs]
    common = len(Path(parents[0]).parts)
    while any(parent.parts[:common] != parents[0].parts[:common] for parent in parents):
        common -= 1
    several = len({log.name for log in logs}) > 1
    runs = []
    for log, parent in zip(logs, parents, strict=True):
        name = "/".join(parent.parts[common:]) or parent.name
        runs.append(read_run(log, f"{name} {log.name.removesuffix(LOG_SUFFIX)}" if several else name))
    return runs


def draw_runs(runs: Sequence[Run], path: Path | None = None) -> str:
    """Training loss and validation loss of all runs by epoch. Returns SVG, or writes a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from engine.figures import cjk_font

    fonts = {"font.family": list(filter(None, ("DejaVu Sans", cjk_font()))), "svg.fonttype": "none"}
    with plt.rc_context(fonts):
        figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), sharex=True, layout="constrained")
        colours = plt.get_cmap("tab20" if len(runs) > 10 else "tab10").colors
        for number, run in enumerate(runs):
            colour = colours[number % len(colours)]
            trained = [epoch for epoch in run.epochs if epoch.get(run.loss_name) is not None]
            style = {"color": colour, "lw": 1.2, "marker": "." if len(run.epochs) < 60 else None}
            axes[0].plot([e["epoch"] for e in trained], [e[run.loss_name] for e in trained], **style)
            losses = [epoch["val_loss"] for epoch in run.epochs]
            axes[1].plot([e["epoch"] for e in run.epochs], losses, **style, label=run.name)
            if run.best:
                axes[1].plot(run.best["epoch"], run.best["val_loss"], "o", color=colour, markeredgecolor="black", ms=6)
        axes[0].set(xlabel="epoch", title=" / ".join(dict.fromkeys(run.loss_name for run in runs)))
        axes[1].set(xlabel="epoch", title="val_loss (circle: best epoch)")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=min(4, len(runs)), fontsize="small")
        if path is None:
            stream = io.StringIO()
            figure.savefig(stream, format="svg")
            plt.close(figure)
            return stream.getvalue()[stream.getvalue().index("<svg") :]
        with atomic_path(path) as part:
            figure.savefig(part, dpi=120)
        plt.close(figure)
    return ""


def write_page(path: Path, runs: Sequence[Run], title: str) -> None:
    """One HTML file with the figure and a table of all runs, the lowest validation loss first; it needs no other file.

    Losses of runs on different tables, objectives or stages cannot be compared.
    """
    columns = ["run", "lr", "batch_size", "seed", "epochs", "best val_loss", "at epoch", "last val_loss", *TOKENS]
    ordered = sorted(runs, key=lambda run: run.best["val_loss"] if run.best else float("inf"))
    lines = []
    for run in ordered:
        best, last = run.best or {}, run.epochs[-1] if run.epochs else {}
        flags = [run.flags.get(name) for name in ("lr", "batch_size", "seed")]
        done = f"{last.get('epoch', 0)} of {run.flags.get('epochs', '?')}"
        values = [run.name, *flags, done, best.get("val_loss"), best.get("epoch"), last.get("val_loss")]
        cells = "".join(f"<td>{_shown(value)}</td>" for value in [*values, *(best.get(name) for name in TOKENS)])
        lines.append(f"<tr{' class=best' if run is ordered[0] and run.best else ''}>{cells}</tr>")
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", draw_runs(runs), count=2)
    parts = [f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title>"]
    parts += [f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>", svg]
    parts += [f"<table><tr>{head}</tr>", *lines, "</table></body></html>"]
    write_text(path, "\n".join(parts) + "\n")


def _shown(value: object) -> str:
    return "" if value is None else html.escape(f"{value:.5g}" if isinstance(value, float) else str(value))
