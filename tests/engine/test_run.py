"""The GPU's memory on pretended cards: a limit where the driver would use the computer's, a warning where it does."""

from __future__ import annotations

import types

import pytest
import torch

from config.errors import InputError
from engine import run


@pytest.mark.parametrize(
    ("fraction", "system", "expected"),
    [(None, "posix", []), (None, "nt", [0.95]), (0.5, "nt", [0.5]), (1, "posix", [1])],
)
def test_windows_limits_the_memory_by_itself(
    fraction: float | None, system: str, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    monkeypatch.setattr(run, "os", types.SimpleNamespace(name=system))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    run.limit_gpu_memory(fraction)
    assert given == expected


@pytest.mark.parametrize("fraction", [0, 1.5, -1])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="gpu_memory_fraction is .*, expected above 0, up to 1"):
        run.limit_gpu_memory(fraction)


def test_memory_beyond_the_cards_is_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = types.SimpleNamespace(total_memory=32 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(run, "_SPILLED", set())
    for reserved in (31, 40, 41):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, reserved=reserved: reserved * 2**30)
        run.warn_of_spilling(torch.device("cuda"))
        run.warn_of_spilling(torch.device("cpu"))
    assert len(caplog.messages) == 1
    assert "40.0 GiB are reserved on a card of 32.0 GiB" in caplog.messages[0]
