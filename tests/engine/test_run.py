"""The GPU's memory on pretended cards: a limit where the driver would use the computer's, a warning where it does."""

from __future__ import annotations

import types

import pytest
import torch

from config.errors import InputError
from engine import run


def card(monkeypatch: pytest.MonkeyPatch, system: str, free: int, total: int = 32) -> None:
    """The second card of a machine, with so many GiB that other programs have left."""
    monkeypatch.setattr(run, "os", types.SimpleNamespace(name=system))
    monkeypatch.setattr(run, "_FREE", {})
    values = {"is_available": True, "current_device": 1, "mem_get_info": (free * 2**30, total * 2**30)}
    for name, value in (values | {"memory_reserved": 0}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


@pytest.mark.parametrize(
    ("fraction", "system", "free", "expected"),
    [
        (None, "posix", 8, []),
        (None, "nt", 32, [(0.95, 1)]),
        (None, "nt", 24, [(0.75, 1)]),  # other programs hold a quarter
        (0.5, "nt", 8, [(0.5, 1)]),
        (1, "posix", 32, [(1, 1)]),
    ],
)
def test_windows_limits_the_memory_by_itself(
    fraction: float | None, system: str, free: int, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[float, int]] = []
    card(monkeypatch, system, free)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: given.append(limit))
    run.limit_gpu_memory(fraction)
    assert given == expected


@pytest.mark.parametrize("fraction", [0, 1.5, -1])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(InputError, match="gpu_memory_fraction is .*, expected above 0, up to 1"):
        run.limit_gpu_memory(fraction)


def test_memory_beyond_what_was_free_is_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(monkeypatch, "nt", free=29)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: None)
    run.limit_gpu_memory(1.0)
    for reserved in (28, 30, 31):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _, reserved=reserved: reserved * 2**30)
        run.warn_of_spilling(torch.device("cuda"))
        run.warn_of_spilling(torch.device("cpu"))
    assert len(caplog.messages) == 1
    assert "30.0 GiB are reserved on a card that had 29.0 GiB free" in caplog.messages[0]


def test_a_card_that_emulates_bfloat16_is_no_native_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turing, which torch counts in where it is not asked to leave emulation out."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not run.native_bf16()
