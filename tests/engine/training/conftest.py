"""Fixtures of runs that are killed, and of runs in two processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.engine.training.runs import Runs, make_config


@pytest.fixture(scope="session")
def runs(small_training: Path, assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the server starts: what it forks has no threads
    return Runs(make_config(small_training, assets, folder))
