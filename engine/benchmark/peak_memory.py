"""Peak memory of one call: the highest resident memory while it runs, minus that just before it.

The call gets a process of its own, so that neither what other measurements left behind nor memory that the
allocator keeps hides a part of it. On a GPU it is the highest allocated memory, minus that before.
"""

from __future__ import annotations

import gc
import multiprocessing
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

SAMPLE_SECONDS = 0.002


@dataclass(frozen=True)
class Peak:
    """``call``: bytes above what there was before; ``process``: the whole process at its highest."""

    call: int
    process: int


class OutOfMemory(Exception):
    """A measuring process was ended from outside, which on a full machine means for want of memory."""


def in_own_process(function: Callable[..., object], *arguments: object) -> object:
    """``function(*arguments)`` in a fresh process; a function of a module, and arguments that can be pickled.

    Raises:
        OutOfMemory: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise OutOfMemory(f"{function.__name__}{arguments}: its process was ended, probably for memory") from error


def measure_peak(call: Callable[[], object], device: torch.device | str = "cpu") -> Peak:
    """Peak of ``call``; everything that it needs must exist before, and its libraries be warm."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        highest = torch.cuda.max_memory_allocated()
        return Peak(highest - before, highest)
    _forget_highest()
    before, earlier = psutil.Process().memory_info().rss, highest_resident()
    with _Sampler() as sampler:
        call()
    highest = highest_resident()
    # Where the system's mark did not rise, it is from before the call, and the samples are all there is.
    peak = max(sampler.highest, highest if highest > earlier else 0, before)
    return Peak(peak - before, peak)


def highest_resident() -> int:
    """The system's mark of the highest resident memory of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would be inherited from the starting process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    memory = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset
    import resource

    mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return mark if sys.platform == "darwin" else mark * 1024


def _forget_highest() -> None:
    """Linux can lower the mark to the present; elsewhere it stays, see :func:`measure_peak`."""
    switch = Path("/proc/self/clear_refs")
    if switch.exists():
        try:
            switch.write_text("5")
        except OSError:  # forbidden in some containers
            return


class _Sampler:
    """Looks at the resident memory every two milliseconds, in a thread."""

    def __enter__(self) -> _Sampler:
        self.highest = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._end.wait(SAMPLE_SECONDS):
            self.highest = max(self.highest, process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
