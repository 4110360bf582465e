"""What stops a run from outside: Ctrl-C, SIGTERM, a closed console; and how its worker processes live through them."""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import Any

# Ctrl-C, kill, a closed terminal (POSIX), Ctrl-Break (Windows)
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
CLOSE_EVENTS = (2, 5, 6)  # Windows: console closed, user logs off, shutdown
CLOSE_SECONDS = 5.0  # Windows ends the process then, whatever it does
_CALLBACKS: list[Any] = []  # Windows keeps their addresses alone


class StopRequest:
    """Turns a stop signal into a flag that the loop checks between steps; the state is saved inside the block.

    A second Ctrl-C stops at once: the state of the last save stays as it is.
    """

    wanted = False

    def __enter__(self) -> StopRequest:
        self._previous = handle_stop(self._note)
        self._left = threading.Event()
        self._remove_handler = on_console_close(self._console_closed)
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_handler()
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.wanted and number != getattr(signal, "SIGHUP", None):
            raise KeyboardInterrupt
        self.wanted = True

    def _console_closed(self) -> None:
        self.wanted = True
        self._left.wait(CLOSE_SECONDS)


def handle_stop(act: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Call ``act`` on each stop signal. Returns the handlers that were there before.

    Before SIGHUP is passed on, what the closed terminal would show goes nowhere: printing to it would raise an error.
    """
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def handle(number: int, frame: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for descriptor in terminals:
                os.dup2(nowhere, descriptor)
            os.close(nowhere)
        act(number, frame)

    # nohup starts a program with SIGHUP ignored: it shall outlive its terminal.
    numbers = [n for n in STOP_SIGNALS if n == signal.SIGINT or signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in numbers}


def on_console_close(wait: Callable[[], object]) -> Callable[[], None]:
    """Call ``wait`` when a Windows console is closed. Returns what removes the handler; elsewhere nothing happens.

    Windows ends the process when its handler returns. Python's own handler of SIGBREAK only sets a flag and returns, so
    the main thread would never see it; ``wait`` runs in a thread of its own and gives the main thread its time.
    """
    if sys.platform != "win32":
        return lambda: None
    import ctypes

    def handle(event: int) -> int:
        if event not in CLOSE_EVENTS:
            return 0
        wait()
        return 1

    kernel, callback = ctypes.windll.kernel32, ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)(handle)
    _CALLBACKS.append(callback)
    kernel.SetConsoleCtrlHandler(callback, 1)
    return lambda: kernel.SetConsoleCtrlHandler(callback, 0)


def leave_signals_to_parent(_: int = 0) -> None:
    """In a worker: the parent handles a stop, and ends its workers when it has saved. ``_``: the worker's number."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    on_console_close(threading.Event().wait)


class _SpawnProcess(SpawnProcess):
    def start(self) -> None:
        with _ctrl_c_held_back():
            super().start()


class WorkerContext(SpawnContext):
    """Spawned workers that ignore Ctrl-C from their first instruction on, long before their initialiser runs."""

    Process = _SpawnProcess


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """A process that starts here does not get Ctrl-C; this one gets it afterwards (POSIX), or not at all (Windows)."""
    if sys.platform == "win32":
        import ctypes

        ignore = ctypes.windll.kernel32.SetConsoleCtrlHandler  # without a handler: an attribute that children inherit
        ignore(None, 1)
        try:
            yield
        finally:
            ignore(None, 0)
        return
    multiprocessing.resource_tracker.ensure_running()  # its start would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def data_workers(count: int) -> dict[str, object]:
    """Options of a DataLoader with ``count`` worker processes that live through Ctrl-C."""
    if not count:
        return {"num_workers": 0}
    # A forked worker has this process's handlers, which only take note; a spawned one has Python's own, and dies.
    spawned = multiprocessing.get_start_method() != "fork"
    options = {"num_workers": count, "persistent_workers": True, "worker_init_fn": leave_signals_to_parent}
    return {**options, "multiprocessing_context": WorkerContext() if spawned else None}
