"""The checks, in their order, and the report, which is written as they go."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from config.files import write_text
from engine.gpu_check import chain, decoding, kernels, training
from engine.gpu_check.context import FAIL, PASS, SKIPPED, Check, Line
from engine.gpu_check.worker import Worker
from engine.run import environment

CHECKS: dict[int, Check] = {
    1: Check("the machine", kernels.machine),
    2: Check("the scan's backend", kernels.backend),
    3: Check("numbers of the kernels", kernels.numbers),
    4: Check("the scan's times", kernels.scan_times),
    5: Check("decoding, Mamba-2.8B", decoding.decoding),
    6: Check("a capture that fails", decoding.capture_failure),
    7: Check("prefill, Mamba-2.8B", decoding.prefill),
    8: Check("a step of Stage 2, Mamba-2.8B", training.steps),
    9: Check("where a step's time goes", training.step_parts),
    10: Check("the scripts on the shipped models", chain.scripts, needs=30, limit=400, yields=True),
    11: Check("maps of a report, Mamba-2.8B", training.attribution, needs=10),
    12: Check("an epoch of Stage 1", training.stage1, needs=10),
    13: Check("the tests marked gpu", chain.marked_tests, needs=15, limit=400),
}


class Results:
    """Lines so far, printed and in ``report.md`` and ``report.json``, which are complete after each line."""

    def __init__(self, out: Path, device: torch.device) -> None:
        self.out, self.lines, self.started = out, [], time.time()
        self.seconds: dict[int, float] = {}  # of each check
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        self.head: dict[str, Any] = {"card": card, **environment(), "command": sys.argv}
        self.finished = False

    def add(self, line: Line) -> None:
        before = sum(seconds for number, seconds in self.seconds.items() if number != line.check)
        self.seconds[line.check] = max(0.0, round(time.time() - self.started - before, 1))
        self.lines.append(line)
        print(line, flush=True)
        self.write()

    @property
    def counts(self) -> dict[str, int]:
        return {status: sum(line.status == status for line in self.lines) for status in (PASS, FAIL, SKIPPED)}

    def summary(self) -> str:
        said = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        return f"{said}; {time.time() - self.started:.0f} s; {self.out / 'report.md'}"

    def write(self) -> None:
        seconds = round(time.time() - self.started, 1)
        content = {**self.head, "finished": self.finished, "seconds": seconds, **self.counts}
        content["seconds_of_checks"] = self.seconds
        content["lines"] = [dataclasses.asdict(line) for line in self.lines]
        write_text(self.out / "report.json", json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        write_text(self.out / "report.md", self.markdown(seconds))

    def markdown(self, seconds: float) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.head.items() if name not in ("command", "card"))
        state = "finished" if self.finished else "not finished"
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        text = [f"# Check of {self.head['card']}", "", f"{facts}. {state} after {seconds:.0f} s: {counts}.", ""]
        text.append("Expected: estimates by counting, for an H100 (SXM) / an RTX 5090. Another card has no verdict.")
        number = 0
        for line in self.lines:
            if line.check != number:
                number = line.check
                text += [
                    "",
                    f"## {number} {CHECKS[number].title} ({self.seconds[number]:.0f} s)",
                    "",
                    "| | | measured | expected |",
                    "| - | - | - | - |",
                ]
            cells = (line.status, line.name, line.measured, line.expected)
            text.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
        for line in self.lines:
            if line.detail:
                text += ["", f"### {line.check} {line.name}", "", "```", line.detail.rstrip(), "```"]
        return "\n".join([*text, ""])


def run_checks(numbers: Iterable[int], device: torch.device, out: Path, minutes: float) -> Results:
    """Run the checks of these numbers for at most so many minutes. One that does not fit into what is left is skipped,
    and the next check begins in a new process where one leaves the card unusable."""
    results, worker, chosen = Results(out, device), None, {number: CHECKS[number] for number in numbers}
    deadline = results.started + 60 * minutes
    try:
        for number, check in chosen.items():
            later = sum(other.needs for key, other in chosen.items() if key > number and check.yields)
            if deadline - later - time.time() < check.needs:
                results.add(Line(number, check.title, SKIPPED, "out of time"))
                continue
            worker = worker or Worker(device, out)
            for line in worker.lines(number, check, deadline - later):
                results.add(line)
            worker = worker if worker.usable else worker.stop()
    finally:
        if worker:
            worker.stop()
    results.finished = True
    results.write()
    return results
