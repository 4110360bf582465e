"""The checks of a card at tiny sizes on a CPU: that they run, and what they would say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.gpu_check import chain, decoding, kernels
from engine.gpu_check.context import FAIL, PASS, SKIPPED, Context, Line
from engine.gpu_check.runner import CHECKS
from engine.gpu_check.worker import lines_of
from models.selective_scan import backend_torch

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"
QUICK = (1, 3, 4, 5, 6, 7, 8, 9, 11, 12)  # of one process


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return Context(torch.device("cpu"), tmp_path_factory.mktemp("gpu_check"))


def check(number: int, context: Context) -> list[Line]:
    context.number = number
    return list(lines_of(CHECKS[number], context))


@pytest.mark.parametrize("number", QUICK)
def test_a_check_passes_on_a_cpu(number: int, context: Context) -> None:
    lines = check(number, context)
    assert lines and all(line.check == number for line in lines)
    assert [line for line in lines if line.status == FAIL] == []
    assert all(line.value is None or line.value >= 0 for line in lines)
    assert not any(line.expected for line in lines), "a CPU is not judged by the estimates for cards"


def test_wrong_numbers_fail(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = backend_torch.scan

    def off(*arguments: object) -> tuple[Tensor, Tensor]:
        y, last = scan(*arguments)
        return 1.01 * y, last

    monkeypatch.setattr(backend_torch, "scan", off)
    status = {line.name.split(" E")[0]: line.status for line in check(3, context)}
    assert status["torch, float32,"] == FAIL and status["numba, float32,"] == PASS


def test_other_texts_than_plain_decoding_fail(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter([[["a", "b"]], [["a", "c"]]])
    monkeypatch.setattr(decoding, "write", lambda *_: next(texts))
    line = decoding.compare(context, None, "greedy", 1, 2, {})
    assert line.status == FAIL and line.measured == "1 of 2 tokens equal, 2 different ones"


def test_a_backend_that_is_not_the_fast_one_fails(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "selective scan on cpu: reference (not numba: importing it fails)"
    monkeypatch.setattr(kernels, "fresh_scan", lambda *_: (said, 1.5))
    line, seconds = check(2, context)
    assert line.status == FAIL and line.measured == said and seconds.value == 1.5


def test_a_script_that_fails_shows_the_end_of_its_output(context: Context) -> None:
    line = chain.finished(context, "a script", ["-c", "print('first'); raise SystemExit(3)"], context.out / "failing")
    assert line.status == FAIL and "status 3" in line.measured and line.detail == "first"


def test_without_a_card_one_line_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "report")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, timeout=300, check=False)
    assert done.returncode == 2 and "add --allow_cpu" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.slow
def test_the_script_and_the_scripts_that_it_runs(tmp_path: Path) -> None:
    """What the tests above leave out: the process of the checks, a second one, both stages and what follows."""
    numbers, out = (1, 2, 10, 13), tmp_path / "报告 1"
    command = [sys.executable, str(SCRIPT), "--allow_cpu", "--minutes", "20", "--only", ",".join(map(str, numbers))]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    options = {"capture_output": True, "encoding": "utf-8", "env": environment, "timeout": 1300, "check": False}
    done = subprocess.run([*command, "--out", str(out)], **options)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    failed = [line for line in report["lines"] if line["status"] == FAIL]
    assert done.returncode == 0 and not failed, (done.stderr, failed)
    assert tuple(map(int, report["seconds_of_checks"])) == numbers and report["finished"]
    assert [line["name"] for line in report["lines"] if line["status"] == SKIPPED] == ["tests marked gpu"]
    assert len([line for line in report["lines"] if line["check"] == 10]) == 8
