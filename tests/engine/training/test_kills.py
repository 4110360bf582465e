"""Runs that are killed with SIGKILL and resumed equal the undisturbed run to the last bit.

Augmentation, dropout, errors of findings prompts and a loader worker are on.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.training.runs import Runs, differing, history, kill_at
from tests.engine.training.test_processes import ONE, STAGES, TWO

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="runs are forked")

EPOCHS = ("--epochs", "2", "--lr", "1e-3", "--save_every", "3")
FLAGS = {"train": EPOCHS, "train_vlm": (*EPOCHS, "--from_scratch")}


class Undisturbed:
    """One run of each script that nobody kills, made when it is first asked for."""

    def __init__(self, runs: Runs, folder: Path) -> None:
        self.runs, self.folder, self.seconds = runs, folder, {}

    def of(self, script: str, two: bool = False) -> Path:
        folder = self.folder / f"{script}{'_two' if two else ''}"
        if folder not in self.seconds:
            begun = time.monotonic()
            (self.runs.run_two if two else self.runs.run)(script, folder, *(TWO if two else ONE), *FLAGS[script])
            self.seconds[folder] = time.monotonic() - begun
        return folder


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(runs, tmp_path_factory.mktemp("undisturbed"))


def inside_a_save(folder: Path) -> Callable[[], bool]:
    """While a file is written that is not under its name yet."""
    return lambda: any(folder.glob(".part-*.pt"))


def at_step(folder: Path, stage: str, step: int) -> Callable[[], bool]:
    return lambda: any(record["step"] >= step for record in _whole_records(folder, stage))


def _whole_records(folder: Path, stage: str) -> list[dict]:
    try:
        return history(folder, stage)
    except (ValueError, FileNotFoundError):  # a line is being written, or the log of a run without a state removed
        return []


def after(seconds: float) -> Callable[[], bool]:
    begun = time.monotonic()
    return lambda: time.monotonic() - begun > seconds


def check_killed(
    runs: Runs, undisturbed: Undisturbed, script: str, folder: Path, moments: list[Callable[[], Callable[[], bool]]]
) -> int:
    """Kill a run at each of ``moments``, one after the other, resume it, and compare. Returns how often it was killed:
    a run may be faster."""
    expected, killed = undisturbed.of(script), 0
    for moment in moments:
        process = runs.start(script, folder, *ONE, *FLAGS[script])
        if not kill_at(process, moment()):
            break
        killed += 1
    printed = runs.run(script, folder, *ONE, *FLAGS[script])
    assert "error" not in printed
    check_equal(expected, folder, script)
    return killed


def check_equal(expected: Path, folder: Path, script: str) -> None:
    stage, final, _ = STAGES[script]
    assert differing(expected / final, folder / final) == {}
    first, second = ([r for r in history(f, stage) if r["event"] == "epoch"] for f in (expected, folder))
    assert first == second
    left = [p.name for p in folder.iterdir() if p.name.startswith(".part") or "_state" in p.name]
    assert not left, left


@pytest.mark.parametrize("script", STAGES)
def test_killed_inside_a_save_and_between_two(
    runs: Runs, undisturbed: Undisturbed, tmp_path: Path, script: str
) -> None:
    folder, stage = tmp_path / script, STAGES[script][0]
    moments = [lambda: inside_a_save(folder), lambda: at_step(folder, stage, 4)]
    assert check_killed(runs, undisturbed, script, folder, moments)


@pytest.mark.minutes
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("script", STAGES)
def test_killed_at_random_instants(
    runs: Runs, undisturbed: Undisturbed, tmp_path: Path, script: str, seed: int
) -> None:
    """Two instants in each run: sixteen in all. A run that ends before the first is made anew, with an earlier one."""
    draw, folder = random.Random(f"{script}{seed}"), tmp_path / script
    expected = undisturbed.of(script)
    span = undisturbed.seconds[expected]
    while not kill_at(runs.start(script, folder, *ONE, *FLAGS[script]), after(draw.uniform(0.3, 0.9) * span)):
        shutil.rmtree(folder)
        span *= 0.8
    check_killed(runs, undisturbed, script, folder, [lambda: after(draw.uniform(0.2, 0.6) * span)])


@pytest.mark.minutes
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed(runs: Runs, undisturbed: Undisturbed, tmp_path: Path, victim: int) -> None:
    """The other ends by itself, in one line."""
    expected, folder = undisturbed.of("train", two=True), tmp_path / "two"
    processes = runs.start_two("train", folder, *TWO, *FLAGS["train"])
    assert kill_at(processes[victim], at_step(folder, "stage1", 4))
    printed = runs.finish(processes[1 - victim], folder, status=2)
    assert "error: another process of this run has ended" in printed and "Traceback" not in printed
    runs.run_two("train", folder, *TWO, *FLAGS["train"])
    check_equal(expected, folder, "train")


@pytest.mark.minutes
@pytest.mark.parametrize("asked", [0, 1])
def test_a_stop_request_of_one_process_stops_both(
    runs: Runs, undisturbed: Undisturbed, tmp_path: Path, asked: int
) -> None:
    expected, folder = undisturbed.of("train", two=True), tmp_path / "two"
    processes = runs.start_two("train", folder, *TWO, *FLAGS["train"])
    when = at_step(folder, "stage1", 4)
    while not when():
        time.sleep(0.01)
    processes[asked].terminate()
    for process in processes:
        assert "state saved at step" in runs.finish(process, folder, status=130)
    runs.run_two("train", folder, *TWO, *FLAGS["train"])
    check_equal(expected, folder, "train")
