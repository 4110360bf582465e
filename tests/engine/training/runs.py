"""Runs of the stage scripts in processes of their own, which can be killed.

A server imports everything once, and each run is forked from it: seconds of imports are paid once, not per run.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from config.schema import load_config, write_config

CASES = 13  # divided by no batch size
DEADLINE = 600  # seconds, on a machine that does much else
TABLE, EXACT = "table.csv", "exact.yaml"


def _run(script: str, words: list[str], log: Path, env: Mapping[str, str], fault: Callable[[], None] | None) -> None:
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as a run from a shell has it
    if fault is not None:
        fault()
    with log.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = [f"{script}.py", *words]
    torch.set_num_threads(1)
    from engine.cli import run_main

    run_main(importlib.import_module(script).main)


class Runs:
    """Starts runs of one configuration. ``config``: see :func:`make_config`."""

    def __init__(self, config: Path) -> None:
        self.config, self.exact = config, config.with_name(EXACT)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["train", "train_vlm"])

    def start(
        self,
        script: str,
        folder: Path,
        *flags: str,
        env: Mapping[str, str] | None = None,
        fault: Callable[[], None] | None = None,
    ) -> BaseProcess:
        """A run that writes into ``folder``, its output appended to a log; ``fault`` is called before it."""
        words = ["--config", str(self.config), "--output_dir", str(folder), "--mixed_precision", "no", *flags]
        log = self.log_of(folder)
        process = self.context.Process(
            target=_run, args=(script, words, log, {"OMP_NUM_THREADS": "1", **(env or {})}, fault)
        )
        process.start()
        return process

    def log_of(self, folder: Path) -> Path:
        """Not beside the run, whose disk may be full."""
        log = self.config.parent / "logs" / f"{str(folder).strip('/').replace('/', '_')}.log"
        log.parent.mkdir(exist_ok=True)
        return log

    def start_two(self, script: str, folder: Path, *flags: str) -> list[BaseProcess]:
        """One run in two processes, which exchange gradients by gloo."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
        ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(2))
        return [self.start(script, folder, *flags, env=rank) for rank in ranks]

    def finish(self, process: BaseProcess, folder: Path, status: int = 0) -> str:
        """Wait for a run to end with ``status``. Returns all that it has printed."""
        process.join(DEADLINE)
        log = self.log_of(folder).read_text(encoding="utf-8", errors="replace")
        assert process.exitcode == status, f"exit code {process.exitcode}\n{log[-3000:]}"
        return log

    def run(
        self, script: str, folder: Path, *flags: str, status: int = 0, fault: Callable[[], None] | None = None
    ) -> str:
        return self.finish(self.start(script, folder, *flags, fault=fault), folder, status)

    def run_two(self, script: str, folder: Path, *flags: str) -> str:
        processes = self.start_two(script, folder, *flags)
        return [self.finish(process, folder) for process in processes][0]


def make_config(small_training: Path, assets: Path, folder: Path) -> Path:
    """Augmentation, dropout in the encoder, errors and absence of findings prompts, a loader worker. Beside it
    ``EXACT``, without that dropout, which is drawn by each process for itself."""
    lines = ["image_path,question,answer,mask_path"]
    for row in range(CASES):
        lesion = f"所见：右肺上野见结节，大小约{10 + row}mm。结论：右肺上野结节{row}。"
        report = lesion if row % 4 else f"所见：双肺清晰。结论：正常{row}。"
        scan = small_training / str(row % 4)
        lines.append(f"{scan}.nii.gz,Q?,{report},{scan}_mask.nii.gz")
    (folder / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    tables = dict.fromkeys(("caption_csv_train", "caption_csv_val"), str(folder / TABLE))
    changed = {"augment_shift": 3, "augment_rotate": 5.0, "augment_noise": 0.1, "num_workers": 1}
    changed |= {"slice_policy": "mask", "cache_dir": str(folder / "cache")}
    config = load_config(small_training / "paths.yaml", **tables, **changed)
    write_config(config, folder / EXACT)
    network = with_dropout(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth", folder)
    write_config(config.replace(nnunet_encoder_checkpoint=str(network)), folder / "runs.yaml")
    return folder / "runs.yaml"


def with_dropout(checkpoint: Path, folder: Path) -> Path:
    """The same nnU-Net with dropout in every block."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=False)

    def add(node: Any) -> None:
        for key, value in list(node.items()) if isinstance(node, dict) else ():
            if key == "dropout_op":
                node["dropout_op"], node["dropout_op_kwargs"] = "torch.nn.Dropout2d", {"p": 0.2}
            add(value)

    add(content["init_args"]["plans"])
    weights = content["network_weights"]
    content["network_weights"] = {re.sub(r"all_modules\.1\.", "all_modules.2.", name): w for name, w in weights.items()}
    torch.save(content, folder / "dropout.pth")
    return folder / "dropout.pth"


def weights(path: Path) -> dict[str, torch.Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {**content["model_state_dict"], **{f"val {content['epoch']}": torch.tensor(content["val_loss"])}}


def differing(a: Path, b: Path) -> dict[str, float]:
    """Largest difference of each tensor that is not the same to the last bit."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    return {name: float((first[name].double() - second[name].double()).abs().max()) for name in different}


def history(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The records of a run's log."""
    return [json.loads(line) for line in (folder / f"{stage}_log.jsonl").read_text(encoding="utf-8").splitlines()]


def kill_at(process: BaseProcess, when: Callable[[], bool], deadline: float = DEADLINE) -> bool:
    """SIGKILL as soon as ``when`` holds. Returns whether the process was still running."""
    end = time.monotonic() + deadline
    while process.is_alive() and not when() and time.monotonic() < end:
        time.sleep(0.0005)
    alive = process.is_alive()
    process.kill()
    process.join()
    return alive


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
