"""The training loop: a resumed run equals the undisturbed one to the last bit; the best checkpoint is kept."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import math
import os
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from config.errors import InputError
from config.schema import build_config
from data.medical_vlm_dataset import Draw
from engine.cli import Interrupted
from engine.run import EpochBatches, set_seeds
from engine.training import guards
from engine.training.diagnostics import TokenStatistics
from engine.training.guards import Alarms, Reader
from engine.training.loop import Stage, train
from engine.training.optimization import build_optimizer, build_schedule, optimizer_step

CASES, BATCH, EPOCHS = 12, 2, 3
CONFIG = build_config({}, "test")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process on Windows")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state per process; each run here stands for a process of its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Noisy(nn.Module):
    """Draws from torch's generator (dropout) and from Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (self.net(batch["images"]) * (1 + random.random())).square().sum()[None]


class Cases(Dataset):
    """Rows as :class:`MedicalVLMDataset` has them, that can be read without a file."""

    def __init__(self) -> None:
        self.images = torch.randn(CASES, 4, generator=torch.Generator().manual_seed(1))
        self.rows = [
            SimpleNamespace(number=n + 2, image_path=Path(f"{n}.nii.gz"), answer="a" * n) for n in range(CASES)
        ]

    def __len__(self) -> int:
        return CASES

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int]:
        return self.images[draw.row], draw.row


