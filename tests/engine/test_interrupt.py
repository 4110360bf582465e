"""What stops a run: signals, a closed terminal or console; and workers that live through them."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import interrupt
from engine.interrupt import StopRequest

REPOSITORY = Path(__file__).resolve().parents[2]
posix = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends the process on Windows")


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)  # the handler runs between two instructions of the main thread


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGHUP as a terminal has it, also where these tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) if hasattr(signal, "SIGHUP") else None
    yield
    if before is not None:
        signal.signal(signal.SIGHUP, before)


@posix
class TestStopRequest:
    @pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
    def test_first_signal_is_a_flag(self, name):
        with StopRequest() as stop:
            assert not stop.wanted
            send(getattr(signal, name))
            assert stop.wanted

    def test_second_signal_stops_at_once(self):
        with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
            send()
            assert stop.wanted
            send()
            pytest.fail("went on after the second Ctrl-C")

    def test_previous_handlers_come_back_after_an_error_too(self):
        before = [signal.getsignal(number) for number in interrupt.STOP_SIGNALS]
        with pytest.raises(ZeroDivisionError), StopRequest():
            assert signal.getsignal(signal.SIGINT) != before[0]
            raise ZeroDivisionError
        assert [signal.getsignal(number) for number in interrupt.STOP_SIGNALS] == before
        with pytest.raises(KeyboardInterrupt):
            send()

    def test_a_run_started_by_nohup_outlives_its_terminal(self):
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopRequest() as stop:
                send(signal.SIGHUP)
                assert not stop.wanted
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_a_closed_terminal_is_a_request_to_save(self, tmp_path):
        """The kernel sends SIGHUP, and every later write to the terminal fails."""
        import pty

        program = f"""
            import sys, time
            sys.path.insert(0, {str(REPOSITORY)!r})
            from pathlib import Path
            from engine.interrupt import StopRequest
            with StopRequest() as stop:
                print("training", flush=True)
                while not stop.wanted:
                    time.sleep(0.01)
                print("a line of the last step", flush=True)
                Path({str(tmp_path / "state")!r}).write_text("saved")
        """
        child, terminal = pty.fork()
        if child == 0:
            os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(program)])
        assert b"training" in os.read(terminal, 1000)
        os.close(terminal)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / "state").read_text() == "saved"


# ---------------------------------------------------------------- Windows, imitated


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Windows' console interface: registered handlers, and the calls without one, which switch Ctrl-C off and on.
    Windows keeps a handler's address, which keeps nothing alive: neither do these weak references."""
    there = SimpleNamespace(handlers=[], ignoring=[])

    def set_handler(handler: Callable[[int], int] | None, add: int) -> None:
        if handler is None:
            there.ignoring.append(add)
        else:
            (there.handlers.append if add else there.handlers.remove)(weakref.ref(handler))

    monkeypatch.setattr(sys, "platform", "win32")
    kernel = SimpleNamespace(SetConsoleCtrlHandler=set_handler)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(ctypes, "WINFUNCTYPE", ctypes.CFUNCTYPE, raising=False)
    return there


@pytest.mark.parametrize("event", interrupt.CLOSE_EVENTS)
def test_a_closed_console_waits_until_the_state_is_saved(console, event):
    """Windows ends the process when the handler returns."""
    with StopRequest() as stop:
        handler = console.handlers[0]()
        assert handler(0) == 0 and not stop.wanted, "Ctrl-C is Python's"
        returned = threading.Event()
        system = threading.Thread(target=lambda: (handler(event), returned.set()))
        system.start()
        deadline = time.monotonic() + 5
        while not stop.wanted:
            assert time.monotonic() < deadline
        assert not returned.wait(0.2), "the process would have been ended before the state is saved"
    assert returned.wait(5) and not console.handlers
    system.join()


def test_a_worker_lets_its_parent_save_when_the_console_is_closed(console, monkeypatch):
    monkeypatch.setattr(interrupt, "STOP_SIGNALS", [])  # this process keeps its handlers
    interrupt.leave_signals_to_parent(3)
    (handler,) = console.handlers
    gc.collect()
    assert handler() is not None, "Windows would call freed memory"
    threading.Thread(target=handler(), args=(2,), daemon=True).start()


def test_ctrl_c_is_off_while_a_worker_starts_on_windows(console):
    """The child inherits that for good."""
    with pytest.raises(OSError, match="no memory"), interrupt._ctrl_c_held_back():
        assert console.ignoring == [1]
        raise OSError("no memory for another process")
    assert console.ignoring == [1, 0]


# ---------------------------------------------------------------- workers

LOADING = """
    import multiprocessing, sys, time
    sys.path.insert(0, {repository!r})
    from torch.utils.data import DataLoader, Dataset
    from engine.interrupt import StopRequest, data_workers

    class Cases(Dataset):
        def __len__(self):
            return 100_000
        def __getitem__(self, row):
            time.sleep(0.01)
            return row

    if __name__ == "__main__":
        multiprocessing.set_start_method({method!r})
        options = data_workers(2)
        if {bare}:
            options = {{"num_workers": 2, "persistent_workers": True}}
        loader = iter(DataLoader(Cases(), **options))  # the workers are started, and import for seconds
        for moment in ("workers start", "workers load"):
            with StopRequest() as stop:
                print(moment, flush=True)
                while not stop.wanted:
                    next(loader)
                next(loader)
                print("saved", flush=True)
"""


def interrupted(tmp_path: Path, method: str, bare: bool = False) -> tuple[int, list[str], str]:
    """Ctrl-C, sent to the whole process group as a console does, while workers start, and again while they load."""
    script = tmp_path / "loading.py"
    program = textwrap.dedent(LOADING).format(repository=str(REPOSITORY), method=method, bare=bare)
    script.write_text(program, encoding="utf-8")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True, **streams)
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith("workers"):
            time.sleep(0.3)
            os.killpg(process.pid, signal.SIGINT)
    return process.wait(timeout=60), lines, process.stderr.read()


@posix
@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.minutes)])
def test_data_workers_live_through_ctrl_c(tmp_path, method):
    status, lines, errors = interrupted(tmp_path, method)
    assert lines == ["workers start", "saved", "workers load", "saved"] and status == 0, errors


@posix
@pytest.mark.minutes
def test_without_these_options_spawned_workers_die_of_it(tmp_path):
    """The test above could not fail otherwise."""
    status, lines, errors = interrupted(tmp_path, "spawn", bare=True)
    assert status != 0 and lines == ["workers start"] and "exited unexpectedly" in errors
