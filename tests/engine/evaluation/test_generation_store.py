"""The store on disk: lines that a crash cut short, several processes, other identities, changed cases."""

from __future__ import annotations

from pathlib import Path

from engine.evaluation.generation_store import GenerationStore


def record(row: int, text: str) -> dict:
    return {"table": "t", "condition": "own", "row": row, "case": f"digest{row}", "text": text}


def test_a_line_that_a_crash_cut_short_is_missing_and_spoils_no_other(tmp_path: Path) -> None:
    GenerationStore(tmp_path, {"a": 1}).add([record(0, "右肺结节。"), record(1, "空洞。")])
    [path] = tmp_path.glob("generations-*.jsonl")
    path.write_bytes(path.read_bytes()[:-8])  # in the middle of a character
    store = GenerationStore(tmp_path, {"a": 1})
    assert store.get("t", "own", 0, "digest0")["text"] == "右肺结节。" and store.get("t", "own", 1, "digest1") is None
    store.add([record(1, "实变。")])
    assert GenerationStore(tmp_path, {"a": 1}).get("t", "own", 1, "digest1")["text"] == "实变。"


def test_processes_read_each_other_and_no_other_identity(tmp_path: Path) -> None:
    first, second = (GenerationStore(tmp_path, {"a": 1}, process) for process in (0, 1))
    second.add([record(0, "结节。")])
    assert first.get("t", "own", 0, "digest0") is None
    first.reload()
    assert first.get("t", "own", 0, "digest0")["text"] == "结节。"
    assert first.get("t", "own", 0, "another image") is None
    assert GenerationStore(tmp_path, {"a": 2}).get("t", "own", 0, "digest0") is None
