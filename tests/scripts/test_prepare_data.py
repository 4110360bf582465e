"""Preparing data as a user runs it: all at once, in shards, beside another process, killed at any moment."""

from __future__ import annotations

import os
import random
import re
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
from engine.chain import SHIPPED_NNUNET
from engine.loaders import load_plan

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "tests/assets/nnunet_tiny/2d_plain/fold_0/checkpoint_best.pth"
CASES = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Volumes of two minutes ago, every third with a mask, and a configuration."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    mask = np.zeros((48, 128, 128), np.uint8)
    mask[10:14, 30:50, 40:60] = 1
    lines = [f"{case:02}.nii.gz,Q?,A.," for case in range(CASES)]
    for case in range(CASES):
        write_volume(folder / f"{case:02}.nii.gz", rng.integers(-1000, 400, mask.shape).astype(np.int16), (2, 1.6, 1.6))
    for case in range(0, CASES, 3):
        write_volume(folder / f"{case:02}_mask.nii.gz", mask, (2, 1.6, 1.6))
        lines[case] += f"{case:02}_mask.nii.gz"
    for file in folder.iterdir():  # a file of just now may still change, so its digest would not be kept
        os.utime(file, (time.time() - 120,) * 2)
    table = ["image_path,question,answer,mask_path", *lines, lines[0], ""]  # one case stands twice
    (folder / "train.csv").write_text("\n".join(table), encoding="utf-8")
    values = {
        "caption_csv_train": str(folder / "train.csv"),
        "nnunet_encoder_checkpoint": str(CHECKPOINT),
        "slice_policy": "mask",
    }
    write_config(build_config(values, "test"), folder / "paths.yaml")
    return folder


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, bytes]:
    """The cache as one undisturbed run writes it."""
    done = run(folder, folder / "whole")
    assert done.returncode == 0 and f"prepared {CASES}, already there 0, failed 0 of {CASES} vol" in done.stdout, done
    return content(folder / "whole")


