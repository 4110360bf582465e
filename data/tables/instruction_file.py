"""Instruction data in JSON or JSONL: ``{"image": FILE, "conversations": [{"from": "human", "value": …}, …]}``.

The layout is LLaVA's. Every pair of a question and its answer becomes one row; ``<image>`` marks where the
picture stands and is no text. Records with plain keys (``image``, ``question``, ``report`` …) are rows as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from config.errors import InputError
from data.checks.problems import Problem

_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "model")
_EXPECTED = (
    'expected {"image": FILE, "conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}'
)


def read_instructions(path: Path, text: str) -> tuple[list[str], list[tuple[int, dict[str, str]]], list[Problem]]:
    """Columns, rows (number and cells) and the records that are none.

    Raises InputError if the file is no JSON, or no list of records.
    """
    columns: list[str] = []
    rows: list[tuple[int, dict[str, str]]] = []
    problems: list[Problem] = []
    for number, record in _records(path, text):
        if not isinstance(record, dict):
            problems.append(Problem(number, f"is a {type(record).__name__}, not a record", _EXPECTED))
            continue
        try:
            cells = _cells(record)
        except ValueError as error:
            problems.append(Problem(number, str(error), _EXPECTED, str(record.get("image", ""))))
            continue
        for row in cells:
            rows.append((number, row))
            columns += [name for name in row if name not in columns]
    return columns, rows, problems


def _records(path: Path, text: str) -> list[tuple[int, Any]]:
    try:
        if path.suffix.lower() == ".jsonl":
            lines = enumerate(text.split("\n"), start=1)
            return [(number, _parsed(path, line, number)) for number, line in lines if line.strip()]
        content = _parsed(path, text, None)
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be a table; {_EXPECTED}") from error
    if not isinstance(content, list):
        keys = f" with the keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise InputError(f"{path} holds a {type(content).__name__}{keys}, expected a list of records; {_EXPECTED}")
    return list(enumerate(content, start=1))


def _parsed(path: Path, text: str, line: int | None) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError, or a number of more digits than Python converts
        where = f"line {line}: " if line else ""
        raise InputError(f"{path} is not JSON: {where}{error}; {_EXPECTED}") from error


def _cells(record: dict[str, Any]) -> list[dict[str, str]]:
    """One row per question and answer. Raises ValueError, in words, for a conversation that has none."""
    plain = {str(key): _text(key, value) for key, value in record.items() if key not in ("conversations", "messages")}
    turns = record.get("conversations", record.get("messages"))
    if turns is None:
        return [plain]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'conversations' is no list of turns")
    rows: list[dict[str, str]] = []
    question: str | None = None
    for turn in turns:
        speaker = str(turn.get("from", turn.get("role", ""))).lower()
        value = turn.get("value", turn.get("content"))
        if not isinstance(value, str):
            raise ValueError(f"a turn of '{speaker}' has no text")
        if speaker in _ASKS and question is None:
            question = value.replace("<image>", "").strip()
        elif speaker in _ANSWERS and question is not None:
            rows.append({**plain, "question": question, "answer": value})
            question = None
        elif speaker != "system":
            raise ValueError(f"a turn of '{speaker}' is out of turn")
    if question is not None or not rows:
        raise ValueError("a question has no answer")
    return rows


def _text(key: str, value: Any) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]  # "image": ["one.nii.gz"]
    if isinstance(value, list) and str(key).lower() in ("image", "images"):
        raise ValueError(f"'{key}' names {len(value)} images, one is used")
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
