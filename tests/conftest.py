"""Shared fixtures. Reference material lies beside the checkout in ``../shared`` and may be absent."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell starts background jobs with Ctrl-C ignored, and every child inherits that; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets() -> Path:
    return REPOSITORY / "tests" / "assets"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference material; a test that asks for it skips where it is absent."""
    folder = REPOSITORY.parent / "shared"
    if not (folder / "README.md").is_file():
        pytest.skip(f"reference material not found at {folder}; only full checkouts have it")
    return folder
