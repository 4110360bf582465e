"""The process in which the checks run: what one of them breaks, or never ends, is a failed line and no more."""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from config.errors import first_line
from engine.gpu_check.context import FAIL, SKIPPED, Check, Context, Line, OutOfTime
from engine.run import limit_gpu_memory

GRACE = 10  # seconds in which a check that has no more time ends by itself


def lines_of(check: Check, context: Context) -> Iterator[Line]:
    """The lines of a check; what it raises becomes the last one."""
    try:
        yield from check.run(context)
    except OutOfTime as error:
        yield Line(context.number, check.title, SKIPPED if context.shared else FAIL, str(error))
    except Exception as error:  # noqa: BLE001 (drivers, compilers and kernels raise anything; the rest shall still run)
        message = f"{type(error).__name__}: {first_line(error)}"
        yield Line(context.number, check.title, FAIL, message, detail=traceback.format_exc())


class Worker:
    """The process that runs the checks."""

    def __init__(self, device: torch.device, out: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, str(device), out))
        self.process.start()
        theirs.close()  # so that the end of the process is seen
        self.usable = True

    def lines(self, number: int, check: Check, deadline: float) -> Iterator[Line]:
        """The lines as they come; a last one where the process ends, or has no more time.

        A check that waits for a script stops it itself, in time; one that waits for the device cannot.
        """
        end = min(deadline, time.time() + check.limit)
        self.connection.send((number, end, end == deadline, check))
        self.usable = False
        while True:
            try:
                if not self.connection.poll(max(0.0, end + GRACE - time.time())):
                    break
                found = self.connection.recv()
            except (EOFError, OSError):  # BrokenPipeError, where Windows looks into the pipe of a process that ended
                self.process.join()
                message = f"its process ended with status {self.process.exitcode}"
                yield Line(number, check.title, FAIL, message)
                return
            if isinstance(found, bool):
                self.usable = found
                return
            yield found
        if end == deadline:
            yield Line(number, check.title, SKIPPED, "out of time, stopped in the middle")
        else:
            yield Line(number, check.title, FAIL, f"no end within {check.limit:.0f} s, stopped")

    def stop(self) -> None:
        """End the process: by itself where it waits for a check, or where Ctrl-C reached it too."""
        if self.usable:
            self.connection.send(None)
        self.process.join(20 if self.usable else 3)
        self.process.kill()
        self.process.join()
        self.connection.close()


def serve(connection: Connection, device: str, out: Path) -> None:
    """Run the checks that come, send their lines, and after each whether the device is still usable."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    limit_gpu_memory(None)
    context = Context(torch.device(device), out)
    while (wanted := connection.recv()) is not None:
        context.number, context.end, context.shared, check = wanted
        for line in lines_of(check, context):
            connection.send(line)
        try:
            context.release()
        except RuntimeError:  # after an illegal access every call raises
            connection.send(False)
            return
        connection.send(True)
