"""What a night reports: the leaderboard, its files, the figure of all curves, and a live table in a terminal."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState
from rich.live import Live
from rich.table import Table

from config.errors import InputError, counted
from config.files import write_text
from engine.checkpoint import read_torch_file, save_torch_file
from engine.training.curves import LOG_SUFFIX, Run, draw_runs, read_run


@dataclass(frozen=True)
class StageRuns:
    """A stage's script and the files of its runs. ``report_files``: the night's checkpoint, summary, board, figure."""

    name: str
    script: str
    best_file: str
    final_file: str
    report_files: tuple[str, str, str, str]

    @property
    def state_file(self) -> str:
        return f"{self.name}_state.pt"

    @property
    def log_file(self) -> str:
        return f"{self.name}{LOG_SUFFIX}"

    @property
    def title(self) -> str:
        return self.name.replace("stage", "Stage ")


STAGES = {
    1: StageRuns(
        "stage1",
        "train.py",
        "vision_bridge_best_val.pt",
        "vision_bridge_final.pt",
        (
            "vision_bridge_overnight_best.pt",
            "overnight_best_summary.txt",
            "overnight_leaderboard.csv",
            "overnight_curves.png",
        ),
    ),
    2: StageRuns(
        "stage2",
        "train_vlm.py",
        "vision_bridge_vlm_best_val.pt",
        "vision_bridge_vlm_final.pt",
        (
            "vision_bridge_vlm_overnight_best.pt",
            "overnight_stage2_best_summary.txt",
            "overnight_stage2_leaderboard.csv",
            "overnight_stage2_curves.png",
        ),
    ),
}
SHOWN = ["lr", "batch_size", "state", "val_loss", "epoch", "token_std", "image_std", "effective_rank", "seconds"]
# optuna's states in the order of the leaderboard; INTERRUPTED is a failed one whose run did not end, COLLAPSED a pruned
# one that ended.
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "COLLAPSED": "collapsed", "WAITING": "queued"}
STATES |= {"INTERRUPTED": "interrupted", "FAIL": "failed", "RUNNING": "running"}
UNFINISHED = "not complete; the same command goes on with it"
LOSSES = {
    "align": "align (contrast of tokens and reports); lower is better agreement",
    "proxy_l2": "proxy_l2; its minimum is the zero output, so a low val_loss is NO proof of quality",
    "stage2": "caption loss of the validation reports, nats per token",
}


def describe(run: dict[str, Any]) -> list[str]:
    """``name value`` of each part, numbers with six significant digits."""
    return [f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in run.items()]


def state_of(trial: FrozenTrial) -> str:
    """The leaderboard's word for how a trial stands."""
    name = trial.state.name
    if trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == UNFINISHED:
        name = "INTERRUPTED"
    if trial.state == TrialState.PRUNED and not trial.user_attrs.get("pruned"):
        name = "COLLAPSED"
    return STATES[name]


