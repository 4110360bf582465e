"""What every check gets, and the lines that it gives: passed, failed or skipped, beside the expected figure."""

from __future__ import annotations

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:  # a process that only runs checks of the scan does not wait for transformers
    from transformers import PreTrainedModel

    from engine.benchmark.measure import Size
    from models.language_model.mamba_lm import MambaLM

PASS, FAIL, SKIPPED = "pass", "fail", "skipped"


class OutOfTime(Exception):
    """What a check waits for does not end before the session or the check must."""


@dataclass(frozen=True)
class Expected:
    """An estimate by counting, for an H100 (SXM) and an RTX 5090; ``least``: a rate, which must be reached."""

    h100: float
    rtx_5090: float
    unit: str
    least: bool = False

    def verdict(self, card: str, value: float) -> str:
        """``fail`` where the estimate for this very card is missed; other cards have none."""
        names = {"H100 80GB": self.h100, "RTX 5090": self.rtx_5090}
        known = [bound for name, bound in names.items() if name in card and "Laptop" not in card]
        missed = any(value < bound if self.least else value > bound for bound in known)
        return FAIL if missed else PASS

    def __str__(self) -> str:
        sign = "≥" if self.least else "≤"
        return f"{sign} {self.h100:g} / {self.rtx_5090:g} {self.unit}"


@dataclass(frozen=True)
class Line:
    """One result. ``expected``: H100 / RTX 5090. ``detail``: what a reader of a failure needs, of several lines."""

    check: int
    name: str
    status: str
    measured: str = ""
    expected: str = ""
    value: float | None = None
    unit: str = ""
    detail: str = ""

    def __str__(self) -> str:
        beside = f"  (expected {self.expected}, H100 / RTX 5090)" if self.expected else ""
        return f"[{self.check:>2}] {self.status:<7} {self.name}: {self.measured}{beside}".rstrip(": ")


@dataclass
class Context:
    """Device, sizes and folder of a session; models live in it as long as checks need them.

    Attributes:
        device: the card, or a CPU with which the checks only show that they run.
        out: folder of what the checks write.
        number: of the present check. end: by ``time.time()``, when it must be over.
        shared: whether the session ends then, or other checks begin; else the check has exceeded its own limit.
    """

    device: torch.device
    out: Path
    number: int = 0
    end: float = float("inf")
    shared: bool = True

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def card(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "a CPU"

    @cached_property
    def size(self) -> Size:
        from engine.benchmark.measure import SIZES

        return SIZES["2.8b" if self.cuda else "tiny"]

    @cached_property
    def weights(self) -> PreTrainedModel:
        """transformers' model with random weights, which all checks share."""
        from engine.benchmark.models import random_mamba

        return random_mamba(self.size, self.device, self.size.layers)

    def lm(self) -> MambaLM:
        """Ours over these weights, with modules of its own: adapters or int8 in it leave the others as they are."""
        from engine.benchmark.models import our_model

        return our_model(self.size, self.weights)

    @cached_property
    def copy_rate(self) -> float:
        """Bytes per second that the device copies, those read and those written."""
        block = torch.rand(self.size.block // 4, device=self.device)
        target = torch.empty_like(block)
        return 2 * block.nbytes / self.seconds(lambda: target.copy_(block))

    def left(self) -> float:
        """Seconds that the present check still has."""
        return self.end - time.time()

    def release(self) -> None:
        """Free what no check holds any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    # -------------------------------------------------------------- measuring

    def wait(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def seconds(self, call: Callable[[], object], rounds: int = 5, least: float = 0.02) -> float:
        """Median seconds of a call after an untimed one; so many calls are timed together that a round is long."""
        call()
        repeats = max(1, round(least / max(1e-6, self._timed(call, 1)))) if least else 1
        return statistics.median(self._timed(call, repeats) for _ in range(rounds))

    def _timed(self, call: Callable[[], object], repeats: int) -> float:
        self.wait()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - started) / repeats

    # -------------------------------------------------------------- lines

    def verdict(self, name: str, good: bool, measured: str = "", detail: str = "") -> Line:
        return Line(self.number, name, PASS if good else FAIL, measured, detail=detail)

    def skipped(self, name: str, why: str) -> Line:
        return Line(self.number, name, SKIPPED, why)

    def figure(
        self, name: str, value: float, unit: str, expected: Expected | None = None, note: str = "", good: bool = True
    ) -> Line:
        """A measured value in ``unit``, judged by the estimate for this card where there is one; a CPU has none."""
        expected = expected if self.cuda else None
        status = expected.verdict(self.card, value) if expected else PASS
        shown = f"{value:.4g} {unit}" + (f", {note}" if note else "")
        bounds = str(expected) if expected else ""
        return Line(self.number, name, status if good else FAIL, shown, bounds, value, unit)


@contextmanager
def messages(logger: str) -> Iterator[list[str]]:
    """The warnings and notes that a module logs meanwhile."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, log = Keep(), logging.getLogger(logger)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield found
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@dataclass(frozen=True)
class Check:
    """One numbered check.

    ``needs``: seconds that must be left for it to begin. ``limit``: that it may take. ``yields``: it is stopped where
    the later ones need the rest of the session.
    """

    title: str
    run: Callable[[Context], Iterator[Line]]
    needs: float = 5
    limit: float = 180
    yields: bool = False
