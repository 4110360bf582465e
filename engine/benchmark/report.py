"""What a suite found: said line by line while it runs, written as JSON, drawn at the end."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from engine.benchmark.limits import Limit
from engine.benchmark.machine import describe_machine, installed_versions
from engine.benchmark.peak_memory import Peak
from engine.benchmark.pictures import Panel, draw
from engine.benchmark.ratios import TARGETS, verdict
from engine.benchmark.sizes import Size
from engine.benchmark.timing import Timing


@dataclass
class Report:
    """Collects the results of one suite. ``missing``: what could not be measured, and what to do about it."""

    suite: str
    size: Size
    device: torch.device
    settings: dict[str, object] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    limits: dict[str, dict[str, object]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    memory: dict[str, dict[str, object]] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def add_times(self, timings: Iterable[Timing]) -> None:
        for timing in timings:
            self.timings.append(timing)
            self.say(timing.line())

    def add_limits(self, limits: Iterable[Limit], timings: Mapping[str, Timing]) -> None:
        for limit in limits:
            timing = timings[limit.name]
            rate = limit.rate(timing)
            self.limits[limit.name] = {"rate": rate, "unit": limit.unit, **timing.to_dict()}
            self.say(f"limit: {limit.name}: {rate / 1e9:.4g} G{limit.unit}")

    def add_share(self, name: str, share: float) -> None:
        """Part of a limit that is reached, 1 is all of it."""
        self.shares[name] = share
        self.say(f"share of the limit: {name}: {100 * share:.1f} %")

    def add_peak(self, name: str, peak: Peak, note: str = "") -> None:
        self.memory[name] = {"call": peak.call, "process": peak.process, "note": note}
        self.say(f"peak memory: {name}: {peak.call / 1e6:.4g} MB{f'  [{note}]' if note else ''}")

    def add_value(self, name: str, value: float) -> None:
        self.values[name] = value
        self.say(f"{name}: {value:.4g}")

    def add_ratio(self, name: str, value: float) -> None:
        self.ratios[name] = value
        self.say(f"ratio {name}: {value:.4g} {verdict(self.suite, name, value)}".rstrip())

    def add_note(self, line: str) -> None:
        self.notes.append(line)
        self.say(f"note: {line}")

    def add_missing(self, line: str) -> None:
        self.missing.append(line)
        self.say(f"not measured: {line}")

    def to_dict(self) -> dict[str, object]:
        return {
            "suite": self.suite,
            "size": self.size.name,
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
            "machine": describe_machine(self.device),
            "versions": installed_versions(),
            "settings": self.settings,
            "limits": self.limits,
            "shares": self.shares,
            "times": [timing.to_dict() for timing in self.timings],
            "memory": self.memory,
            "values": self.values,
            "ratios": self.ratios,
            "targets": {name: f"{sign} {bound:g}" for name, (sign, bound) in TARGETS[self.suite].items()},
            "notes": self.notes,
            "missing": self.missing,
        }

    def write(self, folder: Path) -> None:
        """Write SUITE.json and SUITE.png into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{self.suite}.json"
        target.write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        name = describe_machine(self.device).get("gpu") or describe_machine(self.device)["processor"]
        draw(self.panels, f"{self.suite}, {self.size.name}, on {name}", folder / f"{self.suite}.png")
        self.say(f"written: {target} and {target.with_suffix('.png').name}")
