"""The state of an unfinished run, from which it is resumed exactly.

Weights, optimizer, schedule, gradient scaler, random-number generators, and the position in the epoch. It is written
atomically every ``--save_every`` steps, at each epoch's end and on Ctrl-C, and removed when the run is complete. The
state before is kept beside it, for the case that the newest is damaged. The main process writes for all.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from config.errors import InputError
from config.files import keep_previous
from config.schema import Config
from data.cache import file_digest
from engine.checkpoint import read_torch_file, save_torch_file
from engine.guards import require_room
from engine.parallel import on_main

STATE_FORMAT = "mamba-ct-report-state"
STATE_VERSION = 2  # raise it when a run would go on otherwise from the same state


@dataclass
class Progress:
    """The position of a run. ``best``: lowest validation loss so far; ``history``: one record per epoch."""

    epoch: int = 0
    cases: int = 0  # of this epoch that all processes together have seen
    step: int = 0
    best: float = float("inf")
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of this epoch's steps, for their mean
    pieces: int = 1  # into which a batch is cut to fit into memory
    start: tuple[int, int] = (0, 0)  # step and epoch of the training that is continued

    def advance(self, cases: int, loss: float) -> None:
        """One step further. A step that was skipped has no loss to be averaged."""
        self.step, self.cases = self.step + 1, self.cases + cases
        if math.isfinite(loss):
            self.losses.append(loss)


class TrainState:
    """Saves and restores everything that a step depends on."""

    def __init__(
        self,
        path: Path,
        fingerprint: dict[str, Any],
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        schedule: LRScheduler,
    ) -> None:
        """``model``: the part whose weights are trained; ``fingerprint``: settings that a resumed run must share."""
        self.path, self.fingerprint, self.accelerator = path, fingerprint, accelerator
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.progress = Progress()
        self._ours = False  # the files are of this run

    @property
    def older(self) -> Path:
        """Where the state before the newest is kept."""
        return self.path.with_stem(f"{self.path.stem}.older")

    @property
    def save_alone(self) -> Callable[[], None] | None:
        """:meth:`save`, where one process may call it without the others."""
        return self.save if self.accelerator.num_processes == 1 else None

    def save(self) -> None:
        """Every process calls it at the same step."""
        generators = gather_object([_generators()])
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        content = {
            "format": STATE_FORMAT,
            "fingerprint": self.fingerprint,
            "progress": dict(vars(self.progress)),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "random": generators,
        }
        if not self._ours:  # of a run that is not resumed
            self.older.unlink(missing_ok=True)
        save_torch_file(content, self.path, self.older if self._ours else None)
        self._ours = True

    def resume(self, wanted: str) -> bool:
        """``auto``: resume an interrupted run with the same settings, if there is one; ``never``: start anew; a path:
        resume from that file or refuse. Returns whether the run is resumed.

        Raises InputError: the named file is missing, unreadable, or of a run with other settings.
        """
        on_main(self.accelerator, self._require_room)
        path = None if wanted == "never" else on_main(self.accelerator, lambda: self._choose(wanted))
        if path is None:
            if self.accelerator.process_index:  # other dropout in every process
                torch.manual_seed(torch.initial_seed() + self.accelerator.process_index)
            return False
        self._restore(_read(path))
        return True

    def _require_room(self) -> None:
        """For three states (the newest, the one before, one that is written), and the best and the final checkpoint.

        Raises InputError: the disk has less."""
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        weights = sum(value.numel() * value.element_size() for value in self.model.state_dict().values())
        there = sum(path.stat().st_size for path in (self.path, self.older) if path.is_file())
        needed = 3 * (weights + 2 * trained) + 3 * weights - there
        require_room(self.path.parent, needed, "training states and checkpoints")

    def _choose(self, wanted: str) -> Path | None:
        """The file to resume from, or None; one of another run is renamed. A damaged newest state gives way to the one
        before."""
        path = self.path if wanted == "auto" else Path(wanted)
        if wanted == "auto" and not path.is_file():
            if not self.older.is_file():
                return None
            path = self.older  # killed between two renamings
        try:
            content = _read(path)
        except InputError as damage:
            if wanted != "auto" or path == self.older or not self.older.is_file():
                raise
            path, content = self.older, _read(self.older)
            print(
                f"warning: {damage}; going on from the state before it, step {content['progress']['step']}", flush=True
            )
        there = content["fingerprint"]
        pairs = {key: (there.get(key), self.fingerprint.get(key)) for key in there | self.fingerprint}
        changed = [(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]
        differing = "; ".join(f"{key} {then!r} there, {now!r} now" for key, then, now in changed)
        if differing and wanted != "auto":
            raise InputError(
                f"{path} belongs to a run with other settings: {differing}; repeat them or use --resume never"
            )
        if differing:
            if path == self.path:
                self.older.unlink(missing_ok=True)
            print(f"not resuming {path.name}: {differing}; it is kept as {keep_previous(path).name}", flush=True)
            return None
        return path

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"], strict=True)
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        if self.accelerator.scaler is not None and content["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.progress, self._ours = Progress(**{"start": self.progress.start} | content["progress"]), True
        if len(content["random"]) != self.accelerator.num_processes:  # dropout is drawn anew
            return
        state = content["random"][self.accelerator.process_index]
        random.setstate((state["python"][0], tuple(state["python"][1]), state["python"][2]))
        torch.set_rng_state(state["torch"])
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])

    def finish(self) -> None:
        """The run is complete: nothing is left to resume."""
        if self.accelerator.is_main_process:
            self.older.unlink(missing_ok=True)  # first: alone it would look like a run to resume
            self.path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    content = read_torch_file(path, "training state")
    if content.get("format") != STATE_FORMAT:
        raise InputError(f"{path} is not a training state: expected the *_state.pt that an interrupted run leaves")
    return content


def started_from(path: Path) -> dict[str, Any]:
    """The settings of the interrupted run whose state this is; nothing where there is none that can be read."""
    try:
        return _read(path)["fingerprint"]
    except InputError:  # :meth:`TrainState.resume` reports it
        return {}


def _generators() -> dict[str, Any]:
    """States of this process's random-number generators."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def fingerprint(args: argparse.Namespace, config: Config, processes: int = 1, **extra: Any) -> dict[str, Any]:
    """The settings that an interrupted run and the resumed one must share: of a step's cases their number, however they
    are divided into batches and processes; where cases of a batch are compared with each other, the batch too. Tables
    and Stage 0's adapters count by content as well."""
    extra["cases_per_step"] = args.batch_size * args.grad_accumulation * processes
    if extra.get("objective") == "align":
        extra["cases_per_batch"] = args.batch_size * processes
    flags = ("epochs", "lr", "seed", "warmup_ratio", "weight_decay", "max_grad_norm")
    where_only = {"output_dir", "cache_dir", "num_workers", "memory_cache_mb", "path_map"}
    where_only |= {"llm_checkpointing", "gpu_memory_fraction"}
    settings = {key: value for key, value in config.to_dict().items() if key not in where_only}
    for key in ("caption_csv_train", "caption_csv_val", "language_model_adapters"):
        if getattr(config, key):
            settings[f"content of {key}"] = file_digest(config.resolved(key)).hex()[:12]
    return {**settings, **{flag: getattr(args, flag) for flag in flags}, "state_version": STATE_VERSION, **extra}
