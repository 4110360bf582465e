"""Sizes of process pools."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor

import pytest

from config.processes import pool_size


@pytest.mark.parametrize(("wanted", "jobs", "expected"), [(4, 9, 4), (9, 4, 4), (3, 0, 1), (200, 500, 200)])
def test_no_more_processes_than_jobs(wanted, jobs, expected, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    assert pool_size(wanted, jobs) == expected


def test_a_pool_on_windows_takes_no_more_than_61_processes(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match="61"):
        ProcessPoolExecutor(62)
    with ProcessPoolExecutor(pool_size(200, 500)):
        assert pool_size(200, 500) == 61
