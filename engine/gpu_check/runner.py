"""Runs the checks one after the other in a process of their own, and writes the report as it goes.

A check that raises gives a failed line. One that kills the process, or that leaves the card unusable, does too, and the
next check begins in a new process. One that does not fit into the time that is left is skipped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from config.errors import first_line
from config.files import write_text
from engine.cli import force_utf8
from engine.gpu_check import chain, decoding, kernels, training
from engine.gpu_check.context import FAIL, PASS, SKIPPED, Check, Context, Line, OutOfTime
from engine.run import environment

CHECKS: dict[int, Check] = {
    1: Check("the machine", kernels.machine),
    2: Check("the scan's backend", kernels.backend, needs=20),
    3: Check("the scan's numbers", kernels.numbers, needs=20),
    4: Check("the scan's times", kernels.scan_times),
    5: Check("decoding, Mamba-2.8B", decoding.decoding, needs=30),
    6: Check("a capture that fails", decoding.capture_failure, needs=20),
    7: Check("prefill, Mamba-2.8B", decoding.prefill),
    8: Check("a step of Stage 2, Mamba-2.8B", training.steps, needs=30),
    9: Check("where a step's time goes", training.shares),
    10: Check("the scripts on the shipped models", chain.scripts, needs=60, limit=400),
    11: Check("maps of a report, Mamba-2.8B", training.attribution),
    12: Check("an epoch of Stage 1", training.stage1),
    13: Check("the tests marked gpu", chain.marked_tests, needs=40, limit=400),
}
GRACE = 10  # seconds in which a check that has no more time ends by itself


def lines_of(check: Check, context: Context) -> Iterator[Line]:
    """The lines of a check; what it raises becomes the last one."""
    try:
        yield from check.run(context)
    except OutOfTime as error:
        # Where the session has time left, something hangs.
        yield Line(context.number, check.title, SKIPPED if context.end >= context.deadline else FAIL, str(error))
    except Exception as error:  # noqa: BLE001 (drivers, compilers and kernels raise anything; the rest shall still run)
        message = f"{type(error).__name__}: {first_line(error)}"
        yield Line(context.number, check.title, FAIL, message, detail=traceback.format_exc())


class Results:
    """Lines so far, printed and in ``report.md`` and ``report.json``, which are complete after each line."""

    def __init__(self, out: Path, device: torch.device) -> None:
        self.out, self.lines, self.started = out, [], time.time()
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "none"
        self.head: dict[str, Any] = {"card": card, **environment(), "command": sys.argv}
        self.finished = False

    def add(self, line: Line) -> None:
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
                    f"## {number} {CHECKS[number].title}",
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
    """Run the checks of these numbers in a process of their own, for at most so many minutes."""
    results, worker = Results(out, device), None
    deadline = results.started + 60 * minutes
    try:
        for number in numbers:
            check = CHECKS[number]
            if deadline - time.time() < check.needs:
                results.add(Line(number, check.title, SKIPPED, "out of time"))
                continue
            worker = worker or Worker(device, out, deadline)
            for line in worker.lines(number, check, deadline):
                results.add(line)
            worker = worker if worker.usable else worker.stop()
    finally:
        if worker:
            worker.stop()
    results.finished = True
    results.write()
    return results


class Worker:
    """The process that runs the checks."""

    def __init__(self, device: torch.device, out: Path, deadline: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, str(device), out, deadline))
        self.process.start()
        theirs.close()  # so that the end of the process is seen
        self.usable = True

    def lines(self, number: int, check: Check, deadline: float) -> Iterator[Line]:
        """The lines as they come; a last one where the process ends, or has no more time.

        A check that waits for a script stops it itself, in time; one that waits for the device cannot.
        """
        end = min(deadline, time.time() + check.limit)
        self.connection.send((number, end, check))
        self.usable = False
        while self.connection.poll(max(0.0, end + GRACE - time.time())):
            try:
                found = self.connection.recv()
            except EOFError:
                self.process.join()
                message = f"its process ended with status {self.process.exitcode}"
                yield Line(number, check.title, FAIL, message)
                return
            if isinstance(found, bool):
                self.usable = found
                return
            yield found
        if end >= deadline:
            yield Line(number, check.title, SKIPPED, "out of time, stopped in the middle")
        else:
            yield Line(number, check.title, FAIL, f"no end within {check.limit:.0f} s, stopped")

    def stop(self) -> None:
        """End the process: at its next check's begin where it waits for one, at once where it works."""
        if self.usable:
            self.connection.send(None)
            self.process.join(20)
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection: Connection, device: str, out: Path, deadline: float) -> None:
    """Run the checks that come, send their lines, and after each whether the device is still usable."""
    force_utf8()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    context = Context(torch.device(device), out, deadline)
    while (wanted := connection.recv()) is not None:
        context.number, context.end, check = wanted
        for line in lines_of(check, context):
            connection.send(line)
        try:
            context.release()
        except RuntimeError:  # after an illegal access every call raises
            connection.send(False)
            return
        connection.send(True)
