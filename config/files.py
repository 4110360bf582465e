"""Atomic writing: a file has its old content or its new one, whatever interrupts the writer. And files of tensors."""

from __future__ import annotations

import csv
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to; renamed to ``target`` when the block ends, removed when it raises.

    The temporary name keeps the target's suffixes, by which libraries choose a format. The file is flushed to the
    disk before it is renamed, so that a power failure cannot leave an empty file under the final name.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".part-{os.getpid()}-{target.name}")
    try:
        yield part
        with part.open("rb+") as stream:
            os.fsync(stream.fileno())
        replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text atomically, with line ends as they are in ``text``."""
    with atomic_path(target) as part:
        part.write_text(text, encoding="utf-8", newline="")


def write_csv(target: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a table atomically, in UTF-8 with the byte order mark that Excel needs to show Chinese."""
    with atomic_path(target) as part, part.open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows(rows)


def replace(source: Path, target: Path, attempts: int = 10) -> None:
    """Rename over ``target``; on Windows a virus scanner or viewer can hold the target for a moment."""
    for attempt in range(attempts):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == attempts - 1:
                raise
            time.sleep(0.2)


def previous(path: Path) -> Path:
    """The first free name beside ``path`` for an earlier version of it: NAME.previous.SUFFIX, NAME.previous2.SUFFIX."""
    names = (path.with_stem(f"{path.stem}.previous{number}") for number in ("", *range(2, 1000)))
    return next(name for name in names if not name.exists())


def keep_previous(path: Path) -> Path:
    """Rename a file that a new one is about to replace. Returns where it is kept."""
    kept = previous(path)
    replace(path, kept)
    return kept


def read_safetensors(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, copied: safetensors maps its file into memory, and Windows replaces no file that is mapped.

    Raises SafetensorError or OSError: damaged, or cannot be read.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def pickle_contains(path: Path, text: str) -> bool:
    """Whether the pickle of a file that torch saved contains ``text``: it is searched, not executed.

    False where there is nothing to read or the file is damaged, which its loader reports.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            return any(text.encode() in archive.read(name) for name in pickles)
    except zipfile.BadZipFile:
        return False
