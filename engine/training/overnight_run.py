"""One training run as a process of its own: started, waited for, stopped politely, judged by its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from config.schema import REPOSITORY
from engine.training.overnight import FINAL_FILE, STATE_FILE, Result, read_result
from engine.training.train_state import StopRequest

LOG_FILE = "train.log"
MARK = "----"  # begins the log line of each start


def run_training(command: Sequence[str], folder: Path, stop: StopRequest) -> tuple[Result | None, int | None]:
    """Train into ``folder`` until the end, going on where an earlier attempt stopped.

    Returns:
        The result, None when ``stop`` interrupted the run; and the exit status, None when nothing was started.
    """
    for process in training_processes(folder):
        print(f"waiting for process {process.pid}, which an earlier script left at work on this run", flush=True)
        wait_for(process, stop, own=False)
    result = read_result(folder)
    if stop.wanted or (result is not None and result.state != "failed"):
        return result, None
    log, fresh, begun = folder / LOG_FILE, not (folder / STATE_FILE).exists(), time.monotonic()
    offset = log.stat().st_size if log.is_file() else 0
    status = wait_for(start(command, log), stop, own=True)
    result = read_result(folder)
    if result is not None:
        return (replace(result, seconds=time.monotonic() - begun) if fresh else result), status
    return (None if stop.wanted else Result("failed", reason_of_failure(log, offset, status))), status


def training_processes(folder: Path) -> list[psutil.Process]:
    """The processes that train into ``folder`` right now, whoever started them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if ("--output_dir", str(folder)) in zip(command, command[1:], strict=False):
            found.append(process)
    return found


def start(command: Sequence[str], log: Path) -> psutil.Popen:
    """Start a process whose output is appended to ``log``."""
    with log.open("ab") as stream:
        stream.write(f"{MARK} {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}\n".encode())
        stream.flush()
        return psutil.Popen(
            command,
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUTF8": "1"},
            # Elsewhere than on Windows the terminal's Ctrl-C would reach the run as well as ours, and the second
            # signal tells it to stop without saving. On Windows only the console can tell it, so it stays there.
            start_new_session=os.name != "nt",
        )


def wait_for(process: psutil.Process, stop: StopRequest, *, own: bool) -> int | None:
    """Wait until the process ends, after a stop request too: it is saving then.

    Returns:
        The exit status; None for a process that is not our child.
    """
    asked = False
    while True:
        try:
            return process.wait(timeout=0.5)
        except psutil.TimeoutExpired:
            pass
        except KeyboardInterrupt:  # the second Ctrl-C: without saving
            _interrupt(process)
        if stop.wanted and not asked:
            if os.name == "nt" and not own:
                return None  # it sits in another console and goes on there
            asked = True
            print("stopping: waiting until the run has saved its state (Ctrl-C again: at once)", flush=True)
            _interrupt(process)


def _interrupt(process: psutil.Process) -> None:
    """Ctrl-C for a run in a session of its own; on Windows the console has sent it already."""
    if os.name == "nt":
        return
    try:
        process.send_signal(signal.SIGINT)
    except psutil.NoSuchProcess:
        return


def reason_of_failure(log: Path, offset: int, status: int | None) -> str:
    """What the attempt whose output begins at byte ``offset`` said at its end: its last error, or its last line."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; see {log}"
    if status == 0:
        return f"it ended without {FINAL_FILE}; see {log}"
    with log.open("rb") as stream:
        stream.seek(offset)
        text = stream.read().decode("utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(MARK)]
    errors = [line for line in lines if line.startswith("error:")]
    said = (errors or lines or ["it printed nothing"])[-1]
    return f"status {status}: {said[:240]}; see {log}"
