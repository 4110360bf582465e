"""Starting a run: seeds, devices, the output folder, and the resolved configuration in it before step 0."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, ProjectConfiguration
from torch.utils.data import Sampler

from config.errors import InputError, counted
from config.files import write_text
from config.schema import Config, write_config
from data.medical_vlm_dataset import Draw
from engine.guards import hold_folder
from engine.parallel import on_main, start_accelerator
from models.language_model.cpu_decode import is_native

logger = logging.getLogger(__name__)

WINDOWS_FRACTION = 0.95  # of the GPU's memory
_FREE: dict[int, int] = {}  # bytes of each card that other programs had left when this one began


def set_seeds(seed: int) -> None:
    """Python, NumPy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_bf16() -> bool:
    """Whether the device computes in bfloat16 itself; where it is emulated it is slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return is_native(torch.bfloat16)


def limit_gpu_memory(fraction: float | None) -> None:
    """Let this process take no more than a fraction of the current GPU's memory (``gpu_memory_fraction``); on Windows
    by default .95 of it, less where other programs hold more than the rest.

    Windows' driver moves what does not fit into the computer's memory, without an error and ten times slower; within
    the limit torch says that the memory is full. Raises InputError: not above 0 and up to 1.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(f"gpu_memory_fraction is {fraction:g}, expected above 0, up to 1; empty: 0.95 on Windows")
    if not torch.cuda.is_available():
        return
    card = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(card)
    _FREE[card] = free + torch.cuda.memory_reserved(card)
    if fraction is None and os.name == "nt":
        fraction = min(WINDOWS_FRACTION, _FREE[card] / total)
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, card)


def warn_of_spilling(device: torch.device) -> None:
    """Log once on Windows that torch has reserved more than other programs had left, as a ``gpu_memory_fraction`` of
    one's own allows: the driver keeps that in the computer's memory."""
    if device.type != "cuda" or os.name != "nt":
        return
    card = torch.cuda.current_device() if device.index is None else device.index
    reserved, free = torch.cuda.memory_reserved(card), _FREE.get(card)
    if free is not None and reserved > free:
        del _FREE[card]
        logger.warning(
            "%.1f GiB are reserved on a card that had %.1f GiB free: the driver keeps the rest in the computer's "
            "memory, which is ten times slower; lower --batch_size or max_visual_tokens, or empty gpu_memory_fraction",
            reserved / 2**30,
            free / 2**30,
        )


def start_run(args: argparse.Namespace, config: Config, name: str) -> tuple[Accelerator, Path]:
    """Seeds, accelerator and output folder of a training run, which it holds; writes what was resolved.

    ``OUTPUT/<name>_config.yaml`` can be given to ``--config``; ``OUTPUT/<name>_run.json`` holds the
    flags, the versions and the machine.
    """
    set_seeds(args.seed)
    check_tracker(args.tracker)
    automatic = "bf16" if native_bf16() else "no"
    output = config.resolved("output_dir")
    accelerator = start_accelerator(
        mixed_precision=automatic if args.mixed_precision == "auto" else args.mixed_precision,
        log_with=args.tracker,
        project_config=ProjectConfiguration(logging_dir=str(output / "tracker")),
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise InputError("--mixed_precision fp16 needs a GPU, and none is used here: bf16, no or auto")
    limit_gpu_memory(config.gpu_memory_fraction)  # of the card that accelerate has chosen for this process
    on_main(accelerator, lambda: hold_folder(output))
    if accelerator.is_main_process:
        write_config(config, output / f"{name}_config.yaml")
        record = {"command": sys.argv, "flags": vars(args), "config": config.to_dict(), **environment()}
        text = json.dumps(record, ensure_ascii=False, indent=1, default=str)
        write_text(output / f"{name}_run.json", text)
        device = f"device {accelerator.device}, {counted(accelerator.num_processes, 'process')}"
        run = f"precision {accelerator.mixed_precision}, seed {args.seed}, output {output}"
        print(f"{name}: {device}, {run}", flush=True)
    if args.tracker:
        settings = config.to_dict() | vars(args)
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


class EpochBatches(Sampler[list[Draw]]):
    """This process's batches of an epoch.

    The order is a permutation that depends on seed and epoch alone, so that a resumed epoch goes on in it. Of every
    ``batch_size`` x processes cases each process takes a part as large as the others', at the end of the epoch too: the
    batches of all processes together are those of one process. One that gets no case repeats one that does not count.
    """

    def __init__(self, length: int, seed: int, batch_size: int, process: int = 0, processes: int = 1) -> None:
        """``batch_size``: cases of each process."""
        self.length, self.seed = length, seed
        self.process, self.processes, self.together = process, processes, batch_size * processes
        self.epoch, self.skip = 0, 0

    def start_epoch(self, epoch: int, skip: int = 0) -> None:
        """``skip``: cases of this epoch, of all processes, that an interrupted run has seen already."""
        self.epoch, self.skip = epoch, skip

    def __iter__(self) -> Iterator[list[Draw]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(self.length, generator=generator)[self.skip :].tolist()
        for first in range(0, len(order), self.together):
            cases = order[first : first + self.together]
            begin, end = (len(cases) * (self.process + k) // self.processes for k in (0, 1))
            mine = [Draw(row, self.epoch) for row in cases[begin:end]]
            yield mine or [Draw(cases[0], self.epoch, counts=False)]

    def __len__(self) -> int:
        return -(-(self.length - self.skip) // self.together)
