"""How a suite measures: wall time in alternating rounds, peak memory; its results as JSON, a table and a figure."""

from __future__ import annotations

import gc
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from llvmlite.binding import get_host_cpu_name
from matplotlib.figure import Figure

from config.files import atomic_path, write_text

Calls = Mapping[str, Callable[[], object]]
Limit = tuple[Callable[[], object], float, str]  # a call, its operations or bytes, and the unit of their rate


@dataclass(frozen=True)
class Size:
    """What is measured at one ``--size``; tokens are per sample."""

    name: str
    width: int  # D
    layers: int
    heads: int  # of the attention decoder
    dtype: torch.dtype
    vocabulary: int = 50280  # embedding rows, three more than the tokenizer has tokens
    scan_tokens: int = 1024
    visual: int = 784
    text: int = 64
    answer: int = 256  # tokens after the visual ones in a training step
    decode: int = 16
    short: int = 256  # at most, for transformers' backward pass, which takes the square of L
    scaling: tuple[int, ...] = (49, 196, 784, 3136, 12544)  # the last is 16 times the third
    memory_tokens: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    block: int = 1 << 30  # bytes that are read and copied
    volume: tuple[int, int, int] = (300, 512, 512)  # voxels of the scan that is preprocessed, z y x
    recomputes: bool = False  # training keeps only the blocks' inputs, as MambaLM does from a billion parameters on


SIZES = {
    "2.8b": Size("2.8b", 2560, 64, 32, torch.bfloat16, recomputes=True),
    "130m": Size("130m", 768, 24, 12, torch.float32),
    "tiny": Size(
        "tiny", 32, 2, 4, torch.float32, 300, 48, 16, 8, 12, 3, 16, (4, 9, 16, 64, 256), (16, 32), 1 << 22, (30, 48, 56)
    ),
}


