"""What a run leaves for programs and people: tables that survive a resume, pictures, and any console."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import InputError
from config.schema import REPOSITORY
from engine.training.run_log import CsvLog, RunLog, progress_bar

COLUMNS = ("step", "epoch", "caption_loss")


def rows(path: Path) -> list[tuple[str, ...]]:
    with path.open(encoding="utf-8", newline="") as stream:
        header, *lines = [tuple(row) for row in csv.reader(stream)]
    assert header == COLUMNS
    return lines


def log_of(path: Path, resumed_step: int | None = None, active: bool = True) -> CsvLog:
    return CsvLog(path, COLUMNS, active=active, resumed_step=resumed_step)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Steps 20, 40, 60."""
    path = tmp_path / "stage2_train_log.csv"
    log = log_of(path)
    for step in (20, 40, 60):
        log.write(step=step, epoch=1, caption_loss=f"{1 / step:.6f}")
    return path


# ---------------------------------------------------------------- CSV


def test_csv_has_the_promised_columns_and_one_line_a_step(table):
    assert rows(table) == [("20", "1", "0.050000"), ("40", "1", "0.025000"), ("60", "1", "0.016667")]
    assert table.read_bytes().startswith(b"step,epoch,caption_loss\r\n")


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (19, []), (20, [20]), (50, [20, 40]), (60, [20, 40, 60]), (99, [20, 40, 60])]
)
def test_resumed_run_drops_later_lines_and_appends(table, step, kept):
    log_of(table, resumed_step=step).write(step=100, epoch=2, caption_loss="0.5")
    assert [int(row[0]) for row in rows(table)] == [*kept, 100]
    assert all(len(row) == 3 for row in rows(table))


def test_a_new_run_and_a_resumed_one_without_a_table_start_a_new_table(table):
    log_of(table)
    assert rows(table) == []
    table.unlink()
    log_of(table, resumed_step=40).write(step=60, epoch=1, caption_loss="0.5")
    assert rows(table) == [("60", "1", "0.5")]


def test_a_line_that_a_crash_cut_short_is_dropped_also_after_excel_has_saved_the_table(table):
    table.write_text(table.read_text(encoding="utf-8") + "8", encoding="utf-8-sig")  # the beginning of 80
    log_of(table, resumed_step=60)
    assert [row[0] for row in rows(table)] == ["20", "40", "60"]


def test_a_table_that_is_none_of_ours_is_refused_and_stays(table):
    table.write_text("step;epoch;caption_loss\n20;1;0,05\n", encoding="utf-8")
    with pytest.raises(InputError, match="expected the columns step,epoch,caption_loss"):
        log_of(table, resumed_step=40)
    assert "20;1;0,05" in table.read_text(encoding="utf-8")


def test_lines_wait_while_another_program_locks_the_table(table, monkeypatch, capsys):
    """Excel does, on Windows; a run of a whole night must not end of it."""
    log, opened = log_of(table, resumed_step=60), Path.open

    def locked(self: Path, *args: object, **options: object):
        raise PermissionError("[Errno 13] Permission denied")

    monkeypatch.setattr(Path, "open", locked)
    log.write(step=80, epoch=1, caption_loss="0.4")
    log.write(step=100, epoch=1, caption_loss="0.3")
    with pytest.raises(InputError, match="close the program that shows it"):
        log_of(table)
    monkeypatch.setattr(Path, "open", opened)
    log.write(step=120, epoch=1, caption_loss="0.2")
    assert [int(row[0]) for row in rows(table)] == [20, 40, 60, 80, 100, 120]
    assert capsys.readouterr().out.count("open in another program") == 1, "said once"


def test_other_processes_write_nothing(tmp_path):
    log_of(tmp_path / "log.csv", active=False).write(step=20, epoch=1, caption_loss="0.5")
    run = RunLog(tmp_path / "log.jsonl", active=False, resumed=None)
    run.record(event="step")
    run.say("nothing")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- JSON lines


