"""Overnight search: optuna chooses the grid point, each run is a process of the stage's script, a report follows.

A run's folder, named after its grid point, alone says how far the run is: the script keeps its state there until it
leaves its checkpoints. A repeated trial continues in the same folder; a complete run is read, not repeated.

optuna gives every process its own trials, makes the first N trials of a grid of N different points, and queues the
trial of a dead process again once its heartbeats are older than two minutes. Two processes may still get the same
unfinished point. :meth:`Night.objective` therefore waits for any process here that trains into the same folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, Trial, TrialState

from config.errors import InputError, counted
from config.schema import REPOSITORY, Config, keys_with_role, write_config
from engine.checkpoint import load_checkpoint
from engine.cli import EXIT_BAD_INPUT
from engine.training.overnight_report import STAGES, UNFINISHED, NightReport, StageRuns

POLL_SECONDS = 5.0  # between two looks at the curve of the current run
MEDIAN_RUNS = 2  # complete runs before optuna prunes another by their median


def study_name(args: argparse.Namespace, config: Config) -> str:
    """A name shared by exactly those runs whose losses are comparable. Files that decide a loss count by content:
    tables, questions, nnU-Net, Stage 0's adapters, and the checkpoint that Stage 2 starts from.

    Raises InputError where one of these files is missing.
    """
    elsewhere = {*keys_with_role("path"), "path_map", "num_workers", "memory_cache_mb"}
    settings = {key: value for key, value in config.to_dict().items() if key not in elsewhere}
    needed = ["caption_csv_train", "caption_csv_val", "nnunet_encoder_checkpoint"]
    needed += [key for key in ("caption_prompt_json", "language_model_adapters") if getattr(config, key)]
    files = {key: config.resolved(key) for key in needed}
    for key, path in files.items():
        if not path.is_file():
            raise InputError(f"file not found: {path}; set {key} in the configuration to an existing file")
    if args.stage == 2:
        files["vision_checkpoint"] = args.vision_checkpoint
    settings |= {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()}
    settings |= {"train_flags": args.train_flags} if args.train_flags else {}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    what = args.objective if args.stage == 1 else "stage2"
    return f"{what}_e{args.epochs}_s{args.seed}_{digest}"


def is_complete(folder: Path, stage: StageRuns) -> bool:
    """Whether the run of a folder has ended, with or without a usable checkpoint."""
    return (folder / stage.final_file).is_file() and not (folder / stage.state_file).exists()


def read_result(folder: Path, stage: StageRuns) -> dict[str, Any]:
    """What a complete run has reached; where the best checkpoint is missing or unreadable, the reason alone."""
    best = folder / stage.best_file
    try:
        checkpoint = load_checkpoint(best if best.is_file() else folder / stage.final_file)
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
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # one that has ended, or of the system or another user
            if ("--output_dir", str(folder)) in itertools.pairwise(process.cmdline()):
                found.append(process)
    return found


def train(command: list[str], log: Path, stop: Callable[[], bool] = lambda: False) -> int:
    """Run a stage script until it ends, its output appended to ``log``. Returns its exit status.

    ``stop`` is asked every few seconds; once it is true, the process is ended.

    Raises KeyboardInterrupt after Ctrl-C, once the process has saved its state; a second one stops it at once.
    """
    with log.open("ab", buffering=0) as stream:
        stream.write(f"---- {datetime.now():%Y-%m-%d %H:%M:%S} {' '.join(command)}\n".encode())
        # In its own session the process gets the signals sent here; on Windows the console interrupts both.
        options = {"cwd": REPOSITORY, "start_new_session": os.name != "nt"}
        output = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **options, **output)
    interrupted = stopped = False
    while process.returncode is None:
        try:
            process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            if not (interrupted or stopped) and stop():
                stopped = True
                process.terminate()
        except KeyboardInterrupt:
            interrupted = True
            print("stopping: waiting until the run has saved its state (Ctrl-C again: at once)", flush=True)
            if os.name != "nt":
                process.send_signal(signal.SIGINT)
    if interrupted:
        raise KeyboardInterrupt
    return process.returncode


class Night:
    """The runs of one command. ``args``: the flags of run_overnight_300.py, what the stage decides filled in.

    Raises InputError where a file that the runs need is missing, or an earlier night's best checkpoint is unreadable.
    """

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.args, self.config, self.stage = args, config, STAGES[args.stage]
        output = config.resolved("output_dir")
        self.folder = output / "overnight" / study_name(args, config)
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
        median = optuna.pruners.MedianPruner(MEDIAN_RUNS, n_warmup_steps=max(1, args.epochs // 10))
        self.study = optuna.create_study(
            study_name=f"{self.folder.name} {self.grid}",
            storage=storage,
            sampler=self.sampler,
            pruner=median if args.prune else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        self.report = NightReport(args, self.stage, self.study, self.grid, self.folder, output, self.model_flags)
        print(self.report.paths(self.report.leaderboard())[1], end="", flush=True)

    def search(self) -> None:
        """Run every point of the grid; a failed run gets a second attempt at the end, unless its input is bad. Ends
        before a run that would not fit into the time budget."""
        with self.report.live_table():
            for attempt in (1, 2):
                board = self.report.leaderboard()
                for number in board.loc[board["state"].isin(["failed", "interrupted"]), "number"]:
                    trial = self.study.trials[number]
                    if attempt == 1 or trial.user_attrs.get("status") != EXIT_BAD_INPUT:
                        self.retry(self.study, trial)
                # One trial per call: GridSampler stops a longer one at its last point, with retries still in the queue.
                while self.study.get_trials(states=[TrialState.WAITING]) or not self.sampler.is_exhausted(self.study):
                    if not self.fits():
                        return
                    self.study.optimize(self.objective, n_trials=1, callbacks=[self.show_progress])

    def fits(self) -> bool:
        """Whether one more run ends in time, by the mean of those trained in one go; the first is always begun."""
        seconds = self.report.seconds_per_run()
        if self.args.deadline is None or seconds is None or time.time() + seconds <= self.args.deadline:
            return True
        until, needed = datetime.fromtimestamp(self.args.deadline), timedelta(seconds=round(seconds))
        line = f"time budget: a run takes about {needed}, too long to end by {until:%H:%M}"
        print(f"{line}; the same command goes on with the others", flush=True)
        return False

    def objective(self, trial: Trial) -> float | None:
        """Train one grid point. Returns its validation loss, or None for a failed run, which fails the trial."""
        point = {name: trial.suggest_categorical(name, values) for name, values in self.grid.items()}
        folder, stage = self.report.run_folder(**point), self.stage
        log = folder / "train.log"
        # A retried trial brings the attributes of the failed one.
        for name, value in {"reason": UNFINISHED, "whole": False, "pruned": False}.items():
            trial.set_user_attr(name, value)
        for process in training_processes(folder):
            print(f"{folder.name}: waiting for process {process.pid}, which trains it already", flush=True)
            process.wait()
        if not is_complete(folder, stage):
            whole = not (folder / stage.state_file).exists()
            print(f"{folder.name}: {'starts' if whole else 'continues from its saved state'}; {log}", flush=True)
            watch = _Watch(trial, self.report, folder)
            trial.set_user_attr("status", status := train(self.command(folder, **point), log, watch.should_stop))
            if watch.reason and not is_complete(folder, stage):
                trial.set_user_attr("reason", watch.reason)
                trial.set_user_attr("pruned", True)
                for state in folder.glob(f"{stage.name}_state*.pt"):  # as large as the model; nothing goes on from it
                    state.unlink()
                raise optuna.TrialPruned
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            trial.set_user_attr("reason", f"status {status} without {stage.final_file}: {last[:240]}; see {log}")
            trial.set_user_attr("whole", whole)
        result = read_result(folder, stage) if is_complete(folder, stage) else {}
        for name, value in result.items():
            trial.set_user_attr(name, value)
        if result.get("collapsed"):
            raise optuna.TrialPruned
        return result.get("val_loss")

    def command(self, folder: Path, lr: float, batch_size: int) -> list[str]:
        """The stage's command of a run. Its configuration is a copy: editing paths.yaml at night changes nothing."""
        args, copy = self.args, folder / "overnight_config.yaml"
        write_config(self.config, copy)
        flags = {"config": copy, "epochs": args.epochs, "seed": args.seed, "lr": repr(lr), "batch_size": batch_size}
        flags |= {"objective": args.objective} if args.stage == 1 else {"vision_checkpoint": args.vision_checkpoint}
        flags |= {"output_dir": folder, "resume": "auto"}
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        script = args.train_script or REPOSITORY / self.stage.script
        return [sys.executable, "-u", "-X", "utf8", str(script), *words, *self.model_flags, *args.train_flags]

    def show_progress(self, _: optuna.Study, trial: FrozenTrial) -> None:
        """Write the report and print how the trial ended, how many runs have, and the time left."""
        self.report.write()
        self.report.refresh()
        print(self.report.progress(trial, self.count), flush=True)


class _Watch:
    """Follows the curve of a run while it trains: tells optuna of every epoch, and the live table."""

    def __init__(self, trial: Trial, report: NightReport, folder: Path) -> None:
        self.trial, self.report, self.folder = trial, report, folder
        self.reason = ""
        self.reported: set[int] = set()

    def should_stop(self) -> bool:
        """Whether optuna prunes the run."""
        self.report.refresh()
        for epoch in self.report.curve(self.folder).epochs:
            if epoch["epoch"] not in self.reported and math.isfinite(epoch["val_loss"]):
                self.reported.add(epoch["epoch"])
                self.trial.report(epoch["val_loss"], epoch["epoch"])
                if self.trial.should_prune():
                    self.reason = f"at epoch {epoch['epoch']} its lowest val_loss was above the median of the others"
        return bool(self.reason)
