"""Wall time of calls that take turns, so that a machine which slows down for a while slows all of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidate:
    """A call to be timed. ``rounds``: how often; ``warm``: call it once before, untimed; ``note``: what is special."""

    name: str
    call: Callable[[], object]
    rounds: int = 3
    warm: bool = True
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, one number per run."""

    name: str
    seconds: tuple[float, ...]
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, object]:
        """Raw times with median and spread, in seconds."""
        spread = {"median": self.median, "fastest": min(self.seconds), "slowest": max(self.seconds)}
        return {"name": self.name, "runs": len(self.seconds), **spread, "seconds": list(self.seconds),
                "note": self.note}  # fmt: skip

    def line(self) -> str:
        shown = f"{self.name}: {in_words(self.median)}"
        if len(self.seconds) > 1:
            shown += f"  ({in_words(min(self.seconds))} to {in_words(max(self.seconds))}, {len(self.seconds)} runs)"
        else:
            shown += "  (1 run)"
        return f"{shown}  [{self.note}]" if self.note else shown


def in_words(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def finish(device: torch.device | str) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def take_turns(candidates: Sequence[Candidate], device: torch.device | str = "cpu") -> dict[str, Timing]:
    """Time every candidate ``rounds`` times, round by round; those with fewer rounds drop out."""
    for candidate in candidates:
        if candidate.warm:
            candidate.call()
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn in range(max(candidate.rounds for candidate in candidates)):
        for candidate in candidates:
            if turn < candidate.rounds:
                gc.collect()
                finish(device)
                started = time.perf_counter()
                candidate.call()
                finish(device)
                seconds[candidate.name].append(time.perf_counter() - started)
    return {c.name: Timing(c.name, tuple(seconds[c.name]), c.note) for c in candidates}
