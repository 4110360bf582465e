"""Guards of a run's folder: one run at a time, and room on the disk."""

from __future__ import annotations

import os
import shutil
import socket
from datetime import datetime
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from config.errors import InputError

LOCK_FILE = ".run.lock"
LEAST_ROOM = 10**6
_ORPHANS_S = 15.0  # data-loader workers of a killed run notice within five seconds that it is gone


_held: dict[Path, FileLock] = {}  # a lock that nobody refers to is released


def hold_folder(folder: Path) -> None:
    """Hold ``folder`` for this process until it ends, or until :func:`release_folder`; the lock of a dead process is
    free.

    Raises InputError: another process holds it; its number and its start are named where the system tells them.
    """
    require_room(folder, LEAST_ROOM, "the files of a run")
    path = folder / LOCK_FILE
    owner = f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M}"
    if path.absolute() in _held:  # a second run in one process goes on with the lock that it has
        return

    def name_owner(file: int) -> None:
        os.ftruncate(file, 0)  # of a longer name
        os.write(file, owner.encode())

    lock = FileLock(path, on_acquired=name_owner)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = _owner(path)
        try:
            lock.acquire(timeout=0 if _alive(other) else _ORPHANS_S)
        except Timeout:
            raise InputError(
                f"another run writes into {folder}{f' ({other})' if other else ''}: wait until it has ended, or give "
                "this one another --output_dir"
            ) from None
    _held[path.absolute()] = lock
    for part in folder.glob(".part-*"):  # what killed runs were writing
        number = part.name.split("-")[1]
        if not (number.isdigit() and psutil.pid_exists(int(number))) or number == str(os.getpid()):
            part.unlink(missing_ok=True)


def release_folder(folder: Path) -> None:
    """Let the next run have ``folder``."""
    path = folder / LOCK_FILE
    if (lock := _held.pop(path.absolute(), None)) is not None:
        lock.release()


def _owner(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:  # Windows lets nobody read a locked file
        return ""


def _alive(owner: str) -> bool:
    """Whether the process of a lock runs; what is not known counts as running."""
    number, _, rest = owner.removeprefix("process ").partition(" on ")
    if not number.isdigit() or not rest.startswith(f"{socket.gethostname()},"):
        return True
    try:
        return psutil.Process(int(number)).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def require_room(folder: Path, needed: int, what: str) -> None:
    """Raises InputError where the disk of ``folder`` has not ``needed`` bytes left for ``what``."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"the disk of {folder} has {size(free)} left, {what} need {size(needed)}: free some, or choose a folder on "
            "another disk"
        )


def size(count: float) -> str:
    """``1.4 GB``, ``820 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
