"""The state of an unfinished run, from which it is resumed exactly.

Weights, optimizer, schedule, gradient scaler, random-number generators, and the position in the epoch. It is written
atomically every ``--save_every`` steps, at each epoch's end and on Ctrl-C, and removed when the run is complete.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from config.errors import InputError
from config.files import keep_previous
from config.schema import Config
from engine.checkpoint import read_torch_file, save_torch_file

STATE_FORMAT = "mamba-ct-report-state"


@dataclass
class Progress:
    """The position of a run. ``best``: lowest validation loss so far; ``history``: one record per epoch."""

    epoch: int = 0
    batch: int = 0  # finished batches of this epoch, per process
    step: int = 0
    best: float = float("inf")
    history: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of this epoch, for its mean


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

    def save(self) -> None:
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
            "random": {
                "python": random.getstate(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
        }
        save_torch_file(content, self.path)

    def resume(self, wanted: str) -> bool:
        """``auto``: resume an interrupted run with the same settings, if there is one; ``never``: start anew; a path:
        resume from that file or refuse. Returns whether the run is resumed.

        Raises InputError: the named file is missing, unreadable, or of a run with other settings.
        """
        path = self.path if wanted == "auto" else Path(wanted)
        if wanted == "never" or (wanted == "auto" and not path.is_file()):
            return False
        content = read_torch_file(path, "training state")
        if content.get("format") != STATE_FORMAT:
            raise InputError(f"{path} is not a training state: expected the *_state.pt that an interrupted run leaves")
        there = content["fingerprint"]
        changed = [(key, there.get(key), now) for key, now in self.fingerprint.items() if there.get(key) != now]
        differing = "; ".join(f"{key} {then!r} there, {now!r} now" for key, then, now in changed)
        if differing and wanted != "auto":
            raise InputError(
                f"{path} belongs to a run with other settings: {differing}; repeat them or use --resume never"
            )
        if differing:
            if self.accelerator.is_main_process:
                print(f"not resuming {path.name}: {differing}; it is kept as {keep_previous(path).name}", flush=True)
            return False
        self._restore(content)
        return True

    def _restore(self, content: dict[str, Any]) -> None:
        self.model.load_state_dict(content["model"], strict=True)
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        if self.accelerator.scaler is not None and content["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        state = content["random"]
        random.setstate((state["python"][0], tuple(state["python"][1]), state["python"][2]))
        torch.set_rng_state(state["torch"])
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        self.progress = Progress(**content["progress"])

    def finish(self) -> None:
        """The run is complete: nothing is left to resume."""
        if self.accelerator.is_main_process:
            self.path.unlink(missing_ok=True)


def fingerprint(args: argparse.Namespace, config: Config, **extra: Any) -> dict[str, Any]:
    """The settings that an interrupted run and the resumed one must share."""
    flags = ("epochs", "batch_size", "lr", "seed", "grad_accumulation", "warmup_ratio", "weight_decay", "max_grad_norm")
    where_only = {"output_dir", "cache_dir", "num_workers", "memory_cache_mb", "path_map", "llm_checkpointing"}
    settings = {key: value for key, value in config.to_dict().items() if key not in where_only}
    return {**settings, **{flag: getattr(args, flag) for flag in flags}, **extra}
