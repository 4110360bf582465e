"""Filling the cache before the first step."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from config.errors import InputError
from data.tables.caption_table import CaptionRow
from engine.prepare import STORED_BYTES, bytes_needed, fill_cache


class Recorder:
    """Stands for the cache; ``fail`` is a file that cannot be read."""

    root, plan = Path(tempfile.gettempdir()), SimpleNamespace(spacing=(1.0, 1.0))

    def __init__(self, fail: str = "") -> None:
        self.fail, self.seen, self.threads = fail, [], set()

    def entry(self, image: Path, mask: Path | None) -> Path:
        return self.root  # as if all were there: no room is needed

    def ensure(self, image: Path, mask: Path | None, *, verify: bool) -> bool:
        if image.name == self.fail:
            raise InputError(f"{image}: broken")
        self.seen.append((image.name, None if mask is None else mask.name))
        self.threads |= {pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"}
        return True


def rows(count: int) -> list[CaptionRow]:
    masks = [None, *[Path("m.nii.gz")] * (count - 1)]
    return [SimpleNamespace(image_path=Path(f"{i}.nii.gz"), mask_path=mask) for i, mask in enumerate(masks)]


def test_every_case_once_with_one_thread_of_the_matrix_library_each():
    np.ones((4, 4)) @ np.ones((4, 4))
    cache = Recorder()
    fill_cache(cache, rows(9) * 2, threads=3)
    assert sorted(cache.seen) == [("0.nii.gz", None)] + [(f"{i}.nii.gz", "m.nii.gz") for i in range(1, 9)]
    assert cache.threads <= {1}


def test_the_room_that_cases_will_take_is_estimated_from_their_headers(tmp_path, monkeypatch):
    header = SimpleNamespace(shape=(100, 100, 50), zooms=np.array([0.8, 0.8, 5.0]))
    monkeypatch.setattr("engine.prepare.read_header", lambda path: header)
    files = [(Path("a.nii.gz"), None), (Path("b.nii.gz"), None)]
    cache = SimpleNamespace(plan=SimpleNamespace(spacing=(0.4, 0.4)), entry=lambda image, mask: tmp_path / image)
    assert bytes_needed(cache, files) == int(2 * 50 * 200 * 200 * STORED_BYTES), "slices keep their distance"
    (tmp_path / "a.nii.gz").mkdir()
    assert bytes_needed(cache, files) == int(50 * 200 * 200 * STORED_BYTES), "one is prepared"
    cache.plan.spacing = (2.5, 0.8, 0.8)
    assert bytes_needed(cache, files) == int(100 * 100 * 100 * STORED_BYTES)


def test_a_broken_file_stops_before_all_are_read():
    cache = Recorder(fail="0.nii.gz")
    with pytest.raises(InputError, match=r"0\.nii\.gz: broken"):
        fill_cache(cache, rows(500), threads=1)
    assert len(cache.seen) < 400
