"""Starting a run: seeds, devices, the output folder, and the resolved configuration in it before step 0."""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, LoggerType, ProjectConfiguration
from torch.utils.data import Sampler

from config.errors import InputError, counted
from config.schema import Config, write_config


def set_seeds(seed: int) -> None:
    """Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def native_bf16() -> bool:
    """Whether the device computes in bfloat16 itself; where it is emulated it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def start_run(args: argparse.Namespace, config: Config, name: str) -> tuple[Accelerator, Path]:
    """Seeds, accelerator and output folder of a training run; writes what was resolved.

    ``OUTPUT/<name>_config.yaml`` can be given to ``--config``; ``OUTPUT/<name>_run.json`` holds the
    flags, the versions and the machine.
    """
    set_seeds(args.seed)
    check_tracker(args.tracker)
    automatic = "bf16" if native_bf16() else "no"
    output = config.resolved("output_dir")
    accelerator = Accelerator(
        log_with=args.tracker,
        project_config=ProjectConfiguration(logging_dir=str(output / "tracker")),
        mixed_precision=automatic if args.mixed_precision == "auto" else args.mixed_precision,
        gradient_accumulation_steps=args.grad_accumulation,
        # The shuffling below is already the same in every process and needs no second one.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
    )
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        write_config(config, output / f"{name}_config.yaml")
        record = {"command": sys.argv, "flags": jsonable(vars(args)), "config": config.to_dict(), **environment()}
        (output / f"{name}_run.json").write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
        device = f"device {accelerator.device}, {counted(accelerator.num_processes, 'process')}"
        run = f"precision {accelerator.mixed_precision}, seed {args.seed}, output {output}"
        print(f"{name}: {device}, {run}", flush=True)
    if args.tracker:
        settings = config.to_dict() | jsonable(vars(args))
        plain = {key: v if isinstance(v, bool | int | float | str) else str(v) for key, v in settings.items()}
        accelerator.init_trackers(f"mamba-ct-{name}", plain)
    return accelerator, output


def check_tracker(name: str | None) -> None:
    """Raises InputError where the package of a tracker is not installed: accelerate would leave it out in silence."""
    if name and LoggerType(name) not in get_available_trackers():
        raise InputError(f"--tracker {name} needs its package: pip install {name}")


def environment() -> dict[str, str]:
    """Versions and device."""
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return {"python": platform.python_version(), **versions, "platform": platform.platform(), "device": device}


def jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """Values for JSON: paths, and those in a list, as text."""
    plain = {key: list(map(str, value)) if isinstance(value, list) else value for key, value in values.items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}


class EpochShuffle(Sampler[int]):
    """A permutation that depends on seed and epoch alone, so that a resumed epoch goes on in its order."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.epoch, self.skip = 0, 0

    def start_epoch(self, epoch: int, skip: int = 0) -> None:
        """``skip``: samples of this epoch that an interrupted run has seen already."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator)[self.skip :].tolist())

    def __len__(self) -> int:
        return self.length - self.skip
