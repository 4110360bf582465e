"""The page's cases: their files, their events, and the queue in front of the one process that reads.

    root/<case>/upload/000000.nii.gz …    what was sent, under numbers
    root/<case>/ct.npy, lesions.npy, map-0-2.npy    what the viewer shows
    root/<case>/cache/                    the preprocessed case

Everything lies in one temporary folder of this process. It is removed at the end, by the reading process where this one
was killed, and at the next start where both were.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import secrets
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from config.errors import InputError
from engine.page.uploads import Upload

PREFIX = "ct-report-page-"
MOST_CASES = 24  # kept at one time; the one that was used longest ago makes room
MOST_WAITING = 16  # jobs in the queue
MOST_EVENTS = 20_000  # of a case
IDLE_S = 2 * 3600.0  # after which a case is removed
MOST_STARTS = 3  # of a reading process that ends before it is ready
Event = dict[str, Any]


class Busy(InputError):
    """No room in the queue."""


@dataclass
class Case:
    """One scan of one user. ``events``: all that happened, in order; the page is made from them alone."""

    id: str
    folder: Path
    upload: Upload
    name: str = ""
    events: list[Event] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    used: float = field(default_factory=time.monotonic)
    asked: int = 0
    waiting: int = 0  # jobs of this case that are not done

    def last(self, kind: str) -> Event | None:
        return next((event for event in reversed(self.events) if event["kind"] == kind), None)


class Desk:
    """See the module's docstring. All methods run in the server's event loop, the reader of the pipe apart."""

    def __init__(
        self, settings: Mapping[str, Any], serve: Callable[..., None], on_failure: Callable[[str], None]
    ) -> None:
        """``serve``: the reading process; ``on_failure``: told why the models cannot be loaded."""
        remove_abandoned()
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX))  # for this user alone
        (self.root / "owner").write_text(str(multiprocessing.current_process().pid), encoding="ascii")
        self.settings, self.serve, self.on_failure = settings, serve, on_failure
        self.most_bytes = settings["max_upload_mb"] << 20
        self.cases: dict[str, Case] = {}
        self.queue: deque[Mapping[str, Any]] = deque()
        self.current: Mapping[str, Any] | None = None
        self.ready: Event | None = None
        self.failure = ""
        self._starts = 0
        self._closing = False

    # ------------------------------------------------------------------ the reading process

    def start(self) -> None:
        """Start the reading process, and take its events from then on."""
        self.loop = asyncio.get_running_loop()
        self._starts += 1
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        self.process = context.Process(
            target=self.serve, args=(dict(self.settings), there, self.root), name="reading", daemon=True
        )
        self.process.start()
        there.close()  # the process has its own; this one would hide its end
        self._pipe = here
        threading.Thread(target=self._listen, args=(here,), daemon=True).start()

    def _listen(self, pipe: Connection) -> None:
        with suppress(EOFError, OSError):
            while True:
                case, event = pipe.recv()
                self.loop.call_soon_threadsafe(self._take, case, event)
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self._ended)

    def _take(self, case: str | None, event: Event) -> None:
        if event["kind"] == "ready":
            self.ready, self._starts = event, 0
            self._next()
        elif event["kind"] == "failed":
            self.failure = event["line"]
            self.on_failure(self.failure)
        elif event["kind"] == "end":
            self._done()
            self._next()
        elif case in self.cases:
            self.tell(self.cases[case], event)

    def _ended(self) -> None:
        """The reading process is gone: its job failed, the others go on with a new one."""
        self.ready = None
        if self._closing or self.failure:
            return
        self.process.join(timeout=5)
        code = self.process.exitcode
        reason = "not enough memory, perhaps" if code == -9 else f"exit code {code}"
        if self.current is not None:
            line = f"the reading process ended at this scan ({reason}); it is started again, and the next scan works"
            self._fail_current(line)
        if self._starts >= MOST_STARTS:
            self.failure = f"the reading process ended {MOST_STARTS} times before it was ready ({reason})"
            self.on_failure(self.failure)
            return
        self.start()

    def _fail_current(self, line: str) -> None:
        case = self.cases.get(self.current["case"])
        if case is not None:
            self.tell(case, {"kind": "error", "of": self.current["kind"], "line": line})
        self._done()

    def _done(self) -> None:
        if self.current is not None and (case := self.cases.get(self.current["case"])) is not None:
            case.waiting -= 1
            self.tell(case, {"kind": "end", "of": self.current["kind"]})
        self.current = None

    def _next(self) -> None:
        while self.queue and self.current is None and self.ready is not None:
            job = self.queue.popleft()
            if job["case"] in self.cases or job["kind"] == "forget":
                self.current = job
                try:
                    self._pipe.send(dict(job))
                except OSError:  # it has just ended; _ended follows
                    return
        for place, job in enumerate(self.queue, 1):
            if (case := self.cases.get(job["case"])) is not None:
                self.tell(case, {"kind": "queue", "place": place})

    # ------------------------------------------------------------------ cases and jobs

    def new_case(self) -> Case:
        """An empty case that files can be sent to. Raises Busy where every case is at work."""
        self.remove_idle()
        if len(self.cases) >= MOST_CASES:
            idle = [case for case in self.cases.values() if not case.waiting]
            if not idle:
                raise Busy("the page is full: try again in a minute")
            self.remove(min(idle, key=lambda case: case.used))
        number = secrets.token_urlsafe(16)
        folder = self.root / number
        (folder / "upload").mkdir(parents=True)
        case = Case(number, folder, Upload(folder / "upload", self.most_bytes))
        self.cases[number] = case
        return case

    def submit(self, case: Case, kind: str, **details: Any) -> None:
        """Put a job of a case into the queue. Raises Busy where the queue is full."""
        if self.failure:
            raise Busy(f"the models could not be loaded: {self.failure}")
        if len(self.queue) >= MOST_WAITING or case.waiting >= 4:
            raise Busy(f"{len(self.queue)} jobs wait already: try again in a minute")
        case.used, case.waiting = time.monotonic(), case.waiting + 1
        job = {"case": case.id, "kind": kind, "folder": str(case.folder), "name": case.name, **details}
        self.queue.append(job)
        if self.current is not None or self.ready is None:
            self.tell(case, {"kind": "queue", "place": len(self.queue)})
        self._next()

    def tell(self, case: Case, event: Event) -> None:
        """Add an event to a case, and wake who waits for one."""
        if len(case.events) < MOST_EVENTS:
            case.events.append({**event, "at": time.time()})
        case.changed.set()
        case.changed = asyncio.Event()

    def remove(self, case: Case) -> None:
        """Drop a case, its files and its state."""
        self.cases.pop(case.id, None)
        self.tell(case, {"kind": "gone"})
        shutil.rmtree(case.folder, ignore_errors=True)
        self.queue = deque(job for job in self.queue if job["case"] != case.id)
        self.queue.append({"case": case.id, "kind": "forget", "folder": str(case.folder)})
        self._next()

    def remove_idle(self) -> None:
        now = time.monotonic()
        for case in list(self.cases.values()):
            if not case.waiting and now - case.used > IDLE_S:
                self.remove(case)

    def close(self) -> None:
        """End the reading process and remove all files."""
        self._closing = True
        if (process := getattr(self, "process", None)) is not None:
            process.terminate()
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join(timeout=5)
        shutil.rmtree(self.root, ignore_errors=True)


def remove_abandoned() -> None:
    """Folders of pages that are no more, this user's."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, ValueError):
            owner = int((folder / "owner").read_text(encoding="ascii"))
            written = (folder / "owner").stat().st_mtime
            if not (psutil.pid_exists(owner) and psutil.Process(owner).create_time() < written + 1):
                shutil.rmtree(folder, ignore_errors=True)
