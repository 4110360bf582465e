"""How everything is measured: wall time in alternating rounds, limits of the machine, peak memory of one call."""

from __future__ import annotations

import gc
import multiprocessing
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F

SAMPLE_SECONDS = 0.002


# ------------------------------------------------------------------ time


@dataclass(frozen=True)
class Candidate:
    """A call to be timed: ours, a baseline, or a limit of the machine.

    ``warm``: untimed calls, one at the start (once), one ahead of every timed call (each), or none (never).
    ``amount``, ``unit``: of a limit, operations or bytes per call. ``own_clock``: the call returns its own seconds.
    """

    name: str
    call: Callable[[], Any]
    rounds: int = 3
    warm: Literal["once", "each", "never"] = "once"
    note: str = ""
    amount: float = 0.0
    unit: str = ""
    own_clock: bool = False


def take_turns(candidates: Sequence[Candidate], device: torch.device) -> dict[str, list[float]]:
    """Seconds of each candidate, in alternating rounds, so that a slow phase of the machine slows all of them."""
    for candidate in candidates:
        if candidate.warm == "once":
            candidate.call()
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    for turn in range(max(candidate.rounds for candidate in candidates)):
        for candidate in candidates:
            if turn < candidate.rounds:
                seconds[candidate.name] += _seconds(candidate, device)
    return seconds


def _seconds(candidate: Candidate, device: torch.device) -> list[float]:
    if candidate.warm == "each":
        candidate.call()
    gc.collect()
    finish(device)
    if candidate.own_clock:
        return candidate.call()
    started = time.perf_counter()
    candidate.call()
    finish(device)
    return [time.perf_counter() - started]


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timing(name: str, seconds: Sequence[float], note: str = "") -> dict[str, Any]:
    """Raw times with median and spread, in seconds, as the report has them."""
    spread = {"median": statistics.median(seconds), "fastest": min(seconds), "slowest": max(seconds)}
    return {"name": name, "runs": len(seconds), **spread, "seconds": [*seconds], "note": note}


def in_words(seconds: float) -> str:
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / scale:.3g} {unit}"


# ------------------------------------------------------------------ limits of the machine


def memory_limits(nbytes: int, device: torch.device, rounds: int) -> list[Candidate]:
    """Reading a block far larger than the caches in two ways with all threads, of which the faster one is the limit;
    copying it (bytes read plus bytes written); exponentials of numbers that lie in the caches."""
    block, cached = (torch.empty(n, device=device).uniform_(-1, 1) for n in (nbytes // 4, 64 * 1024))
    copy = _repeat(1, torch.empty_like(block).copy_, block)
    exponentials = _repeat(500, torch.exp, cached, out=torch.empty_like(cached))
    limits = [Candidate("read: torch.sum", block.sum, rounds, amount=nbytes, unit="B/s")]
    if device.type == "cpu" and find_spec("numba"):
        from numba import njit

        compiled = njit(nogil=True, fastmath=True, cache=True)(_sum)
        parts = np.array_split(block.numpy(), torch.get_num_threads())

        def read() -> float:
            with ThreadPoolExecutor(len(parts)) as pool:
                return sum(pool.map(compiled, parts))

        limits.append(Candidate("read: compiled loop", read, rounds, amount=nbytes, unit="B/s"))
    return [
        *limits,
        Candidate("copy", copy, rounds, amount=2 * nbytes, unit="B/s"),
        Candidate("exponentials: torch.exp", exponentials, rounds, amount=500 * cached.numel(), unit="exp/s"),
    ]


def product_limit(rows: int, inputs: int, outputs: int, like: torch.Tensor, work: float, rounds: int) -> Candidate:
    """Matrix product x (rows, inputs) · W (outputs, inputs)ᵀ as a linear layer does it, 2 operations per weight.

    ``like`` gives dtype and device. ``work``: operations of one timed call, reached by repetition.
    """
    x, weight = (like.new_empty(n, inputs).uniform_(-1, 1) for n in (rows, outputs))
    operations = 2 * rows * inputs * outputs
    times = max(1, round(work / operations))
    name = f"matrix product {str(like.dtype).removeprefix('torch.')} {rows}×{inputs}×{outputs}"
    return Candidate(name, _repeat(times, F.linear, x, weight), rounds, amount=operations * times, unit="FLOP/s")


def _repeat(times: int, function: Callable[..., object], *arguments: object, **options: object) -> Callable[[], None]:
    @torch.inference_mode()
    def call() -> None:
        for _ in range(times):
            function(*arguments, **options)

    return call


def _sum(values: np.ndarray) -> float:
    total = np.float32(0)
    for i in range(values.size):
        total += values[i]
    return total


# ------------------------------------------------------------------ peak memory


class Peak(NamedTuple):
    """``call``: bytes above the memory in use before the call; ``process``: the whole process at its highest."""

    call: int
    process: int


class OutOfMemory(Exception):
    """A measuring process was killed; on a full machine the cause is a lack of memory."""


def in_own_process(function: Callable[..., Any], *arguments: object) -> Any:
    """``function(*arguments)`` in a fresh process; a function of a module, and arguments that can be pickled.

    Only the allocator of a fresh process keeps no freed memory, which would hide a part of the peak.

    Raises:
        OutOfMemory: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise OutOfMemory(f"{function.__name__}{arguments}: its process was ended, probably for memory") from error


def measure_peak(call: Callable[[], object], device: torch.device) -> Peak:
    """Peak of ``call``: allocated memory of a GPU, otherwise resident memory of the process.

    Everything that the call needs must exist before, and its libraries must have run once.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated()
        return Peak(highest - before, highest)
    with suppress(OSError):  # Linux alone can lower its mark, and some containers forbid it
        Path("/proc/self/clear_refs").write_text("5")
    before, earlier = psutil.Process().memory_info().rss, highest_resident()
    sampled, done = [before], threading.Event()
    sampler = threading.Thread(target=_sample, args=(sampled, done), daemon=True)
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    mark = highest_resident()  # one that did not rise is from before the call
    highest = max(sampled[0], mark if mark > earlier else 0)
    return Peak(highest - before, highest)


def highest_resident() -> int:
    """The system's mark of the highest resident memory of this process in bytes; 0 where it has none."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would be inherited from the parent process
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024
    return getattr(psutil.Process().memory_info(), "peak_wset", 0)  # Windows


def _sample(highest: list[int], done: threading.Event) -> None:
    process = psutil.Process()
    while not done.wait(SAMPLE_SECONDS):
        highest[0] = max(highest[0], process.memory_info().rss)
