"""Faults from outside, injected one by one: what happens, and that nothing is lost.

The table of docs/nights.md is made of what these runs print:  UPDATE_DOCS=1 python -m pytest -m minutes THIS_FILE
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from config.schema import REPOSITORY, load_config, write_config
from tests.engine.training.runs import Runs, kill_at, make_config
from tests.engine.training.test_kills import FLAGS, Undisturbed, at_step, check_equal
from tests.engine.training.test_processes import ONE

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(sys.platform == "win32", reason="runs are forked"),
]
PAGE = REPOSITORY / "docs" / "nights.md"
BEGIN, END = "<!-- faults: written by tests/engine/training/test_faults.py -->", "<!-- end of faults -->"
ROWS: dict[str, tuple[str, str]] = {}  # fault → what is printed, what is lost


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(runs, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    if os.environ.get("UPDATE_DOCS"):
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        there, after = rest.split(END)
        known = dict(re.findall(r"^\| ([^|]+) \| ([^|]+ \| [^|]+) \|$", there, re.MULTILINE))
        rows = {**{name: cells for name, cells in known.items() if name != "fault" and "---" not in name},
                **{name: f"`{said}` | {lost}" for name, (said, lost) in ROWS.items()}}  # fmt: skip
        lines = ["| fault | what the run says | what is lost |", "| --- | --- | --- |"]
        lines += [f"| {name} | {cells} |" for name, cells in rows.items()]
        PAGE.write_text("\n".join([before + BEGIN, *lines, END + after]), encoding="utf-8")


def note(fault: str, printed: str, pattern: str, lost: str = "nothing: the same run to the last bit") -> None:
    """A row of the table: the line of ``printed`` that matches. Raises AssertionError where there is none, or a
    traceback."""
    assert "Traceback" not in printed, printed[-2000:]
    found = [line for line in printed.splitlines() if re.search(pattern, line)]
    assert found, printed[-2000:]
    line = re.sub(r"/\S*/(?=[\w.-]+)", "", found[-1].strip())  # without folders, and numbers of processes
    line = re.sub(r"(?<=part-)\d+|(?<=pid )\d+", "N", line)
    ROWS[fault] = (re.sub(r"\|", "/", line), lost)


class Place:
    """One run with its fault."""

    def __init__(self, runs: Runs, undisturbed: Undisturbed, folder: Path) -> None:
        self.runs, self.folder = runs, folder
        self.expected = undisturbed.of("train")

    def start(self, *flags: str, fault: Callable[[], None] | None = None):
        return self.runs.start("train", self.folder, *ONE, *FLAGS["train"], *flags, fault=fault)

    def until_step(self, step: int, *flags: str, fault: Callable[[], None] | None = None):
        """Start, and wait until the log has ``step``."""
        process, when = self.start(*flags, fault=fault), at_step(self.folder, "stage1", step)
        while process.is_alive() and not when():
            time.sleep(0.002)
        assert process.is_alive()
        return process

    def ends(self, process, status: int = 2) -> str:
        return self.runs.finish(process, self.folder, status)

    def resume_and_compare(self, *flags: str) -> str:
        printed = self.runs.run("train", self.folder, *ONE, *FLAGS["train"], *flags)
        check_equal(self.expected, self.folder, "train")
        return printed


@pytest.fixture
def place(runs: Runs, undisturbed: Undisturbed, tmp_path: Path) -> Place:
    return Place(runs, undisturbed, tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(disk)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as stream:
        for size in (2**20, 2**16, 2**12):
            while shutil.disk_usage(disk).free >= size:
                stream.write(bytes(size))


def test_the_disk_fills_up(runs: Runs, undisturbed: Undisturbed, small_disk: Path) -> None:
    place = Place(runs, undisturbed, small_disk / "run")
    (small_disk / "half").write_bytes(bytes(20 * 2**20))
    process = place.until_step(4)
    fill(small_disk)
    printed = place.ends(process)
    (small_disk / "filler").unlink()
    place.resume_and_compare()
    note("the disk fills up while a state is written", printed, "No space left on device")


def test_the_disk_is_full_at_the_start(runs: Runs, undisturbed: Undisturbed, small_disk: Path) -> None:
    place = Place(runs, undisturbed, small_disk / "run")
    fill(small_disk)
    note(
        "too little room on the disk at the start",
        place.ends(place.start()),
        "the disk of",
        "nothing: it has not begun",
    )


def test_the_folder_is_read_only(runs: Runs, undisturbed: Undisturbed, small_disk: Path) -> None:
    place = Place(runs, undisturbed, small_disk / "run")
    kill_at(place.until_step(4), lambda: True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    printed = place.ends(place.start())
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    place.resume_and_compare()
    note("the folder has become read-only", printed, "Read-only file system")


@pytest.mark.parametrize("how", ["truncated", "one byte flipped"])
def test_the_newest_state_is_damaged(place: Place, how: str) -> None:
    state, older = place.folder / "stage1_state.pt", place.folder / "stage1_state.older.pt"
    kill_at(place.until_step(4), lambda: older.is_file() and state.is_file())
    content = bytearray(state.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    state.write_bytes(content)
    note(f"the newest state: {how}", place.resume_and_compare(), "going on from the state before it")


def nan_image() -> None:
    from data.medical_vlm_dataset import MedicalVLMDataset

    read = MedicalVLMDataset.__getitem__

    def broken(self, index):
        sample = read(self, index)
        if sample.row == 3 and isinstance(index, tuple):
            sample.images[:] = float("nan")
        return sample

    MedicalVLMDataset.__getitem__ = broken


def test_a_case_is_not_finite(place: Place) -> None:
    printed = place.ends(place.start(fault=nan_image), status=0)
    note("a case gives NaN", printed, "is skipped", "that step, in each epoch; the run goes on")


def little_memory() -> None:
    import torch

    from engine.training import optimization

    whole = optimization.cut

    def cut(batch, pieces):
        if len(batch["row"]) / pieces > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(batch, pieces)

    optimization.cut = cut


def test_memory_runs_out(place: Place) -> None:
    printed = place.ends(place.start(fault=little_memory))
    note("memory runs out", printed, "^error: out of memory", "nothing: it goes on with the flags that it names")
    printed = place.ends(place.start("--auto_batch", fault=little_memory), status=0)
    note("memory runs out, with --auto_batch", printed, "out of memory at step", "nothing: the run goes on")


def test_a_data_file_vanishes(
    small_training: Path, assets: Path, runs: Runs, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    for scan in small_training.glob("?*.nii.gz"):
        shutil.copy(scan, tmp_path)
    text = (small_training / "paths.yaml").read_text(encoding="utf-8")
    (tmp_path / "paths.yaml").write_text(text, encoding="utf-8")
    own = make_config(tmp_path, assets, tmp_path)
    write_config(load_config(own, memory_cache_mb=0, mamba_model=str(small_training / "lm")), tmp_path / "own.yaml")
    place, flags = Place(runs, undisturbed, tmp_path / "run"), ("--config", str(tmp_path / "own.yaml"))
    process = place.until_step(4, *flags)
    (tmp_path / "1.nii.gz").rename(tmp_path / "elsewhere")
    printed = place.ends(process)
    (tmp_path / "elsewhere").rename(tmp_path / "1.nii.gz")
    whole = runs.run("train", tmp_path / "whole", *ONE, *FLAGS["train"], *flags)
    place.expected = tmp_path / "whole"
    assert whole
    place.resume_and_compare(*flags)
    note("a scan vanishes during training", printed, "1.nii.gz")


def test_a_loader_worker_is_killed(place: Place) -> None:
    process = place.until_step(4)
    for child in psutil.Process(process.pid).children():
        child.kill()
    printed = place.ends(process)
    place.resume_and_compare()
    note("a loader worker is killed", printed, "data-loader worker was killed")


def jumping_clock() -> None:
    begun, real = time.monotonic(), time.time
    time.time = lambda: real() + (30 * 3600 if time.monotonic() - begun > 2 else 0)


def test_the_clock_jumps(place: Place) -> None:
    printed = place.ends(place.start(fault=jumping_clock), status=0)
    check_equal(place.expected, place.folder, "train")
    note("the clock jumps thirty hours ahead", printed, "^best: epoch")


def test_the_lock_of_a_dead_process(place: Place) -> None:
    kill_at(place.until_step(4), lambda: True)
    assert (place.folder / ".run.lock").is_file()
    note("the lock of a run that was killed", place.resume_and_compare(), "^resuming at epoch")


def test_a_second_run_in_the_folder(place: Place) -> None:
    process = place.until_step(4)
    printed = place.ends(place.start())
    assert "error" in printed
    process.join()
    check_equal(place.expected, place.folder, "train")
    line = re.sub(r"process \d+ on \w+, since [\d: -]+", "process N on HOST, since DATE", printed)
    note("a second run in the folder", line, "another run writes into", "nothing: the first run goes on")
