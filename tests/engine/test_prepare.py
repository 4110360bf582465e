"""Filling the cache before the first step."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from config.errors import InputError
from data.tables.caption_table import CaptionRow
from engine.prepare import fill_cache


class Recorder:
    """Stands for the cache; ``fail`` is a file that cannot be read."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.seen, self.threads = fail, [], set()

    def ensure(self, image: Path, mask: Path | None) -> None:
        if image.name == self.fail:
            raise InputError(f"{image}: broken")
        self.seen.append((image.name, None if mask is None else mask.name))
        self.threads |= {pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"}


def rows(count: int) -> list[CaptionRow]:
    masks = [None, *[Path("m.nii.gz")] * (count - 1)]
    return [SimpleNamespace(image_path=Path(f"{i}.nii.gz"), mask_path=mask) for i, mask in enumerate(masks)]


def test_every_case_once_with_one_thread_of_the_matrix_library_each():
    np.ones((4, 4)) @ np.ones((4, 4))
    cache = Recorder()
    fill_cache(cache, rows(9) * 2, threads=3)
    assert sorted(cache.seen) == [("0.nii.gz", None)] + [(f"{i}.nii.gz", "m.nii.gz") for i in range(1, 9)]
    assert cache.threads <= {1}


def test_a_broken_file_stops_before_all_are_read():
    cache = Recorder(fail="0.nii.gz")
    with pytest.raises(InputError, match=r"0\.nii\.gz: broken"):
        fill_cache(cache, rows(500), threads=1)
    assert len(cache.seen) < 400
