"""Lines, verdicts and the report; checks that raise, hang or take their process with them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from engine.gpu_check import worker
from engine.gpu_check.context import FAIL, PASS, SKIPPED, Check, Context, Expected, Line
from engine.gpu_check.runner import CHECKS, Results, run_checks
from engine.gpu_check.worker import lines_of
from tests.engine.gpu_check.imitated import ends_its_process, good, hangs, raises, waits_in_vain

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("card", "value", "least", "status"),
    [
        ("NVIDIA H100 80GB HBM3", 0.31, False, FAIL),
        ("NVIDIA H100 80GB HBM3", 0.29, False, PASS),
        ("NVIDIA H100 80GB HBM3", 0.29, True, FAIL),
        ("NVIDIA GeForce RTX 5090", 0.31, False, PASS),
        ("NVIDIA GeForce RTX 5090", 0.61, False, FAIL),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 0.61, False, PASS),
        ("NVIDIA GeForce RTX 3060", 9.0, False, PASS),
    ],
)
def test_only_the_estimated_cards_are_judged_by_the_estimate(card: str, value: float, least: bool, status: str) -> None:
    assert Expected(0.30, 0.60, "s", least).verdict(card, value) == status


def test_a_check_that_raises_gives_a_failed_line_with_its_message(tmp_path: Path) -> None:
    context = Context(CPU, tmp_path, number=3)
    lines = list(lines_of(Check("a title", raises), context))
    assert [line.status for line in lines] == [PASS, FAIL]
    assert lines[1].name == "a title" and lines[1].measured.startswith("ValueError: CUDA error: an illegal | memory")
    assert "in raises" in lines[1].detail


@pytest.mark.parametrize(("shared", "status"), [(False, FAIL), (True, SKIPPED)])
def test_waiting_in_vain_is_no_fault_at_the_end_of_the_session(shared: bool, status: str, tmp_path: Path) -> None:
    context = Context(CPU, tmp_path, number=10, shared=shared)
    assert [line.status for line in lines_of(Check("scripts", waits_in_vain), context)] == [PASS, status]


def test_the_pipe_of_a_process_that_ended_may_break(tmp_path: Path) -> None:
    """On Windows already the look into it does."""
    one = object.__new__(worker.Worker)
    one.connection, one.process = Mock(), Mock(exitcode=-9)
    one.connection.poll.side_effect = [True, BrokenPipeError(109, "The pipe has been ended")]
    one.connection.recv.return_value = Line(1, "copy", PASS)
    lines = list(one.lines(1, Check("ending", good), time.time() + 60))
    assert [line.status for line in lines] == [PASS, FAIL] and "ended with status -9" in lines[1].measured


def test_the_report_is_whole_after_each_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path, CPU)
    results.add(Line(1, "copy", PASS, "3000 GB/s", "≥ 2600 / 1400 GB/s", 3000.0, "GB/s"))
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found["pass"] == 1 and found["finished"] is False and found["lines"][0]["value"] == 3000.0
    results.add(Line(3, "numbers", FAIL, "a | b\nc", detail="Traceback"))
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| pass | copy | 3000 GB/s | ≥ 2600 / 1400 GB/s |" in text and "| fail | numbers | a / b c |" in text
    assert "## 3 numbers of the kernels (0 s)" in text and text.rstrip().endswith("Traceback\n```")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["fail"] == 1
    assert not list(tmp_path.glob(".part*"))
    assert "[ 1] pass    copy: 3000 GB/s  (expected ≥ 2600 / 1400 GB/s, H100 / RTX 5090)" in capsys.readouterr().out


def test_what_fails_in_one_check_leaves_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "GRACE", 0)
    checks = {
        1: Check("raising", raises),
        2: Check("ending", ends_its_process),
        3: Check("good", good),
        4: Check("hanging", hangs, limit=0.5),
        5: Check("long", good, needs=1000),
    }
    for number, check in checks.items():
        monkeypatch.setitem(CHECKS, number, check)
    results = run_checks(checks, CPU, tmp_path, minutes=5)
    found = {number: [line.status for line in results.lines if line.check == number] for number in checks}
    assert found == {1: [PASS, FAIL], 2: [PASS, FAIL], 3: [PASS], 4: [PASS, FAIL], 5: [SKIPPED]}
    said = [line.measured for line in results.lines if line.status != PASS]
    assert said[1:] == ["its process ended with status 7", "no end within 0 s, stopped", "out of time"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["finished"] is True and report["pass"] == 4 and report["fail"] == 3
