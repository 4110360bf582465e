"""A night of the overnight search on a training that only pretends (fake_train.py)."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import psutil
import pytest
import yaml

import engine.training.overnight as overnight
from config.nnunet_plans import PreprocessPlan
from config.schema import load_config
from engine.checkpoint import save_checkpoint
from models.medical_vlm import VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder
from scripts import run_overnight_300

SCRIPT = Path(run_overnight_300.__file__)
FAKE = Path(__file__).with_name("fake_train.py")
GRID = ["--lrs", "1e-4", "--batch_sizes", "2", "4"]
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4", "lr5e-05_bs2", "lr5e-05_bs4"]
# Processes of a server that has imported the heavy packages start within milliseconds.
CONTEXT = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
CONTEXT.set_forkserver_preload(["engine.training.overnight"])


@pytest.fixture(scope="session")
def make_checkpoint(assets: Path) -> Callable[..., None]:
    """Writes a real checkpoint of a very small vision part."""
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=1)
    config = load_config(None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=4)
    vision = VisionBridge.build(config, encoder, 8, 0.1, with_cmi=False)
    plan = PreprocessPlan.from_nnunet(source.plans, source.configuration)

    def write(path: Path, val_loss: float, *, epoch: int = 3, collapsed: bool = False) -> None:
        options = {"stage": "vision", "step": 9, "config": config, "plan": plan, "llm": {}, "epoch": epoch}
        options["diagnostics"] = {"token_std": 1e-9 if collapsed else 0.1, "collapsed": collapsed}
        save_checkpoint(path, vision, val_loss=val_loss, **options)

    return write


class Night:
    """A folder with a configuration and plans for the fake training, and the script run on it."""

    script = run_overnight_300

    def __init__(self, root: Path, make_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
        self.make_checkpoint, self.monkeypatch = make_checkpoint, monkeypatch
        self.plans, self.out, self.config = root / "plans", root / "out put", root / "paths.yaml"
        self.plans.mkdir(parents=True)
        keys = {"caption_csv_train": "train.csv", "caption_csv_val": "val.csv", "nnunet_encoder_checkpoint": "net.pth"}
        for name in keys.values():
            (root / name).write_text(name, encoding="utf-8")
        content = {key: str(root / name) for key, name in keys.items()} | {"output_dir": str(self.out)}
        self.config.write_text(yaml.safe_dump(content), encoding="utf-8")
        storage = optuna.storages.InMemoryStorage()  # faster than a database, which start() needs
        monkeypatch.setattr(overnight, "RDBStorage", lambda *args, **options: storage)
        for number, name in enumerate(NAMES):
            self.plan(name, val_loss=0.1 * (number + 1))

    def plan(
        self,
        name: str,
        *,
        val_loss: float = 0.1,
        steps: int = 1,
        status: int = 0,
        message: str = "",
        curve: list[float] | None = None,
        **options,
    ):
        """What the fake training does for one run. ``best=False``: every epoch collapsed."""
        best = f"{name}.pt" if options.pop("best", True) else None
        self.make_checkpoint(self.plans / f"{name}.pt", val_loss, **options)
        content = {"steps": steps, "best": best, "final": f"{name}.pt", "status": status, "message": message}
        content |= {"curve": curve or []}
        (self.plans / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def set_flags(self, *flags: str, epochs: int = 3) -> None:
        command = ["--config", str(self.config), "--train_script", str(FAKE), "--epochs", str(epochs), *(flags or GRID)]
        self.monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command])

    def run(self, *flags: str, epochs: int = 3) -> int:
        self.set_flags(*flags, epochs=epochs)
        return self.script.main()

    def start(self, *flags: str) -> BaseProcess:
        """As a process of its own, to be killed."""
        self.set_flags(*flags)
        self.monkeypatch.setattr(overnight, "RDBStorage", optuna.storages.RDBStorage)
        process = CONTEXT.Process(target=runpy.run_path, args=(str(SCRIPT),), kwargs={"run_name": "__main__"})
        process.start()
        return process

    def calls(self, name: str) -> list[int]:
        """At which step each start of a run began."""
        path = self.plans / f"{name}.calls"
        return [int(line) for line in path.read_text(encoding="utf-8").split()] if path.is_file() else []

    def folder(self, name: str) -> Path:
        return next((self.out / "overnight").glob(f"*/{name}"))

    def wait_for_step(self, name: str, step: int) -> None:
        """Until the state of an unfinished run is as far."""

        def is_reached() -> bool:
            with suppress(OSError):  # it may end in this moment
                return any(int(state.read_text()) >= step for state in self.out.glob(f"*/*/{name}/stage?_state.pt"))
            return False

        self.wait_until(is_reached)

    @staticmethod
    def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.02)

    @staticmethod
    def kill_tree(process: BaseProcess) -> None:
        """kill -9 for a script and the run that it started (which is in a session of its own)."""
        script = psutil.Process(process.pid)
        family = [script, *script.children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=20)

    @property
    def summary(self) -> str:
        return (self.out / "overnight_best_summary.txt").read_text(encoding="utf-8")

    @property
    def board(self) -> list[dict[str, str]]:
        with (self.out / "overnight_leaderboard.csv").open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream))


@pytest.fixture
def night(tmp_path: Path, make_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> Iterator[Night]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Night(tmp_path, make_checkpoint, monkeypatch)
    for number, handler in handlers.items():
        signal.signal(number, handler)
