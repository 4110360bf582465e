"""Generated reports on disk, one JSON line each, written as they come, so that a stopped evaluation resumes.

    OUT/generations-<identity>-<process>.jsonl     first line: what the identity is a digest of

The identity is a digest of checkpoint, language model and settings. Files of another identity are not read, so a
folder can hold the generations of several checkpoints. Every process writes its own file and reads all of them, so the
number of processes may change between two starts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

Key = tuple[str, str, int]  # table, condition, row


class GenerationStore:
    """Records by table, condition and row; the last one of a key counts."""

    def __init__(self, folder: Path, described: Mapping[str, Any], process: int = 0) -> None:
        """
        Args:
            folder: made if absent.
            described: JSON values that decide what is generated.
            process: number of this process.
        """
        text = json.dumps(described, sort_keys=True, ensure_ascii=False)
        self.identity = blake2b(text.encode("utf-8"), digest_size=6).hexdigest()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"generations-{self.identity}-{process}.jsonl"
        self._described = dict(described)
        self._records: dict[Key, dict[str, Any]] = {}
        self.reload()

    def reload(self) -> None:
        """Read what all processes have written so far."""
        self._records = {}
        for path in sorted(self.folder.glob(f"generations-{self.identity}-*.jsonl")):
            for record in _whole_lines(path):
                if "condition" in record:
                    self._records[record["table"], record["condition"], record["row"]] = record

    def get(self, table: str, condition: str, row: int, case: str) -> dict[str, Any] | None:
        """The record of a row; None where it has none, or its image or mask has changed since (``case``: digest)."""
        record = self._records.get((table, condition, row))
        return record if record is not None and record["case"] == case else None

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records, each with table, condition, row and case, to the process's file."""
        new = not self._path.is_file() or not self._path.stat().st_size
        # A line that a crash cut short must not swallow the next one.
        torn = not new and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8", newline="\n") as stream:
            if new:
                stream.write(json.dumps(self._described, ensure_ascii=False) + "\n")
            if torn:
                stream.write("\n")
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._records[record["table"], record["condition"], record["row"]] = record


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of the complete lines; one that a crash cut short is generated again."""
    for line in path.read_bytes().split(b"\n"):
        try:
            yield json.loads(line)
        except ValueError:  # also bytes that are no UTF-8
            continue
