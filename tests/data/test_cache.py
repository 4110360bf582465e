"""The volume cache: same numbers as preprocessing, found again, rebuilt when damaged, read slice by slice."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from config.errors import InputError
from data import cache as cache_module
from data.cache import VolumeCache, file_digest
from data.imaging.nifti import write_volume
from data.imaging.reader import read_mask, read_volume
from data.nnunet_preprocess import preprocess
from tests.data.imaging.images import PLAN_2D

PLAN = replace(PLAN_2D, spacing=(0.8, 0.8), patch_size=(32, 32))


@pytest.fixture
def case(tmp_path) -> tuple[Path, Path]:
    rng = np.random.default_rng(0)
    mask = np.zeros((6, 20, 24), dtype=np.uint8)
    mask[2:4, 5:9, 5:11] = 1
    write_volume(tmp_path / "ct.nii.gz", rng.integers(-1000, 800, mask.shape).astype(np.int16), (5.0, 1.0, 1.0))
    write_volume(tmp_path / "lesion.nii.gz", mask, (5.0, 1.0, 1.0))
    return tmp_path / "ct.nii.gz", tmp_path / "lesion.nii.gz"


@pytest.fixture
def count_preparations(monkeypatch) -> list[int]:
    calls: list[int] = []
    monkeypatch.setattr(cache_module, "preprocess", lambda *args: (calls.append(1), preprocess(*args))[1])
    return calls


def test_equals_preprocessing_and_is_prepared_once(tmp_path, case, count_preparations):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    volume = read_volume(case[0])
    expected = preprocess(volume, PLAN, read_mask(case[1], volume))
    for _ in range(3):
        cached = cache.get(*case)
    assert len(count_preparations) == 1
    assert np.array_equal(cached.image, expected.image) and np.array_equal(cached.mask, expected.mask)
    assert cached.spacing == expected.spacing and cached.voxel_map == expected.voxel_map
    assert np.array_equal(cached.lesion_voxels, (expected.mask > 0).sum(axis=(1, 2)))
    assert cached.lesion_voxels[2] > 0 and cached.lesion_voxels[0] == 0


def test_slices_are_those_of_the_whole_and_are_read_without_the_others(tmp_path, case):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    cached = cache.get(*case)
    whole, mask = np.asarray(cached.image), np.asarray(cached.mask)
    assert whole.dtype == np.float32 and cached.image.shape == whole.shape == (1, *mask.shape)
    path = cache.entry(*case) / "image.bin"
    path.write_bytes(path.read_bytes()[:-50] + b"\0" * 50)  # the last slice
    assert np.array_equal(cached.image.planes(2, 5), whole[:, 2:5])
    assert np.array_equal(cached.image.plane(0), whole[:, 0]) and np.array_equal(cached.mask.plane(3), mask[3])


def test_a_files_digest_is_remembered_on_disk_until_the_file_changes(tmp_path, case):
    memory = tmp_path / "files"
    for path in case:
        os.utime(path, (1, 1))
    digest = file_digest(case[0], memory)
    cache_module._content_digest.cache_clear()  # as in a new process
    case[0].write_bytes(case[0].read_bytes()[::-1])  # told from the file as it was by reading it alone
    os.utime(case[0], (1, 1))
    assert file_digest(case[0], memory) == digest
    case[0].write_bytes(case[1].read_bytes())
    os.utime(case[0], (2, 2))
    assert file_digest(case[0], memory) == file_digest(case[1]) != digest
    next(memory.iterdir()).write_text("{", encoding="utf-8")
    cache_module._content_digest.cache_clear()
    assert file_digest(case[0], memory) == file_digest(case[1])


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, case):
    os.utime(case[0])
    file_digest(case[0], tmp_path / "files")
    assert not (tmp_path / "files").exists()


def test_a_folder_and_a_pair_of_files_change_with_any_of_their_files(tmp_path):
    folder = tmp_path / "series"
    folder.mkdir()
    for name in ("1.dcm", "2.dcm", "a.hdr", "a.img"):
        (folder / name).write_bytes(name.encode())
    series, pair = file_digest(folder), file_digest(folder / "a.hdr")
    (folder / "a.img").write_bytes(b"other voxels")
    assert file_digest(folder / "a.hdr") != pair and file_digest(folder) != series
    (folder / "a.img").unlink()
    assert file_digest(folder / "a.hdr") == b""


def test_the_key_is_content_and_plan_not_name(tmp_path, case):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    moved = tmp_path / "elsewhere.nii.gz"
    shutil.copy(case[0], moved)
    assert cache.entry(moved) == cache.entry(case[0])
    assert cache.entry(*case) != cache.entry(case[0])
    other = VolumeCache(tmp_path / "cache", replace(PLAN, spacing=(0.7, 0.7)))
    assert other.entry(case[0]) != cache.entry(case[0])
    patch = VolumeCache(tmp_path / "cache", replace(PLAN, patch_size=(64, 64)))
    assert patch.entry(case[0]) == cache.entry(case[0])


def test_a_file_that_changes_is_prepared_anew(tmp_path, case):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    cached = cache.get(case[0])
    assert cached.mask is None and cached.lesion_voxels is None, "without a mask there is none"
    before = np.asarray(cached.image)
    array = np.full((6, 20, 24), -500, dtype=np.int16)
    array[0, 0, 0] = 300
    write_volume(case[0], array, (5.0, 1.0, 1.0))
    os.utime(case[0], ns=(1, time.time_ns() + 10**9))  # file systems with coarse clocks
    assert not np.array_equal(cache.get(case[0]).image, before)


def _zero_the_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100] + b"\0" * 100)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("image.bin", lambda path: path.write_bytes(path.read_bytes()[:-100])),
        ("image.bin", _zero_the_tail),
        ("image.bin", Path.unlink),
        ("mask.bin", Path.unlink),
        ("meta.json", Path.unlink),
        ("meta.json", lambda path: path.write_bytes(b"\xff{")),
        ("meta.json", lambda path: path.write_text(json.dumps({"arrays": {}}), encoding="utf-8")),
    ],
)
def test_a_damaged_entry_is_reported_and_prepared_again(tmp_path, case, caplog, name, harm):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    expected = np.array(cache.get(*case).image)
    harm(cache.entry(*case) / name)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(cache.read(*case, lambda volume: np.array(volume.image)), expected)
    assert "damaged" in caplog.text and "ct.nii.gz" in caplog.text
    caplog.clear()
    np.array(cache.get(*case).image)
    assert not caplog.records


def test_a_damaged_entry_that_another_process_reads_is_waited_for(tmp_path, case, monkeypatch):
    """On Windows a folder of which a file is open cannot be renamed."""
    cache = VolumeCache(tmp_path / "cache", PLAN)
    expected = np.array(cache.get(*case).image)
    (cache.entry(*case) / "meta.json").write_bytes(b"{")
    rename, refused = Path.replace, []

    def held(self: Path, target: Path) -> Path:
        if self == cache.entry(*case) and not refused:
            refused.append(self)
            raise PermissionError("[WinError 5] Access is denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", held)
    assert np.array_equal(cache.read(*case, lambda volume: np.array(volume.image)), expected) and refused


def test_nothing_temporary_is_left_and_old_leftovers_go(tmp_path, case):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    old, young = cache.root / ".tmp-old", cache.root / ".tmp-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    cache.get(*case)
    assert sorted(entry.name for entry in cache.root.iterdir()) == [".tmp-young", cache.entry(*case).name]


def test_a_failed_write_leaves_no_entry(tmp_path, case, monkeypatch):
    cache = VolumeCache(tmp_path / "cache", PLAN)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(cache_module, "write_slices", full)
        cache.get(*case)
    assert list(cache.root.iterdir()) == []
    assert cache.get(*case).image.shape[0] == 1


def test_bad_input_is_reported_by_name_and_not_cached(tmp_path):
    cache = VolumeCache(tmp_path / "cache", PLAN)
    with pytest.raises(InputError, match=r"absent\.nii\.gz: file not found"):
        cache.get(tmp_path / "absent.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"broken\.nii\.gz"):
        cache.get(tmp_path / "broken.nii.gz")
    assert not cache.root.exists()


def _prepare(cache: VolumeCache, image: Path, mask: Path) -> float:
    return float(np.asarray(cache.get(image, mask).image).sum())


def test_processes_that_race_agree(tmp_path, case):
    cache = pickle.loads(pickle.dumps(VolumeCache(tmp_path / "cache", PLAN)))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        sums = pool.starmap(_prepare, [(cache, *case)] * 6)
    assert len(set(sums)) == 1
    # A slow machine finds the files old enough to remember their digests, in a folder of its own.
    assert {entry.name for entry in cache.root.iterdir()} - {"files"} == {cache.entry(*case).name}


def test_the_slower_process_keeps_the_faster_ones_entry(tmp_path, case, monkeypatch):
    cache = VolumeCache(tmp_path / "cache", PLAN)

    def overtaken(*args):
        monkeypatch.undo()
        cache.get(*case)  # another process finishes while this one is still computing
        return preprocess(*args)

    monkeypatch.setattr(cache_module, "preprocess", overtaken)
    assert cache.get(*case).image.shape[0] == 1
    assert {entry.name for entry in cache.root.iterdir()} - {"files"} == {cache.entry(*case).name}