class Report:
    """Measures the calls of one suite and collects the results by section (``shares``: fractions of a limit) and name.

    ``panels``: by title what the figure shows, bars (name → value) or lines (name → {tokens: value}).
    """

    def __init__(self, suite: str, size: Size, device: torch.device) -> None:
        self.suite, self.size, self.device = suite, size, device
        sections = ("limits", "shares", "times", "memory", "values", "ratios", "targets")
        self.results: dict[str, dict[str, Any]] = {section: {} for section in sections}
        self.missing: list[str] = []
        self.panels: dict[str, Mapping[str, Any]] = {}

    def add(self, section: str, name: str, value: Any, text: str = "") -> None:
        self.results[section][name] = value
        print(f"{section}: {name}: {text or format(value, '.4g')}", flush=True)

    def time(self, calls: Calls, limits: Mapping[str, Limit] | None = None, rounds: int = 3) -> dict[str, float]:
        """Median seconds of each call. All take turns, so that a slow phase of the machine slows all of them.

        Each runs once untimed at first. A call that returns a list of numbers has timed itself, in seconds.
        """
        limits = limits or {}
        calls = {name: limit[0] for name, limit in limits.items()} | calls
        for call in calls.values():
            call()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        finish = torch.get_device_module(self.device).synchronize
        for _ in range(rounds):
            for name, call in calls.items():
                gc.collect()
                finish()
                started = time.perf_counter()
                own = call()
                finish()
                timed_itself = isinstance(own, list) and all(isinstance(value, float) for value in own)
                seconds[name] += own if timed_itself else [time.perf_counter() - started]
        return {name: self.add_seconds(name, found, limits.get(name)) for name, found in seconds.items()}

    def add_seconds(self, name: str, seconds: Sequence[float], limit: Limit | None = None) -> float:
        """Record raw times with median and spread; a limit also with its rate. Returns the median."""
        median, spread = statistics.median(seconds), {"fastest": min(seconds), "slowest": max(seconds)}
        found = {"name": name, "runs": len(seconds), "median": median, **spread, "seconds": seconds}
        if limit:
            rate, unit = limit[1] / median, limit[2]
            self.add("limits", name, {"rate": rate, "unit": unit, **found}, f"{rate / 1e9:.4g} G{unit}")
        else:
            self.add("times", name, found, f"{median:.4g} s ({min(seconds):.4g} to {max(seconds):.4g})")
        return median

    def best_rate(self, limits: Iterable[str]) -> float:
        """Operations or bytes per second of the fastest of ``limits``."""
        return max(self.results["limits"][name]["rate"] for name in limits)

    def peak(self, name: str, function: Callable[..., tuple[int, int]], *arguments: object) -> int | None:
        """Bytes of the call that ``function(*arguments)`` measures; None if its process was killed.

        The process is a fresh one (not at the size tiny), whose allocator holds no freed memory.
        """
        fresh = partial(ProcessPoolExecutor, mp_context=multiprocessing.get_context("spawn"))
        with (ThreadPoolExecutor if self.size.name == "tiny" else fresh)(1) as pool:
            try:
                return self.add_peak(name, pool.submit(function, *arguments).result())
            except BrokenProcessPool:
                self.missing.append(f"peak memory of {name}: its process was killed, probably for lack of memory")
        return None

    def add_peak(self, name: str, peak: tuple[int, int]) -> int:
        self.add("memory", name, {"call": peak[0], "process": peak[1]}, f"{peak[0] / 1e6:.4g} MB")
        return peak[0]

    def add_ratio(self, name: str, numerator: float | None, denominator: float | None, target: str = "") -> None:
        """Their quotient, with its ``target`` ("≥ 15"); none of what was not measured (None) or has a peak of 0."""
        if target:
            self.results["targets"][name] = target
        if denominator == 0:
            self.missing.append(f"{name}: nothing to see at this size")
        elif numerator is not None and denominator is not None:
            self.add("ratios", name, numerator / denominator)

    def write(self, folder: Path) -> None:
        """Print the ratios as a table; write SUITE.json and SUITE.png into ``folder``."""
        print(pd.DataFrame({name: self.results[name] for name in ("ratios", "targets")}).to_string(na_rep=""))
        print(*(f"not measured: {line}" for line in self.missing), sep="\n")
        content = {
            "suite": self.suite,
            "size": self.size.name,
            "machine": {
                "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else get_host_cpu_name(),
                "torch_threads": torch.get_num_threads(),
                "system": platform.platform(),
                "python": platform.python_version(),
            },
            "versions": {package.name: package.version for package in distributions()},
            **self.results,
            "times": [*self.results["times"].values()],
            "missing": self.missing,
        }
        write_text(folder / f"{self.suite}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        draw(self.panels, f"{self.suite}, {self.size.name}", folder / f"{self.suite}.png")
        print(f"written: {folder / self.suite}.json and .png", flush=True)


def measure_peak(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Peak of ``call``, allocated on a GPU, otherwise resident: bytes above those in use before, and of the process.

    Everything that the call needs must exist before, and its libraries must have run once.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        highest = torch.cuda.max_memory_allocated()
        return highest - before, highest
    memory = psutil.Process().memory_info
    before = highest = memory().rss
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call)
        while not running.done():
            highest = max(highest, memory().rss)
            time.sleep(0.002)
        running.result()  # raises what the call raised
    return highest - before, highest


def draw(panels: Mapping[str, Mapping[str, Any]], title: str, target: Path) -> None:
    """Write ``target`` (PNG): the panels, at most four in a row, with horizontal bars or with lines over the tokens."""
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure((6 * columns, 4.2 * rows), layout="constrained")
    for number, (heading, values) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, columns, number)
        if isinstance(next(iter(values.values())), Mapping):
            pd.DataFrame(values).sort_index().plot(ax=axis, loglog=True, marker="o", xlabel="tokens", title=heading)
        else:
            colours = ["tab:blue" if "ours" in n else "tab:orange" if "limit" in n else "silver" for n in values]
            pd.Series(values).plot.barh(ax=axis, color=colours, title=heading)
            axis.bar_label(axis.containers[0], fmt="%.3g")
            axis.margins(x=0.2)
            axis.invert_yaxis()
    figure.suptitle(title)
    with atomic_path(target) as part:
        figure.savefig(part)
