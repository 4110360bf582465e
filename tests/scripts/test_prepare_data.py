"""Preparing data as a user runs it: all at once, in shards, beside another process, killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from config.schema import build_config, write_config
from data.cache import VolumeCache
from data.imaging.nifti import write_volume
from engine.loaders import load_plan

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "tests/assets/nnunet_tiny/2d_plain/fold_0/checkpoint_best.pth"
CASES = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Volumes of two minutes ago, every third with a mask, and a configuration."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    lines = ["image_path,question,answer,mask_path"]
    for case in range(CASES):
        mask = np.zeros((48, 128, 128), np.uint8)
        mask[10:14, 30:50, 40:60] = 1
        write_volume(folder / f"{case:02}.nii.gz", rng.integers(-1000, 400, mask.shape).astype(np.int16), (3, 1.6, 1.6))
        if case % 3 == 0:
            write_volume(folder / f"{case:02}_mask.nii.gz", mask, (3, 1.6, 1.6))
        lines.append(f"{case:02}.nii.gz,Q?,A.,{f'{case:02}_mask.nii.gz' if case % 3 == 0 else ''}")
    for file in folder.iterdir():  # a file of just now may still change, so its digest would not be kept
        os.utime(file, (time.time() - 120,) * 2)
    (folder / "train.csv").write_text("\n".join([*lines, lines[1]]) + "\n", encoding="utf-8")  # one case stands twice
    values = {"caption_csv_train": folder / "train.csv", "nnunet_encoder_checkpoint": CHECKPOINT}
    config = build_config({key: str(value) for key, value in values.items()}, "test")
    write_config(config, folder / "paths.yaml")
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, bytes]:
    """The cache as one undisturbed run writes it."""
    done = run(folder, folder / "whole")
    assert done.returncode == 0, done.stderr
    assert f"prepared {CASES}, already there 0, failed 0 of {CASES} volumes" in done.stdout
    return content(folder / "whole")


def command(folder: Path, cache: Path, *arguments: str) -> list[str]:
    start = [sys.executable, "scripts/prepare_data.py", "--config", str(folder / "paths.yaml")]
    return [*start, "--cache_dir", str(cache), "--workers", "2", *arguments]


def run(folder: Path, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(folder, cache, *arguments), cwd=REPOSITORY, env={**os.environ, **variables}, capture_output=True,
        encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip


def begin(folder: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command(folder, cache), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        start_new_session=True,
    )  # fmt: skip


def content(cache: Path) -> dict[str, bytes]:
    """Every file of the cache but what a killed process left unfinished, which has a name of its own."""
    files = [path for path in cache.rglob("*") if path.is_file()]
    return {str(f.relative_to(cache)): f.read_bytes() for f in files if ".tmp-" not in str(f.relative_to(cache))}


def entries(cache: Path) -> dict[str, int]:
    """Finished entries and when they were written."""
    return {meta.parent.name: meta.stat().st_mtime_ns for meta in cache.glob("[0-9a-f]*/meta.json")}


def wait_for_entries(process: subprocess.Popen, cache: Path, count: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and len(entries(cache)) < count:
        assert time.monotonic() < end, f"waited {seconds} s for {count} entries"
        time.sleep(0.01)


def test_training_finds_what_was_prepared_and_a_second_run_does_nothing(folder, whole):
    cache = VolumeCache(folder / "whole", load_plan(build_config({"nnunet_encoder_checkpoint": str(CHECKPOINT)}, "t")))
    before = entries(folder / "whole")
    assert len(before) == CASES
    assert cache.entry(folder / "00.nii.gz", folder / "00_mask.nii.gz").name in before
    assert cache.entry(folder / "01.nii.gz").name in before
    again = run(folder, folder / "whole")
    assert again.returncode == 0 and f"prepared 0, already there {CASES}" in again.stdout
    assert entries(folder / "whole") == before and content(folder / "whole") == whole


def test_shards_into_caches_of_their_own_are_the_whole_together(folder, whole, tmp_path):
    first = run(folder, tmp_path / "a", "--shard", "1/2")
    second = run(folder, tmp_path / "b", RANK="1", WORLD_SIZE="2")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "shard 1 of 2" in first.stdout and "shard 2 of 2" in second.stdout
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert len(entries(tmp_path / "a")) == len(entries(tmp_path / "b")) == CASES // 2
    assert not a.keys() & b.keys() and {**a, **b} == whole


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_shard_that_cannot_be(folder, tmp_path, text):
    done = run(folder, tmp_path, f"--shard={text}")
    assert done.returncode == 2 and "expected I/N with 1 <= I <= N" in done.stderr


def test_every_bad_volume_is_one_line_and_stops_no_other(folder, tmp_path):
    (tmp_path / "broken.nii.gz").write_bytes((folder / "01.nii.gz").read_bytes()[:3000])
    (tmp_path / "text.nii.gz").write_text("not an image")
    table = tmp_path / "bad.csv"
    good = folder / "02.nii.gz"
    rows = ["broken.nii.gz,Q?,A.", "text.nii.gz,Q?,A.", f"{good},Q?,A.", "absent.nii.gz,Q?,A."]
    table.write_text("\n".join(["image_path,question,answer", *rows, ""]), encoding="utf-8")
    done = run(folder, tmp_path / "cache", "--csv", str(table))
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 3, done.stdout + done.stderr
    assert "row 5" in lines[0] and "absent.nii.gz" in lines[0]  # the table's own check
    assert {line.split("row ")[1][0] for line in lines} == {"2", "3", "5"}
    assert "prepared 1, already there 0, failed 2 of 3 volumes; 1 rows" in done.stdout
    assert "Traceback" not in done.stderr and len(entries(tmp_path / "cache")) == 1


def test_damaged_entries_are_found_and_made_again(folder, whole, tmp_path):
    cache = tmp_path / "cache"
    run(folder, cache)
    truncated, flipped, *_ = sorted(cache.glob("[0-9a-f]*/image.bin"))
    truncated.write_bytes(truncated.read_bytes()[:1000])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(data)
    quick = run(folder, cache)
    assert quick.returncode == 0 and f"prepared 1, already there {CASES - 1}" in quick.stdout
    assert "is damaged" in quick.stderr
    thorough = run(folder, cache, "--verify")
    assert f"prepared 1, already there {CASES - 1}" in thorough.stdout
    assert content(cache) == whole


def test_two_processes_at_once_leave_one_whole_cache(folder, whole, tmp_path):
    both = [begin(folder, tmp_path) for _ in range(2)]
    for process in both:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0 and "failed 0" in out and "Traceback" not in error, out + error
    assert content(tmp_path) == whole and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.skipif(os.name == "nt", reason="process groups and SIGKILL are POSIX's")
@pytest.mark.slow
def test_killed_at_ten_random_moments_the_cache_is_the_same(folder, whole, tmp_path):
    moments = random.Random(7)
    written: dict[str, int] = {}
    for kill in range(10):
        process = begin(folder, tmp_path)
        wait_for_entries(process, tmp_path, len(written) + moments.randint(0, 2))
        time.sleep(moments.uniform(0, 0.15))
        assert process.poll() is None, "it ended before it could be killed"
        workers = psutil.Process(process.pid).children(recursive=True)
        if kill % 2:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # the parent alone: nobody tells its workers
        process.wait()
        _, alive = psutil.wait_procs(workers, timeout=20)
        assert not alive, "workers outlive their parent"
        now = entries(tmp_path)
        assert {name: now[name] for name in written} == written, "an entry that was there was written again"
        written = now
    done = run(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"prepared {CASES - len(written)}, already there {len(written)}, failed 0" in done.stdout
    assert content(tmp_path) == whole
    assert {name: entries(tmp_path)[name] for name in written} == written


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C of another process is POSIX's")
def test_ctrl_c_says_how_to_go_on(folder, whole, tmp_path):
    process = begin(folder, tmp_path)
    wait_for_entries(process, tmp_path, 2)
    os.killpg(process.pid, signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from here" in error, out + error
    assert "Traceback" not in error and not list(tmp_path.glob(".tmp-*"))
    assert run(folder, tmp_path).returncode == 0 and content(tmp_path) == whole


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
def test_a_worker_killed_for_memory_is_one_line(folder, tmp_path):
    process = begin(folder, tmp_path)
    wait_for_entries(process, tmp_path, 1)
    workers = [c for c in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(c.cmdline())]
    workers[0].kill()
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "fewer --workers than 2" in error and "Traceback" not in error, out + error
