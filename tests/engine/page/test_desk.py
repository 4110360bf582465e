"""Cases, queue and the reading process behind them, with a process that only pretends to read."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from config.errors import InputError
from engine.page import desk as module
from engine.page.desk import Busy, Case, Desk, remove_abandoned
from engine.page.server import run

SETTINGS = {"max_upload_mb": 1, "how": "well"}


def pretend(settings: dict[str, Any], connection: Connection, root: Path) -> None:
    """Stands for engine.page.worker.serve."""
    if settings["how"] == "fails":
        connection.send((None, {"kind": "failed", "line": "no checkpoint"}))
        return
    if settings["how"] == "dies at start":
        os._exit(3)
    connection.send((None, {"kind": "ready"}))
    while True:
        job = connection.recv()
        if job["kind"] == "die":
            os._exit(3)
        connection.send((job["case"], {"kind": "did", "what": job["kind"], "name": job.get("name")}))
        connection.send((job["case"], {"kind": "end", "of": job["kind"]}))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def with_desk(temporary: Path) -> Iterator[Callable[..., None]]:
    """Runs a coroutine with a desk whose process has started."""

    def start(work: Callable[..., Coroutine[Any, Any, None]], how: str = "well") -> None:
        async def main() -> None:
            failures: list[str] = []
            desk = Desk({**SETTINGS, "how": how}, pretend, failures.append)
            desk.start()
            try:
                await asyncio.wait_for(work(desk, failures), 60)
            finally:
                desk.close()

        asyncio.run(main())
        assert not list(temporary.glob("ct-report-page-*"))

    yield start


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


def kinds(case: Case) -> list[str]:
    return [event["kind"] for event in case.events]


def test_jobs_are_done_in_their_order_and_each_case_gets_its_own_events(with_desk: Callable[..., None]) -> None:
    async def work(desk: Desk, failures: list[str]) -> None:
        cases = [desk.new_case() for _ in range(3)]
        for number, case in enumerate(cases):
            case.name = f"scan {number}"
            desk.submit(case, "read")
        await until(lambda: all(case.events and case.events[-1]["kind"] == "end" for case in cases))
        assert [case.last("did")["name"] for case in cases] == ["scan 0", "scan 1", "scan 2"]
        ended = [case.last("end")["at"] for case in cases]
        assert ended == sorted(ended) and all(case.waiting == 0 for case in cases)
        assert "queue" in kinds(cases[2]) and not failures

    with_desk(work)


def test_a_process_that_ends_fails_its_own_job_alone_and_is_started_again(with_desk: Callable[..., None]) -> None:
    async def work(desk: Desk, failures: list[str]) -> None:
        first, second = desk.new_case(), desk.new_case()
        desk.submit(first, "die")
        desk.submit(second, "read")
        await until(lambda: second.last("end"))
        assert "exit code 3" in first.last("error")["line"] and "the next scan works" in first.last("error")["line"]
        assert second.last("error") is None and second.last("did") and not failures

    with_desk(work)


@pytest.mark.parametrize(
    ("how", "line"), [("fails", "no checkpoint"), ("dies at start", "3 times before it was ready")]
)
def test_models_that_cannot_be_loaded_end_the_page_with_a_line(
    with_desk: Callable[..., None], how: str, line: str
) -> None:
    async def work(desk: Desk, failures: list[str]) -> None:
        await until(lambda: failures)
        assert line in failures[0]
        with pytest.raises(Busy, match="could not be loaded"):
            desk.submit(desk.new_case(), "read")

    with_desk(work, how)


def test_queue_and_cases_are_bounded_and_the_oldest_idle_case_makes_room(
    with_desk: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_CASES", 3)
    monkeypatch.setattr(module, "MOST_WAITING", 2)

    async def work(desk: Desk, failures: list[str]) -> None:
        cases = [desk.new_case() for _ in range(3)]  # the process is not ready yet: jobs wait
        for case in cases[:2]:
            desk.submit(case, "read")
        with pytest.raises(Busy, match="2 jobs wait already"):
            desk.submit(cases[2], "read")
        newest = desk.new_case()
        assert cases[2].id not in desk.cases and not cases[2].folder.exists() and newest.folder.exists()
        assert kinds(cases[2]) == ["gone"]
        await until(lambda: all(case.last("end") for case in cases[:2]))
        monkeypatch.setattr(module, "IDLE_S", 0.0)
        await asyncio.sleep(0.05)
        desk.remove_idle()
        assert not desk.cases and [path.name for path in desk.root.iterdir()] == ["owner"]

    with_desk(work)


def test_folders_of_pages_that_are_no_more_are_removed_and_no_others(temporary: Path) -> None:
    for name, owner in (("dead", "999999999"), ("alive", str(os.getpid())), ("foreign", None)):
        folder = temporary / f"ct-report-page-{name}"
        folder.mkdir()
        (folder / "ct.npy").write_bytes(b"x")
        if owner:
            (folder / "owner").write_text(owner, encoding="ascii")
    reused = temporary / "ct-report-page-reused"  # its number belongs to a younger process now
    reused.mkdir()
    (reused / "owner").write_text(str(os.getpid()), encoding="ascii")
    os.utime(reused / "owner", (time.time() - 9e6,) * 2)
    remove_abandoned()
    assert sorted(path.name for path in temporary.iterdir()) == ["ct-report-page-alive", "ct-report-page-foreign"]


def test_a_page_for_others_needs_a_password_and_a_port_that_is_free(temporary: Path) -> None:
    given = {**SETTINGS, "demo": False, "password": None, "port": 0}
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 opens the page to the network: give --password too"):
        run({**given, "host": "0.0.0.0"}, pretend, print)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port} cannot be used"):
            run({**given, "host": "127.0.0.1", "port": port}, pretend, print)
    with pytest.raises(InputError, match="cannot be used"):
        run({**given, "host": "no.such.host.invalid", "password": "x"}, pretend, print)
    assert not list(temporary.iterdir())
