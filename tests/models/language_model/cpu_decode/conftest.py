"""Small matrices are shared by as many threads as large ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    gemv = pytest.importorskip("models.language_model.cpu_decode.gemv", exc_type=ImportError)  # numba may be missing
    monkeypatch.setattr(gemv, "LEAST_BYTES", 1)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
