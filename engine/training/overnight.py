"""Overnight search of Stage 1: optuna chooses the grid point, each run is a train.py process, a report follows.

A run's folder, named after its grid point, alone says how far the run is: train.py keeps its state there until it
leaves its checkpoints. A repeated trial continues in the same folder; a complete run is read, not repeated.

optuna gives every process its own trials, makes the first N trials of a grid of N different points, and queues the
trial of a dead process again once its heartbeats are older than two minutes. Two processes may still get the same
unfinished point. :meth:`Night.objective` therefore waits for any process here that trains into the same folder.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import psutil
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from config.errors import InputError, counted
from config.files import write_text
from config.schema import REPOSITORY, Config, keys_with_role, write_config
from engine.checkpoint import load_checkpoint, read_torch_file, save_torch_file
from engine.cli import EXIT_BAD_INPUT

BEST_FILE, FINAL_FILE, STATE_FILE = "vision_bridge_best_val.pt", "vision_bridge_final.pt", "stage1_state.pt"
REPORT_FILES = ("vision_bridge_overnight_best.pt", "overnight_best_summary.txt", "overnight_leaderboard.csv")
SHOWN = ["lr", "batch_size", "state", "val_loss", "epoch", "token_std", "image_std", "effective_rank", "seconds"]
# optuna's states in the order of the leaderboard; INTERRUPTED is a failed one whose run did not end.
STATES = {"COMPLETE": "finished", "PRUNED": "collapsed", "WAITING": "queued", "INTERRUPTED": "interrupted"}
STATES |= {"FAIL": "failed", "RUNNING": "running"}
UNFINISHED = "not complete; the same command goes on with it"
OBJECTIVES = {
    "align": "align (contrast of tokens and reports); lower is better agreement",
    "proxy_l2": "proxy_l2; its minimum is the zero output, so a low val_loss is NO proof of quality",
}


def study_name(config: Config, objective: str, epochs: int, seed: int) -> str:
    """A name shared by exactly those runs whose losses are comparable. Tables and nnU-Net count by content.

    Raises InputError where one of these files is missing.
    """
    elsewhere = {*keys_with_role("path"), "path_map", "num_workers", "memory_cache_mb"}
    settings = {key: value for key, value in config.to_dict().items() if key not in elsewhere}
    for key in ("caption_csv_train", "caption_csv_val", "nnunet_encoder_checkpoint"):
        path = config.resolved(key)
        if not path.is_file():
            raise InputError(f"file not found: {path}; set {key} in the configuration to an existing file")
        settings[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return f"{objective}_e{epochs}_s{seed}_{digest}"


def is_complete(folder: Path) -> bool:
    """Whether the run of a folder has ended, with or without a usable checkpoint."""
    return (folder / FINAL_FILE).is_file() and not (folder / STATE_FILE).exists()


def read_result(folder: Path) -> dict[str, Any]:
    """What a complete run has reached; where the best checkpoint is missing or unreadable, the reason alone."""
    best = folder / BEST_FILE
    try:
        checkpoint = load_checkpoint(best if best.is_file() else folder / FINAL_FILE)
    except InputError as error:
        return {"reason": str(error)}
    if not (checkpoint.collapsed or best.is_file()):
        return {"reason": f"{best} is missing"}
    reason = "" if checkpoint.epoch else "epoch 0 is the untrained bridge; no later epoch was better and non-collapsed"
    if checkpoint.collapsed:
        reason = f"{checkpoint.path.name} is stamped as collapsed"
    return {**checkpoint.diagnostics, "val_loss": checkpoint.val_loss, "epoch": checkpoint.epoch, "reason": reason}


def training_processes(folder: Path) -> list[psutil.Process]:
    """The processes of this machine that train into ``folder``."""
    processes = [(process, process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    return [process for process, line in processes if ("--output_dir", str(folder)) in itertools.pairwise(line)]


def train(command: list[str], log: Path) -> int:
    """Run train.py until it ends, its output appended to ``log``. Returns its exit status.

    Raises KeyboardInterrupt after Ctrl-C, once the process has saved its state; a second one stops it at once.
    """
    with log.open("ab", buffering=0) as stream:
        stream.write(f"---- {datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(command)}\n".encode())
        # In its own session the process gets the signals sent here; on Windows the console interrupts both.
        options = {"cwd": REPOSITORY, "start_new_session": os.name != "nt"}
        output = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **options, **output)
    interrupted = False
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            interrupted = True
            print("stopping: waiting until the run has saved its state (Ctrl-C again: at once)", flush=True)
            if os.name != "nt":
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode


def describe(run: dict[str, Any]) -> list[str]:
    """``name value`` of each part, numbers with six significant digits."""
    return [f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}" for name, value in run.items()]


class Night:
    """The runs of one command. ``args``: the flags of run_overnight_300.py, ``lrs`` and ``batch_sizes`` filled in.

    Raises InputError where a file that the runs need is missing, or an earlier night's best checkpoint is unreadable.
    """

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.args, self.config, self.begun = args, config, time.monotonic()
        self.output = config.resolved("output_dir")
        self.folder = self.output / "overnight" / study_name(config, args.objective, args.epochs, args.seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.grid = {"lr": list(dict.fromkeys(args.lrs)), "batch_size": list(dict.fromkeys(args.batch_sizes))}
        self.count = math.prod(map(len, self.grid.values()))
        self.model_flags = ["--mamba_model", args.mamba_model] if args.mamba_model else []
        self.model_flags += ["--allow_toy_model"] * args.allow_toy_model + ["--force"] * args.force
        print(f"overnight: {counted(self.count, 'run')} of {counted(args.epochs, 'epoch')}; {self.folder}", flush=True)

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self.retry = RetryHeartbeatStaleTrialCallback()
        url = f"sqlite:///{(self.folder.parent / 'overnight.db').as_posix()}"
        engine = {"connect_args": {"timeout": 60}}  # seconds that two processes wait for each other
        heartbeats = {"heartbeat_interval": 60, "heartbeat_stale_trial_callback": self.retry}
        storage = RDBStorage(url, engine_kwargs=engine, **heartbeats)
        self.sampler = optuna.samplers.GridSampler(self.grid, seed=0)
        name = f"{self.folder.name} {self.grid}"
        self.study = optuna.create_study(study_name=name, storage=storage, sampler=self.sampler, load_if_exists=True)
        print(self.report_paths(self.leaderboard())[1], end="", flush=True)

    def search(self) -> None:
        """Run every point of the grid; a failed run gets a second attempt at the end, unless its input is bad."""
        for attempt in (1, 2):
            board = self.leaderboard()
            for number in board.loc[board["state"].isin(["failed", "interrupted"]), "number"]:
                trial = self.study.trials[number]
                if attempt == 1 or trial.user_attrs.get("status") != EXIT_BAD_INPUT:
                    self.retry(self.study, trial)
            # One trial per call: GridSampler stops a longer one at its last point, with retries still in the queue.
            while self.study.get_trials(states=[TrialState.WAITING]) or not self.sampler.is_exhausted(self.study):
                self.study.optimize(self.objective, n_trials=1, callbacks=[self.show_progress])

    def run_folder(self, lr: float, batch_size: int) -> Path:
        return self.folder / f"lr{lr!r}_bs{batch_size}"

    def objective(self, trial: Trial) -> float | None:
        """Train one grid point. Returns its validation loss, or None for a failed run, which fails the trial."""
        point = {name: trial.suggest_categorical(name, values) for name, values in self.grid.items()}
        folder = self.run_folder(**point)
        log = folder / "train.log"
        trial.set_user_attr("reason", UNFINISHED)
        for process in training_processes(folder):
            print(f"{folder.name}: waiting for process {process.pid}, which trains it already", flush=True)
            process.wait()
        if not is_complete(folder):
            how = "continues from its saved state" if (folder / STATE_FILE).exists() else "starts"
            print(f"{folder.name}: {how}; {log}", flush=True)
            trial.set_user_attr("status", status := train(self.command(folder, **point), log))
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            trial.set_user_attr("reason", f"status {status} without {FINAL_FILE}: {last[:240]}; see {log}")
        result = read_result(folder) if is_complete(folder) else {}
        for name, value in result.items():
            trial.set_user_attr(name, value)
        if result.get("collapsed"):
            raise optuna.TrialPruned
        return result.get("val_loss")

    def command(self, folder: Path, lr: float, batch_size: int) -> list[str]:
        """The train.py command of a run. Its configuration is a copy: editing paths.yaml at night changes nothing."""
        args, copy = self.args, folder / "overnight_config.yaml"
        write_config(self.config, copy)
        flags = {"config": copy, "objective": args.objective, "epochs": args.epochs, "seed": args.seed, "lr": repr(lr)}
        flags |= {"batch_size": batch_size, "output_dir": folder, "resume": "auto"}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-u", "-X", "utf8", str(args.train_script), *words, *self.model_flags]

    # ---------------------------------------------------------------- the report

    def leaderboard(self) -> pd.DataFrame:
        """One row for each grid point that was started, the best first; of equal losses, the later epoch."""
        rows = []
        for trial in (trial for trial in self.study.trials if trial.params.keys() == self.grid.keys()):
            row = {"reason": "", **trial.user_attrs, **trial.params, "number": trial.number}
            interrupted = trial.state == TrialState.FAIL and row["reason"] == UNFINISHED
            row |= {"state": STATES["INTERRUPTED" if interrupted else trial.state.name]}
            row |= {"seconds": trial.duration and round(trial.duration.total_seconds())}
            rows.append({**row, "folder": str(self.run_folder(**trial.params))})
        frame = pd.DataFrame(rows, columns=[*SHOWN, "folder", "reason", "number"])
        frame = frame.astype({"val_loss": float, "epoch": "Int64", "seconds": "Int64"})
        frame["state"] = pd.Categorical(frame["state"], list(STATES.values()), ordered=True)
        frame = frame.sort_values(["state", "val_loss", "epoch", "number"], ascending=[True, True, False, False])
        frame = frame.drop_duplicates(["lr", "batch_size"], ignore_index=True)
        return frame.set_index(frame.index.rename("rank") + 1)

    def show_progress(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Write the report and print how the trial ended, how many runs have, and the time left."""
        self.write_report()
        board = self.leaderboard()
        complete = board["state"].isin(["finished", "collapsed"])
        ended, seconds = complete.sum() + (board["state"] == "failed").sum(), board["seconds"][complete].mean()
        left = "unknown time" if pd.isna(seconds) else timedelta(seconds=round((self.count - ended) * seconds))
        elapsed = timedelta(seconds=round(time.monotonic() - self.begun))
        result = {name: trial.user_attrs[name] for name in ("val_loss", "epoch") if name in trial.user_attrs}
        outcome = ", ".join(filter(None, (STATES[trial.state.name], *describe(result), trial.user_attrs["reason"])))
        name = self.run_folder(**trial.params).name
        print(f"[{ended}/{self.count}] {name}: {outcome}; elapsed {elapsed}, about {left} left", flush=True)

    def report_paths(self, frame: pd.DataFrame, val_loss: float = math.inf) -> tuple[list[Path], str]:
        """Best checkpoint, summary and leaderboard; beside those of a longer or better night, and then a line that says
        so. A checkpoint of one of the runs in ``frame`` is this night's own and is replaced."""
        paths, epochs = [self.output / name for name in REPORT_FILES], self.args.epochs
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

    def write_report(self) -> tuple[str, Path]:
        """Write best checkpoint, summary and leaderboard. Returns the best run ("": none) and the summary's path."""
        frame = self.leaderboard()
        finished = frame[frame["state"] == "finished"].to_dict("records")
        missing = [run["folder"] for run in finished if not (Path(run["folder"]) / BEST_FILE).is_file()]
        usable = [run for run in finished if run["folder"] not in missing]
        best = {name: usable[0][name] for name in ("lr", "batch_size", "val_loss", "epoch", "folder")} if usable else {}
        (checkpoint, summary, board), kept = self.report_paths(frame, best.get("val_loss", math.inf))
        lines = [
            f"Overnight search of Stage 1, {datetime.now():%Y-%m-%d %H:%M}",
            f"study {self.folder.name}: {counted(self.args.epochs, 'epoch')}, seed {self.args.seed}",
            f"objective: {OBJECTIVES[self.args.objective]}\n{kept}",
            *(f"passed over: {BEST_FILE} is missing in {folder}" for folder in missing),
        ]
        if best:
            best = {"epochs": self.args.epochs, **best}
            content = read_torch_file(Path(best["folder"]) / BEST_FILE, "checkpoint")
            save_torch_file(content | {"overnight": best}, checkpoint)
            lines += [f"best {line.replace(' ', ': ', 1)}" for line in describe(best)]
            lines += [f"checkpoint: {checkpoint}", "\ngo on with Stage 2:", f"    {self.stage2_command(checkpoint)}"]
        else:
            lines += ["best: none yet, no run has ended with a non-collapsed checkpoint"]
        table = frame[SHOWN].astype(object).fillna("-")
        lines += ["\nall runs, best first:", table.to_string(float_format="{:.6g}".format)]
        lines += [f"{Path(row.folder).name}: {row.reason}" for row in frame.itertuples() if row.reason]
        # Excel misreads Chinese paths in a table without byte-order mark.
        for path, text in ((summary, "\n".join(lines) + "\n"), (board, "\ufeff" + frame.to_csv(lineterminator="\n"))):
            try:
                write_text(path, text)
            except PermissionError:  # Windows: a spreadsheet holds it open; that must not end the night
                print(f"note: {path.name} is open in another program and was not updated; close it", flush=True)
        return ", ".join(describe(best)), summary

    def stage2_command(self, checkpoint: Path) -> str:
        words = ["python", "train_vlm.py", "--epochs", "20", "--batch_size", "1", "--lr", "2e-5"]
        words += ["--vision_checkpoint", str(checkpoint), *self.model_flags]
        for flag, value in (("--config", self.args.config), ("--output_dir", self.args.output_dir)):
            words += [flag, str(value)] if value else []
        return " ".join(f'"{word}"' if re.search(r"[\s&();']", word) else word for word in words)
