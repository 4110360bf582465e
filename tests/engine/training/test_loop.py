"""The training loop: a resumed run equals the undisturbed one to the last bit; the best checkpoint is kept."""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from config.errors import InputError
from config.schema import build_config
from engine.cli import Interrupted
from engine.run import EpochShuffle, set_seeds
from engine.training.diagnostics import TokenStatistics
from engine.training.loop import Stage, train
from engine.training.optimization import build_optimizer, build_schedule

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

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) * (1 + random.random())).square().mean()


class Run:
    """One process: the objects that a training script makes, and its loop."""

    def __init__(self, folder: Path, accumulation: int = 1, epochs: int = EPOCHS, losses: tuple = (), **stage) -> None:
        set_seeds(0)
        folder.mkdir(exist_ok=True)
        self.folder, self.model, self.seen = folder, Noisy(), []
        self.accelerator = Accelerator(
            cpu=True,
            gradient_accumulation_steps=accumulation,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False),
        )
        data = TensorDataset(torch.randn(CASES, 4, generator=torch.Generator().manual_seed(1)))
        self.order = EpochShuffle(CASES, seed=0)
        loader = DataLoader(data, BATCH, sampler=self.order, generator=torch.Generator().manual_seed(0))
        self.loader = self.accelerator.prepare(loader)
        flags = {"epochs": epochs, "batch_size": BATCH, "lr": 0.02, "seed": 0, "grad_accumulation": accumulation}
        flags |= {"warmup_ratio": 0.2, "weight_decay": 0.1, "max_grad_norm": 1.0, "save_every": 99, "resume": "auto"}
        self.args = argparse.Namespace(**flags)
        self.saved: list[tuple] = []
        self.losses = iter(losses)
        values = {"name": "test", "title": "", "best_file": "best", "final_file": "final", "loss_name": "train_loss"}
        self.stage = Stage(
            **{**values, "log_every": 4, "model": self.model, "trained": self.model, "loss": self._loss,
               "validate": self._validate, "save": self._save, **stage}
        )  # fmt: skip

    def _save(self, name: str, step: int, epoch: int, val_loss: float, diagnostics: dict) -> None:
        self.saved.append((name, step, epoch, val_loss))

    def _loss(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        self.seen.append(float(batch[0].sum()))
        loss = model(batch[0])
        return loss, loss

    def _validate(self) -> tuple[float, TokenStatistics]:
        value = next(self.losses, None)
        val_loss = sum(p.abs().sum().item() for p in self.model.parameters()) if value is None else value
        return val_loss, TokenStatistics(0.1, 0.1, 9.0, 0.1)

    def train(self, stop_at: int | None = None) -> list[dict]:
        """Returns the history; with ``stop_at`` Ctrl-C comes in that optimizer step."""
        if stop_at is None:
            return train(self.stage, self.args, CONFIG, self.accelerator, self.folder, self.loader, self.order)
        batches = stop_at * self.args.grad_accumulation
        counted = self._loss

        def interrupting(model: nn.Module, batch: list[Tensor]) -> Tensor:
            if len(self.seen) + 1 == batches:
                os.kill(os.getpid(), signal.SIGINT)
            return counted(model, batch)

        self.stage.loss = interrupting
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


def test_the_best_and_the_final_checkpoint_are_saved(tmp_path):
    run = Run(tmp_path, losses=(0.5, 0.3, 0.4))
    history = run.train()
    assert run.saved == [("best", 6, 1, 0.5), ("best", 12, 2, 0.3), ("final", 18, 3, 0.4)]
    assert [record["epoch"] for record in history] == [1, 2, 3] and all(r["train_loss"] > 0 for r in history)


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
    run.stage.loss = lambda model, batch: (model(batch[0]) * math.nan,) * 2
    with pytest.raises(InputError, match="non-finite loss .* at step 1"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())


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