def collate(samples: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
    return {"images": torch.stack([image for image, _ in samples]), "row": torch.tensor([row for _, row in samples])}


def counts(batch: dict[str, Tensor]) -> Tensor:
    return torch.tensor([len(batch["row"])])


def measuring() -> bool:
    """Whether the forward pass is one of those that measure memory before the first step."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "measure":
        frame = frame.f_back
    return frame is not None


class Run:
    """One process: the objects that a training script makes, and its loop."""

    def __init__(self, folder: Path, accumulation: int = 1, epochs: int = EPOCHS, losses: tuple = (), **stage) -> None:
        set_seeds(0)
        folder.mkdir(exist_ok=True)
        self.folder, self.model, self.seen, self.stop_at = folder, Noisy(), [], 0
        self.accelerator = Accelerator(cpu=True)
        self.order, self.data = EpochBatches(CASES, 0, BATCH), Cases()
        options = {"collate_fn": collate, "generator": torch.Generator().manual_seed(0)}
        self.loader = DataLoader(self.data, batch_sampler=self.order, **options)
        self.model.register_forward_pre_hook(self._see)
        flags = {"epochs": epochs, "batch_size": BATCH, "lr": 0.02, "seed": 0, "grad_accumulation": accumulation}
        flags |= {"warmup_ratio": 0.2, "weight_decay": 0.1, "max_grad_norm": 1.0, "save_every": 99, "resume": "auto"}
        flags |= {"auto_batch": False}
        self.args = argparse.Namespace(**flags)
        self.saved: list[tuple] = []
        self.losses = iter(losses)
        values = {"name": "test", "title": "", "best_file": "best", "final_file": "final", "loss_name": "train_loss"}
        self.stage = Stage(
            **{**values, "log_every": 4, "model": self.model, "trained": self.model, "loss_counts": counts,
               "validate": self._validate, "save": self._save, **stage}
        )  # fmt: skip

    def _save(self, name: str, step: int, epoch: int, val_loss: float, diagnostics: dict) -> None:
        self.saved.append((name, step, epoch, val_loss))

    def _see(self, model: nn.Module, arguments: tuple[dict[str, Tensor]]) -> None:
        if not measuring():
            self.seen.append(arguments[0]["row"].tolist())
            if len(self.seen) == self.stop_at:
                os.kill(os.getpid(), signal.SIGINT)

    def _validate(self) -> tuple[float, TokenStatistics]:
        value = next(self.losses, None)
        val_loss = sum(p.abs().sum().item() for p in self.model.parameters()) if value is None else value
        return val_loss, TokenStatistics(0.1, 0.1, 9.0, 0.1)

    @property
    def state(self) -> dict:
        """What was saved last."""
        return torch.load(self.folder / "test_state.pt", weights_only=True)

    def train(self, stop_at: int | None = None) -> list[dict]:
        """Returns the history; with ``stop_at`` Ctrl-C comes in that optimizer step."""
        if stop_at is None:
            return train(self.stage, self.args, CONFIG, self.accelerator, self.folder, self.loader, self.order)
        self.stop_at = stop_at * self.args.grad_accumulation
        with pytest.raises(Interrupted, match=f"state saved at step {stop_at}; the same command goes on"):
            train(self.stage, self.args, CONFIG, self.accelerator, self.folder, self.loader, self.order)
        return []


@pytest.mark.parametrize(("accumulation", "stop_at"), [(1, 1), (1, 4), (1, 6), (1, 7), (1, 17), (2, 2), (2, 3)])
def test_interrupted_and_resumed_equals_straight_through(tmp_path, accumulation, stop_at):
    """In the middle of an epoch, at its end (6, or 3 with accumulation), and in the next."""
    straight = Run(tmp_path / "straight", accumulation)
    history = straight.train()
    drawn = torch.get_rng_state(), random.getstate()

    interrupted = Run(tmp_path / "resumed", accumulation)
    interrupted.train(stop_at)
    torch.manual_seed(99), random.seed(99)
    resumed = Run(tmp_path / "resumed", accumulation)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter.add_(1)  # what is restored must not depend on the start
    assert resumed.train() == history

    assert interrupted.seen + resumed.seen == straight.seen, "the same cases in the same order, none twice"
    for name, value in straight.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert torch.equal(torch.get_rng_state(), drawn[0]) and random.getstate() == drawn[1]
    assert interrupted.saved + resumed.saved == straight.saved
    assert not list((tmp_path / "resumed").glob("*_state.pt")), "nothing is left to resume"


def test_the_best_and_the_final_checkpoint_are_saved_and_the_losses_drawn(tmp_path):
    run = Run(tmp_path, losses=(0.5, 0.3, 0.4))
    history = run.train()
    assert run.saved == [("best", 6, 1, 0.5), ("best", 12, 2, 0.3), ("final", 18, 3, 0.4)]
    assert [record["epoch"] for record in history] == [1, 2, 3] and all(r["train_loss"] > 0 for r in history)
    assert (tmp_path / "test_loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_continued_training_keeps_a_best_that_no_epoch_beats(tmp_path):
    run = Run(tmp_path, best_so_far=lambda: 0.35, losses=(0.5, 0.36, 0.36))
    run.train()
    assert [saved[0] for saved in run.saved] == ["final"]


def test_the_untrained_model_is_validated_first_where_the_stage_wants_it(tmp_path):
    run = Run(tmp_path, validate_first=True, losses=(0.2, 0.5, 0.5, 0.5))
    history = run.train()
    assert run.saved == [("best", 0, 0, 0.2), ("final", 18, 3, 0.5)]
    assert history[0]["epoch"] == 0 and history[0]["train_loss"] is None


def test_a_collapsed_epoch_is_never_the_best(tmp_path, capsys):
    run = Run(tmp_path, epochs=1)
    run.stage.validate = lambda: (0.0, TokenStatistics(0.0, 0.0, 1.0, 0.1))
    run.train()
    assert [saved[0] for saved in run.saved] == ["final"]
    assert "epoch 1 is collapsed and not saved as best" in capsys.readouterr().out


def rows(folder: Path) -> list[tuple[str, str]]:
    with (folder / "log.csv").open(encoding="utf-8", newline="") as stream:
        return [(row["step"], row["epoch"]) for row in csv.DictReader(stream)]


def test_steps_and_epochs_go_on_where_a_training_is_continued(tmp_path):
    Run(tmp_path, epochs=1, table="log.csv").train()
    assert rows(tmp_path) == [("4", "1"), ("6", "1")]
    run = Run(tmp_path, epochs=1, table="log.csv", start=(6, 1))
    run.train()
    assert rows(tmp_path) == [("4", "1"), ("6", "1"), ("10", "2"), ("12", "2")]
    assert run.saved[-1][:3] == ("final", 12, 2)
    lines = (tmp_path / "test_log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 6, 6, 10, 12, 12]
    Run(tmp_path, epochs=1, table="log.csv").train()
    assert rows(tmp_path) == [("4", "1"), ("6", "1")], "a training of its own begins its table anew"


def test_fewer_steps_than_the_print_interval_print_the_last(tmp_path, capsys):
    Run(tmp_path, epochs=1, log_every=50).train()
    assert "step 6/6  train_loss " in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tmp_path):
    run = Run(tmp_path)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.data.images[:] = math.nan
    with pytest.raises(InputError, match=r"non-finite loss nan at step 5, 5 steps in a row.*row \d+ \(\d+.nii.gz\)$"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert run.state["progress"]["step"] == 0, "the state of before the first is kept"


def test_a_step_with_a_broken_case_is_skipped_and_named(tmp_path, capsys):
    run = Run(tmp_path)
    run.data.images[3] = math.inf
    history = run.train()
    printed = capsys.readouterr().out
    assert printed.count("is skipped, non-finite") == EPOCHS
    assert "images with non-finite voxels: row 5 (3.nii.gz)\n" in printed
    assert all(math.isfinite(record["train_loss"]) for record in history) and run.saved[-1][:2] == ("final", 18)


def out_of_memory(run: Run, above: int) -> None:
    """Batches of more than ``above`` cases do not fit."""

    def hook(model: nn.Module, arguments: tuple[dict[str, Tensor]]) -> None:
        if len(arguments[0]["row"]) > above and not measuring():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run.model.register_forward_pre_hook(hook)


def test_out_of_memory_says_what_to_lower_and_keeps_the_state(tmp_path):
    run = Run(tmp_path)
    out_of_memory(run, above=1)
    lower = "lower --batch_size from 2 to 1 and raise --grad_accumulation from 1 to 2, or give --auto_batch"
    with pytest.raises(
        InputError, match=f"out of memory at step 1 with 2 cases at a time; the state is saved: {lower}"
    ):
        run.train()


def test_auto_batch_computes_in_pieces_with_the_same_result(tmp_path, capsys):
    runs = [Run(tmp_path / name, epochs=2) for name in ("whole", "pieces")]
    for run in runs:
        run.model.net[2].p = 0.0  # dropout is drawn for each piece
    out_of_memory(runs[1], above=1)
    runs[1].args.auto_batch = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "random", lambda: 0.5)
        for run in runs:
            run.train()
    assert "--auto_batch: each batch of 2 is computed 1 cases at a time" in capsys.readouterr().out
    for name, value in runs[0].model.state_dict().items():
        torch.testing.assert_close(runs[1].model.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_a_loader_that_breaks_ends_in_one_line_with_the_state_saved(tmp_path):
    run = Run(tmp_path)

    def vanishing(samples: list) -> dict[str, Tensor]:
        if len(run.seen) == 4:
            raise InputError("/ct/7.nii.gz: file not found")
        return collate(samples)

    run.loader.collate_fn = vanishing
    with pytest.raises(InputError, match="^/ct/7.nii.gz: file not found; the state is saved, the same command goes on"):
        run.train()
    assert run.state["progress"]["step"] == 4
    resumed = Run(tmp_path)
    history = resumed.train()
    straight = Run(tmp_path / "straight")
    assert straight.train() == history and run.seen + resumed.seen == straight.seen


@pytest.mark.parametrize(("start", "batch", "warns"), [(60, 1, False), (0, 25, True), (60, 25, True)])
def test_the_start_of_the_workers_is_no_slow_disk(monkeypatch, start, batch, warns):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(guards, "time", clock)

    def loader():
        clock.now += start
        for number in range(3):
            clock.now += batch
            yield number

    reader = Reader(loader(), save=None)
    for _ in reader.windows(1):
        clock.now += 10  # a step
    assert ("waiting for data" in reader.slow(2)) == warns


def test_alarms():
    alarms = Alarms(lr=0.1)
    noise = [2.0, 1.0, 0.8, 1.5, 0.7, 1.4, 0.8, 1.3] * 2  # of a batch of one
    assert not any(alarms.loss(value, "loss") for value in noise)
    said = [bool(alarms.loss(value, "loss")) for value in (5.0, 5.0, math.nan, 5.0, 20.0)]
    assert said == [True, False, False, True, True], "at once, and again where it goes on"
    assert [bool(alarms.epoch(c)) for c in (True, False, True, True, True)] == [False, False, False, True, True]


@pytest.mark.parametrize(("steps", "ratio"), [(1, 0.05), (2, 0.5), (40, 0.05), (40, 0.25)])
def test_every_step_has_a_learning_rate_above_zero(steps, ratio):
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, 0.1, 0.0)
    schedule = build_schedule(optimizer, steps, ratio)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    warmup = max(1, round(steps * ratio))
    assert min(rates) > 0 and max(rates) == rates[warmup - 1] == pytest.approx(0.1)
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(rates[warmup:], reverse=True)


def test_a_gradient_scaler_outlives_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp16 scales the loss: its step after one that was left out must not fail."""
    accelerator, parameter = Accelerator(cpu=True), torch.nn.Parameter(torch.ones(1))
    accelerator.scaler, accelerator.native_amp = torch.amp.GradScaler("cpu", init_scale=4.0), True
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")  # which accelerate refuses on a CPU
    optimizer = accelerator.prepare(torch.optim.SGD([parameter], lr=0.1))
    schedule = build_schedule(optimizer, 9, 0.0)
    stepped = []
    for factor in (1.0, math.nan, 1.0):
        loss = (factor * parameter).sum()
        accelerator.scaler.scale(loss).backward()
        result = optimizer_step(accelerator, optimizer, schedule, [parameter], 9.0, loss.detach(), False)
        stepped.append(result.stepped)
    assert stepped == [True, False, True] and parameter.isfinite().all()
    stepped = []
    for _ in range(4):  # infinite gradients of a finite loss, whatever the scale
        accelerator.scaler.scale((parameter * 0).sqrt().sum()).backward()
        stepped.append(
            optimizer_step(accelerator, optimizer, schedule, [parameter], 9.0, torch.ones(()), False).stepped
        )
    assert stepped[0] and not stepped[-1] and parameter.isfinite().all()
