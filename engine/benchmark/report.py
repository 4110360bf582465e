"""Results of one suite: printed line by line while it runs, written as JSON, drawn at the end."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from config.files import atomic_path, write_text
from config.schema import REPOSITORY
from engine.benchmark.measure import Candidate, Peak, in_own_process, in_words, take_turns, timing
from engine.benchmark.models import Size, why_missing

PACKAGES = ("torch", "transformers", "numba", "numpy", "mambapy", "mamba-ssm", "triton")
SECTIONS = ("settings", "limits", "shares", "times", "memory", "values", "ratios", "targets", "notes", "missing")
OURS, BASELINE, LIMIT = "#1f5fa8", "#b9b9b9", "#d98a1f"
LINES = (OURS, "#b0483a", "#6f6f6f", LIMIT, "#3d8a55", "#7b57a6")


class Panel(NamedTuple):
    """Bars (name → value; "ours…" and "limit…" have their own colours) or lines (name → {tokens: value})."""

    title: str
    unit: str
    values: Mapping[str, Any]
    logarithmic: bool = True


@dataclass
class Report:
    """Runs the candidates of one suite and collects the results.

    ``shares``: fractions of a limit that are reached. ``missing``: what could not be measured, and why.
    """

    suite: str
    size: Size
    device: torch.device
    settings: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    times: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    def present(self, names: Iterable[str], dtype: torch.dtype, prefix: str = "") -> list[str]:
        """Those of ``names`` that can be measured here with ``dtype``; the others are missing."""
        reasons = {name: why_missing(name, self.device, dtype) for name in names}
        for name, reason in reasons.items():
            if reason:
                self.add_missing(f"{prefix}{name}: {reason}")
        return [name for name, reason in reasons.items() if not reason]

    def time(self, candidates: Sequence[Candidate]) -> dict[str, float]:
        """Time all in alternating rounds; median seconds of each."""
        seconds = take_turns(candidates, self.device)
        return {candidate.name: self.add_seconds(candidate, seconds[candidate.name]) for candidate in candidates}

    def add_seconds(self, candidate: Candidate, seconds: Sequence[float]) -> float:
        """Record what was measured; its median."""
        found = timing(candidate.name, seconds, candidate.note)
        if candidate.unit:
            rate = candidate.amount / found["median"]
            self.limits[candidate.name] = {"rate": rate, "unit": candidate.unit, **found}
            _say(f"limit: {candidate.name}: {rate / 1e9:.4g} G{candidate.unit}")
        else:
            self.times.append(found)
            spread = f"{in_words(min(seconds))} to {in_words(max(seconds))}, " if len(seconds) > 1 else ""
            runs = f"({spread}{len(seconds)} run{'s' if len(seconds) > 1 else ''})"
            note = f"  [{candidate.note}]" if candidate.note else ""
            _say(f"{candidate.name}: {in_words(found['median'])}  {runs}{note}")
        return found["median"]

    def best_rate(self, limits: Iterable[Candidate]) -> float:
        """Operations or bytes per second of the fastest of ``limits``."""
        return max(self.limits[limit.name]["rate"] for limit in limits)

    def peak(self, name: str, function: Callable[..., Peak], *arguments: object, note: str = "") -> int:
        """Bytes of ``function(*arguments)``, measured in a process of its own (not at the size tiny).

        Raises:
            OutOfMemory: as :func:`in_own_process` does.
        """
        peak = in_own_process(function, *arguments) if self.size.own_process else function(*arguments)
        return self.add_peak(name, peak, note)

    def add_peak(self, name: str, peak: Peak, note: str = "") -> int:
        self.memory[name] = {**peak._asdict(), "note": note}
        _say(f"peak memory: {name}: {peak.call / 1e6:.4g} MB{f'  [{note}]' if note else ''}")
        return peak.call

    def add_fraction(self, name: str, value: float) -> None:
        self.shares[name] = value
        _say(f"fraction of the limit: {name}: {100 * value:.1f} %")

    def add_value(self, name: str, value: float) -> None:
        self.values[name] = value
        _say(f"{name}: {value:.4g}")

    def add_ratio(self, name: str, numerator: float | None, denominator: float | None, target: str = "") -> None:
        """Their quotient, with its ``target`` ("≥ 15"); none of what was not measured (None) or has a peak of 0."""
        if target:
            self.targets[name] = target
        if denominator == 0:
            self.add_missing(f"{name}: nothing to see at this size")
        elif numerator is not None and denominator is not None:
            self.ratios[name] = numerator / denominator
            _say(f"ratio {name}: {self.ratios[name]:.4g} {verdict(self.ratios[name], target)}".rstrip())

    def add_note(self, line: str) -> None:
        self.notes.append(line)
        _say(f"note: {line}")

    def add_missing(self, line: str) -> None:
        self.missing.append(line)
        _say(f"not measured: {line}")

    def write(self, folder: Path) -> None:
        """Write SUITE.json and SUITE.png into ``folder``."""
        machine, target = describe_machine(self.device), folder / f"{self.suite}.json"
        content = {
            "suite": self.suite,
            "size": self.size.name,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": machine,
            "versions": installed_versions(),
        } | {section: getattr(self, section) for section in SECTIONS}
        write_text(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        title = f"{self.suite}, {self.size.name}, on {machine.get('gpu') or machine['processor']}"
        draw(self.panels, title, target.with_suffix(".png"))
        _say(f"written: {target} and {target.with_suffix('.png').name}")


def _say(line: str) -> None:
    print(line, flush=True)


def verdict(value: float, target: str) -> str:
    """``(target ≥ 15: reached)``, or nothing where there is no target."""
    if not target:
        return ""
    sign, bound = target.split()
    reached = value >= float(bound) if sign == "≥" else value <= float(bound)
    return f"(target {target}: {'reached' if reached else 'missed'})"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Names and sizes; memory in bytes."""
    listing = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", listing.read_text("utf-8", "replace")) if listing.is_file() else None
    machine = {
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": psutil.virtual_memory().total,
        "system": platform.platform(),
        "device": str(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {"gpu": properties.name, "gpu_memory": properties.total_memory}
    return machine


def installed_versions() -> dict[str, str]:
    """Of Python, of the packages that matter, and the commit of this repository, marked where files changed since."""
    found = {name: next((d.version for d in distributions(name=name)), "not installed") for name in PACKAGES}
    describe = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        commit = subprocess.run(describe, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (no git here)"
    return {"python": platform.python_version(), **found, "commit": commit}


def draw(panels: Sequence[Panel], title: str, target: Path) -> None:
    """Write ``target`` (PNG): the panels side by side, each with horizontal bars or with lines over the tokens."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.2), dpi=120, squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        names, values = list(panel.values), list(panel.values.values())
        if isinstance(values[0], Mapping):
            for colour, name, points in zip(LINES, names, values, strict=False):
                axis.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour, label=name, markersize=4)
            ticks = sorted(set().union(*values))
            axis.set(xscale="log", yscale="log" if panel.logarithmic else "linear", xlabel="tokens", ylabel=panel.unit)
            axis.set_xticks(ticks, map(str, ticks), fontsize=8)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8, frameon=False)
        else:
            colours = [OURS if n.startswith("ours") else LIMIT if n.startswith("limit") else BASELINE for n in names]
            axis.bar_label(axis.barh(names, values, 0.65, color=colours), fmt="%.3g", padding=4, fontsize=8)
            logarithmic = panel.logarithmic and min(values) > 0
            limits = (min(values) / 3, max(values) * 4) if logarithmic else (0, max(values) * 1.2 or 1)
            axis.set(xscale="log" if logarithmic else "linear", xlim=limits, xlabel=panel.unit)
            axis.invert_yaxis()
        axis.tick_params(labelsize=8)
        axis.set_title(panel.title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    with atomic_path(target) as part:
        figure.savefig(part)
    plt.close(figure)