def test_json_lines_are_appended_on_resume_and_begun_anew_otherwise(tmp_path):
    path = tmp_path / "log.jsonl"
    RunLog(path, active=True, resumed=None).record(event="step", step=10, train_loss=0.5)
    RunLog(path, active=True, resumed=(10, 1)).record(event="epoch", note="平均", val_loss=None)
    assert path.read_text(encoding="utf-8").splitlines() == [
        '{"event": "step", "step": 10, "train_loss": 0.5}',
        '{"event": "epoch", "note": "平均", "val_loss": null}',
    ]
    RunLog(path, active=True, resumed=None).record(event="step", step=10)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_a_resumed_log_drops_what_comes_after_its_state_and_a_line_that_was_cut(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, active=True, resumed=None)
    for event, step, epoch in (("step", 5, 1), ("epoch", 6, 1), ("step", 10, 2), ("epoch", 12, 2)):
        log.record(event=event, step=step, epoch=epoch)
    with path.open("a", encoding="utf-8") as stream:
        stream.write('{"event": "st')
    RunLog(path, active=True, resumed=(12, 1))
    kept = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert kept == [5, 6, 10], "the second epoch is validated again"
    RunLog(path, active=True, resumed=(6, 1))
    assert path.read_text(encoding="utf-8").count("\n") == 2


def test_the_bar_keeps_out_of_log_files(capsys):
    with progress_bar(10, 3, "stage 1", active=True) as bar:
        bar.update()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


# ---------------------------------------------------------------- consoles and exit codes

PROGRAM = """
import sys
from pathlib import Path
from config.errors import InputError
from engine.cli import Interrupted, run_main
from engine.training.run_log import RunLog

def main():
    RunLog(Path(sys.argv[2]), active=True, resumed=None).say("生成文本: 右肺结节\\U0001fac1")
    print("平均 caption_loss 0.5")
    if sys.argv[1] == "bad":
        raise InputError("表.csv, row 3:\\n  'answer' is empty")
    if sys.argv[1] == "stop":
        raise Interrupted("state saved at step 3; 同样的命令继续")
    if sys.argv[1] == "ctrl-c":
        raise KeyboardInterrupt
    if sys.argv[1] == "defect":
        raise ZeroDivisionError("缺陷")
    return int(sys.argv[1])

run_main(main)
"""


def run(tmp_path: Path, outcome: str, encoding: str = "ascii") -> tuple[int, str, str]:
    """The program above under a console of ``encoding``, its output as the bytes that a redirect would hold."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(REPOSITORY), "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", PROGRAM, outcome, str(tmp_path / "log.jsonl")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=60)
    return done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")


@pytest.mark.parametrize("encoding", ["cp1252", "gbk"])
def test_chinese_survives_any_console(tmp_path, encoding):
    code, out, err = run(tmp_path, "0", encoding)
    assert (code, err) == (0, "")
    assert out.splitlines() == ["生成文本: 右肺结节\U0001fac1", "平均 caption_loss 0.5"]


@pytest.mark.parametrize(
    ("outcome", "code", "line"),
    [
        ("bad", 2, "error: 表.csv, row 3: 'answer' is empty"),
        ("stop", 130, "interrupted: state saved at step 3; 同样的命令继续"),
        ("ctrl-c", 130, "interrupted"),
    ],
)
def test_bad_input_and_interruption_are_one_line_and_a_status(tmp_path, outcome, code, line):
    status, out, err = run(tmp_path, outcome)
    assert (status, err.splitlines()) == (code, [line])
    assert "平均 caption_loss" in out and "Traceback" not in out


def test_a_defect_keeps_its_traceback_and_another_status_is_passed_on(tmp_path):
    status, _, err = run(tmp_path, "defect")
    assert status == 1 and "Traceback" in err and "ZeroDivisionError: 缺陷" in err
    assert run(tmp_path, "3")[0] == 3