class NightReport:
    """Of the trials of ``study``; ``grid`` names its points, whose runs lie below ``folder``."""

    def __init__(
        self,
        args: argparse.Namespace,
        stage: StageRuns,
        study: optuna.Study,
        grid: dict[str, list],
        folder: Path,
        output: Path,
        model_flags: list[str],
    ) -> None:
        self.args, self.stage, self.study, self.grid = args, stage, study, grid
        self.folder, self.output, self.model_flags = folder, output, model_flags
        self.begun = time.monotonic()
        self.live: Live | None = None
        self.curves: dict[Path, tuple[int, Run]] = {}

    def run_folder(self, lr: float, batch_size: int) -> Path:
        return self.folder / f"lr{lr!r}_bs{batch_size}"

    def leaderboard(self) -> pd.DataFrame:
        """One row for each grid point that was started, the best first; of equal losses, the later epoch."""
        rows = []
        for trial in (trial for trial in self.study.trials if trial.params.keys() == self.grid.keys()):
            row = {"reason": "", **trial.user_attrs, **trial.params, "number": trial.number, "state": state_of(trial)}
            row |= {"seconds": trial.duration and round(trial.duration.total_seconds())}
            rows.append({**row, "folder": str(self.run_folder(**trial.params))})
        frame = pd.DataFrame(rows, columns=[*SHOWN, "folder", "reason", "number", "whole"])
        frame = frame.astype({"val_loss": float, "epoch": "Int64", "seconds": "Int64"})
        frame["state"] = pd.Categorical(frame["state"], list(STATES.values()), ordered=True)
        frame = frame.sort_values(["state", "val_loss", "epoch", "number"], ascending=[True, True, False, False])
        frame = frame.drop_duplicates(["lr", "batch_size"], ignore_index=True)
        return frame.set_index(frame.index.rename("rank") + 1)

    def seconds_per_run(self) -> float | None:
        """Mean time of the runs that were trained in one go; None before the first."""
        board = self.leaderboard()
        seconds = board["seconds"][board["state"].isin(["finished", "collapsed"]) & (board["whole"] == True)]  # noqa: E712
        return None if seconds.empty else float(seconds.mean())

    def progress(self, trial: FrozenTrial, count: int) -> str:
        """How the trial ended, how many runs have, and the time left."""
        board, seconds = self.leaderboard(), self.seconds_per_run()
        ended = int(board["state"].isin(["finished", "pruned", "collapsed", "failed"]).sum())
        left = "unknown time" if seconds is None else timedelta(seconds=round((count - ended) * seconds))
        elapsed = timedelta(seconds=round(time.monotonic() - self.begun))
        result = {name: trial.user_attrs[name] for name in ("val_loss", "epoch") if name in trial.user_attrs}
        outcome = ", ".join(filter(None, (state_of(trial), *describe(result), trial.user_attrs["reason"])))
        name = self.run_folder(**trial.params).name
        return f"[{ended}/{count}] {name}: {outcome}; elapsed {elapsed}, about {left} left"

    # ---------------------------------------------------------------- curves

    def curve(self, folder: Path) -> Run:
        """What a run has logged so far."""
        log = folder / self.stage.log_file
        size = log.stat().st_size if log.is_file() else 0
        if folder not in self.curves or self.curves[folder][0] != size:
            run = Run(folder.name, log)
            with suppress(InputError):  # no line of it is whole, after a power cut: it has no curve
                run = read_run(log, folder.name) if size else run
            self.curves[folder] = (size, run)
        return self.curves[folder][1]

    def live_table(self) -> AbstractContextManager:
        """In a terminal, a table of all runs that follows the search; a log file gets the lines alone."""
        if not sys.stdout.isatty():
            return nullcontext()
        self.live = Live(get_renderable=self.table, auto_refresh=False)
        return self.live

    def refresh(self) -> None:
        if self.live is not None:
            self.live.refresh()

    def table(self) -> Table:
        """One row for each grid point, in the grid's order."""
        board = {(row.lr, row.batch_size): row for row in self.leaderboard().itertuples()}
        seconds = self.seconds_per_run()
        per_run = "" if seconds is None else f", about {timedelta(seconds=round(seconds))} a run"
        columns = ("lr", "batch_size", "state", "epoch", "val_loss", "lowest", "at epoch")
        table = Table(*columns, title=f"{self.stage.title}, {self.args.epochs} epochs{per_run}")
        for lr in self.grid["lr"]:
            for batch_size in self.grid["batch_size"]:
                row, run = board.get((lr, batch_size)), self.curve(self.run_folder(lr, batch_size))
                best, last = run.best or {}, run.epochs[-1] if run.epochs else {}
                state = str(row.state) if row is not None else "queued"
                values = (last.get("epoch"), last.get("val_loss"), best.get("val_loss"), best.get("epoch"))
                cells = ["" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v) for v in values]
                table.add_row(f"{lr:g}", str(batch_size), state, *cells, style="bold" if state == "running" else "")
        return table

    # ---------------------------------------------------------------- files

    def paths(self, frame: pd.DataFrame, val_loss: float = math.inf) -> tuple[list[Path], str]:
        """Best checkpoint, summary, leaderboard and figure; beside those of a longer or better night, and then a line
        that says so. A checkpoint of one of the runs in ``frame`` is this night's own and is replaced."""
        paths, epochs = [self.output / name for name in self.stage.report_files], self.args.epochs
        if not paths[0].is_file():
            return paths, ""
        content = read_torch_file(paths[0], "checkpoint")
        # Older versions did not store the epochs; the best epoch is their lower bound.
        there = content.get("overnight") or {"epochs": content.get("epoch", 0), "val_loss": content.get("val_loss", 0)}
        better = val_loss <= there["val_loss"] or there.get("folder") in set(frame["folder"])
        if there["epochs"] < epochs or (there["epochs"] == epochs and better):
            return paths, ""
        beside = [path.with_stem(f"{path.stem}_{epochs}epochs") for path in paths]
        kind, until = ("a longer", "") if there["epochs"] > epochs else ("another", " until a val_loss here is lower")
        night = f"{kind} night ({', '.join(describe(there))})"
        return beside, f"note: {paths[0]} is of {night} and is kept{until}; see {beside[0].name}\n"

    def write(self) -> tuple[str, Path, Path]:
        """Write best checkpoint, summary, leaderboard and figure. Returns the best run ("": none), and the paths of the
        summary and the best checkpoint."""
        frame, stage = self.leaderboard(), self.stage
        finished = frame[frame["state"] == "finished"].to_dict("records")
        missing = [run["folder"] for run in finished if not (Path(run["folder"]) / stage.best_file).is_file()]
        usable = [run for run in finished if run["folder"] not in missing]
        best = {name: usable[0][name] for name in ("lr", "batch_size", "val_loss", "epoch", "folder")} if usable else {}
        (checkpoint, summary, board, figure), kept = self.paths(frame, best.get("val_loss", math.inf))
        runs = [run for folder in frame["folder"] if (run := self.curve(Path(folder))).epochs]
        lines = [
            f"Overnight search of {stage.title}, {datetime.now():%Y-%m-%d %H:%M}",
            f"study {self.folder.name}: {counted(self.args.epochs, 'epoch')}, seed {self.args.seed}",
            f"objective: {LOSSES[self.args.objective if stage.name == 'stage1' else stage.name]}\n{kept}",
            *(f"passed over: {stage.best_file} is missing in {folder}" for folder in missing),
        ]
        if best:
            best = {"epochs": self.args.epochs, **best}
            content = read_torch_file(Path(best["folder"]) / stage.best_file, "checkpoint")
            save_torch_file(content | {"overnight": best}, checkpoint)
            lines += [f"best {line.replace(' ', ': ', 1)}" for line in describe(best)]
            lines += [
                f"checkpoint: {checkpoint}",
                *([f"curves: {figure}"] if runs else []),
                *self.next_step(checkpoint),
            ]
        else:
            lines += ["best: none yet, no run has ended with a non-collapsed checkpoint"]
        table = frame[SHOWN].astype(object).fillna("-")
        lines += ["\nall runs, best first:", table.to_string(float_format="{:.6g}".format)]
        lines += [f"{Path(row.folder).name}: {row.reason}" for row in frame.itertuples() if row.reason]
        # Excel misreads Chinese paths in a table without byte-order mark.
        csv = "\ufeff" + frame.drop(columns="whole").to_csv(lineterminator="\n")
        writers = {summary: lambda: write_text(summary, "\n".join(lines) + "\n"), board: lambda: write_text(board, csv)}
        writers |= {figure: lambda: draw_runs(runs, figure)} if runs else {}
        for path, write in writers.items():
            try:
                write()
            except PermissionError:  # Windows: a spreadsheet holds it open; that must not end the night
                print(f"note: {path.name} is open in another program and was not updated; close it", flush=True)
        return ", ".join(describe(best)), summary, checkpoint

    def next_step(self, checkpoint: Path) -> list[str]:
        """The command that goes on from the best checkpoint, with a line before it."""
        if self.stage.name == "stage2":
            words = ["python", "scripts/check_image_to_text.py", "--checkpoint", str(checkpoint)]
            return ["\nwrite a report:", f"    {self._command([*words, '--max_new_tokens', '400'])}"]
        words = ["python", "train_vlm.py", "--epochs", "20", "--batch_size", "1", "--lr", "2e-5"]
        words += ["--vision_checkpoint", str(checkpoint)]
        words += ["--output_dir", str(self.args.output_dir)] if self.args.output_dir else []
        return ["\ngo on with Stage 2:", f"    {self._command(words)}"]

    def _command(self, words: list[str]) -> str:
        words = [*words, *self.model_flags, *(["--config", str(self.args.config)] if self.args.config else [])]
        return " ".join(f'"{word}"' if re.search(r"[\s&();']", word) else word for word in words)