def begin(folder: Path, cache: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    command = [sys.executable, "scripts/prepare_data.py", "--config", str(folder / "paths.yaml")]
    command += ["--cache_dir", str(cache), "--workers", "2", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", "start_new_session": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **variables}, **pipes)


def finish(process: subprocess.Popen, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    out, error = process.communicate(timeout=seconds)
    assert "Traceback" not in error, error
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def run(folder: Path, cache: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return finish(begin(folder, cache, *arguments, **variables))


def content(cache: Path) -> dict[str, bytes]:
    """Every file of the cache but what a killed process left unfinished (.tmp-*, .part-*)."""
    files = {str(path.relative_to(cache)): path for path in cache.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not re.search(r"\.(tmp|part)-", name)}


def entries(cache: Path) -> dict[str, int]:
    """Finished entries and when they were written."""
    return {meta.parent.name: meta.stat().st_mtime_ns for meta in cache.glob("[0-9a-f]*/meta.json")}


def begin_and_wait(folder: Path, cache: Path, count: int) -> subprocess.Popen:
    """A process that has written ``count`` entries."""
    process, end = begin(folder, cache), time.monotonic() + 60
    while process.poll() is None and len(entries(cache)) < count:
        assert time.monotonic() < end, f"waited 60 s for {count} entries"
        time.sleep(0.01)
    return process


def test_training_finds_what_was_prepared_and_a_second_run_does_nothing(folder, whole):
    cache = VolumeCache(folder / "whole", load_plan(build_config({"nnunet_encoder_checkpoint": str(CHECKPOINT)}, "t")))
    before = entries(folder / "whole")
    asked = [cache.entry(folder / "00.nii.gz", folder / "00_mask.nii.gz"), cache.entry(folder / "01.nii.gz")]
    assert len(before) == CASES and {entry.name for entry in asked} <= before.keys()
    again = run(folder, folder / "whole")
    assert again.returncode == 0 and f"prepared 0, already there {CASES}" in again.stdout
    assert entries(folder / "whole") == before and content(folder / "whole") == whole


@pytest.mark.minutes
def test_shards_into_caches_of_their_own_are_the_whole_together(folder, whole, tmp_path):
    first, second = run(folder, tmp_path / "a", "--shard", "1/2"), run(folder, tmp_path / "b", RANK="1", WORLD_SIZE="2")
    assert "shard 1 of 2" in first.stdout and "shard 2 of 2" in second.stdout, (first, second)
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
    images = ["broken.nii.gz", "text.nii.gz", folder / "02.nii.gz", "absent.nii.gz"]
    rows = ["image_path,question,answer\n", *(f"{image},Q?,A.\n" for image in images)]
    (tmp_path / "bad.csv").write_text("".join(rows), encoding="utf-8")
    done = run(folder, tmp_path / "cache", "--csv", str(tmp_path / "bad.csv"))
    lines = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and {line.split("row ")[1][0] for line in lines} == {"2", "3", "5"}, done
    assert len(lines) == 3 and "row 5" in lines[0] and "absent.nii.gz" in lines[0]  # the table's own check
    assert "prepared 1, already there 0, failed 2 of 3 volumes; 1 rows" in done.stdout
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.minutes
def test_damaged_entries_are_found_and_made_again(folder, whole, tmp_path):
    cache = tmp_path / "cache"
    run(folder, cache)
    truncated, reversed_, *_ = sorted(cache.glob("[0-9a-f]*/image.bin"))
    truncated.write_bytes(truncated.read_bytes()[:1000])
    reversed_.write_bytes(reversed_.read_bytes()[::-1])  # as long as before
    quick, thorough = run(folder, cache), run(folder, cache, "--verify")
    assert f"prepared 1, already there {CASES - 1}" in quick.stdout and "is damaged" in quick.stderr
    assert f"prepared 1, already there {CASES - 1}" in thorough.stdout and content(cache) == whole


@pytest.mark.minutes
def test_two_processes_at_once_leave_one_whole_cache(folder, whole, tmp_path):
    for process in [begin(folder, tmp_path) for _ in range(2)]:
        done = finish(process)
        assert done.returncode == 0 and "failed 0" in done.stdout, done
    assert content(tmp_path) == whole and not list(tmp_path.glob(".tmp-*"))


@pytest.mark.minutes
@pytest.mark.skipif(os.name == "nt", reason="process groups and SIGKILL are POSIX's")
def test_killed_at_ten_random_moments_the_cache_is_the_same(folder, whole, tmp_path):
    moments = random.Random(7)
    written: dict[str, int] = {}
    for kill in range(10):
        process = begin_and_wait(folder, tmp_path, len(written) + moments.randint(0, 2))
        time.sleep(moments.uniform(0, 0.15))
        assert process.poll() is None, "it ended before it could be killed"
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL) if kill % 2 else process.kill()  # all, or the parent alone
        process.wait()
        assert not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their parent"
        assert written.items() <= entries(tmp_path).items(), "an entry that was there was written again"
        written = entries(tmp_path)
    done = run(folder, tmp_path)
    assert f"prepared {CASES - len(written)}, already there {len(written)}, failed 0" in done.stdout, done
    assert content(tmp_path) == whole and written.items() <= entries(tmp_path).items()


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C of another process is POSIX's")
def test_ctrl_c_says_how_to_go_on(folder, whole, tmp_path):
    process = begin_and_wait(folder, tmp_path, 2)
    os.killpg(process.pid, signal.SIGINT)
    done = finish(process, seconds=60)
    assert done.returncode == 130 and "the same command goes on from here" in done.stderr, done
    assert not list(tmp_path.glob(".tmp-*"))
    assert run(folder, tmp_path).returncode == 0 and content(tmp_path) == whole


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
def test_a_worker_killed_for_memory_is_one_line(folder, tmp_path):
    process = begin_and_wait(folder, tmp_path, 1)
    children = psutil.Process(process.pid).children(recursive=True)
    next(child for child in children if "spawn_main" in " ".join(child.cmdline())).kill()
    done = finish(process, seconds=60)
    assert done.returncode == 2 and "fewer --workers than 2" in done.stderr, done


def test_own_scans_are_not_segmented_by_the_quick_starts_network(folder, tmp_path):
    config = tmp_path / "paths.yaml"
    keys = {"caption_csv_train": str(folder / "train.csv"), "nnunet_encoder_checkpoint": str(SHIPPED_NNUNET)}
    write_config(build_config(keys, "test"), config)
    done = run(folder, tmp_path / "cache", "--config", str(config))
    assert done.returncode == 2 and not (tmp_path / "cache").exists(), done
    assert "set nnunet_encoder_checkpoint:" in done.stderr and "or add --allow_toy_model" in done.stderr
    assert "mamba_model" not in done.stderr, "no language model is needed to prepare scans"
