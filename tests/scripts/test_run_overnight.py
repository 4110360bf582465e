"""The overnight search: every grid point once, also after kills; the best run is non-collapsed; failures are named."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.training.overnight as overnight
import engine.training.overnight_report as overnight_report
from config.errors import InputError, counted
from config.schema import REPOSITORY, load_config
from engine.checkpoint import load_checkpoint
from engine.cli import Interrupted
from engine.training.overnight import training_processes
from tests.engine.training.runs import differing

Night = Any  # tests/scripts/conftest.py
Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture[str]
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4", "lr5e-05_bs2", "lr5e-05_bs4"]
GRID = ["--lrs", "1e-4", "--batch_sizes", "2", "4"]  # the default of the tests
ONE = ["--lrs", "1e-4", "--batch_sizes", "2"]  # the first of them; the default of the tests are the first two
FOUR = ["--lrs", "1e-4", "5e-5", "--batch_sizes", "2", "4"]
BEST = "vision_bridge_overnight_best.pt"
no_console = pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process there")


# ---------------------------------------------------------------- the whole grid


def test_runs_the_grid_once_and_reports_it(night: Night, monkeypatch: Patch, capsys: Capture) -> None:
    import train_vlm

    night.plan(NAMES[1], val_loss=0.05)
    assert night.run() == 0
    board = [" ".join(row[name] for name in ("lr", "batch_size", "val_loss", "epoch")) for row in night.board]
    assert board == ["0.0001 4 0.05 3", "0.0001 2 0.1 3"]
    for line in ("best lr: 0.0001", "best batch_size: 4", "best val_loss: 0.05", "best epoch: 3", "best epochs: 3"):
        assert f"{line}\n" in night.summary
    assert f"best folder: {night.folder(NAMES[1])}" in night.summary and "objective: align" in night.summary
    best, own = load_checkpoint(night.out / BEST), load_checkpoint(night.folder(NAMES[1]) / "vision_bridge_best_val.pt")
    assert best.val_loss == own.val_loss == 0.05
    assert all(torch.equal(value, own.model_state_dict[key]) for key, value in best.model_state_dict.items())

    output = capsys.readouterr().out
    assert output.count(": starts; ") == 2
    assert "[1/2] " in output and "[2/2] " in output and ", about 0:00:00 left" in output
    for name in NAMES[:2]:
        log = (night.folder(name) / "train.log").read_text(encoding="utf-8")
        assert f"\nlr 0.0001 batch_size {name[-1]} 报告" in log
        assert load_config(night.folder(name) / "overnight_config.yaml") == load_config(night.config)

    line = night.summary.split("go on with Stage 2:\n")[1].split("\n")[0]
    monkeypatch.setattr(sys, "argv", shlex.split(line.replace("\\", "/"))[1:])
    assert sys.argv[0] == "train_vlm.py"
    stage2 = train_vlm.parse_args()
    assert stage2.vision_checkpoint == night.out / BEST and stage2.config == night.config

    before = night.summary.split("\n", 1)[1]
    assert night.run() == 0
    assert night.calls(NAMES[0]) == night.calls(NAMES[1]) == [0], "complete runs are kept"
    assert night.summary.split("\n", 1)[1] == before


def test_no_grid_reports_its_own_run_and_a_complete_run_is_not_repeated(night: Night) -> None:
    assert night.run("--no_grid") == 0
    assert [(row["lr"], row["batch_size"]) for row in night.board] == [("0.0001", "4")]
    assert "best batch_size: 4" in night.summary and load_checkpoint(night.out / BEST).val_loss == 0.2
    assert night.run() == 0
    assert night.calls(NAMES[1]) == [0]
    with pytest.raises(InputError, match="--no_grid"):
        night.run("--no_grid", "--lrs", "1e-3")


@pytest.mark.parametrize(("flags", "runs"), [([], 6), (["--no_grid"], 1)])
def test_default_is_300_epochs_with_and_without_the_grid(
    night: Night, monkeypatch: Patch, capsys: Capture, flags: list[str], runs: int
) -> None:
    import train

    monkeypatch.setattr(sys, "argv", ["train.py"])
    defaults = train.parse_args()
    assert (defaults.lr, defaults.batch_size) == night.script.NO_GRID[1]
    monkeypatch.setattr(overnight.Night, "search", lambda self: None)
    monkeypatch.setattr(sys, "argv", ["run_overnight_300.py", "--config", str(night.config), *flags])
    assert night.script.main() == 1
    assert f"overnight: {counted(runs, 'run')} of 300 epochs;" in capsys.readouterr().out


def test_objective_and_model_flags_are_passed_on(night: Night) -> None:
    flags = ["--objective", "proxy_l2", "--mamba_model", "my/model", "--allow_toy_model", "--force"]
    assert night.run(*ONE, *flags) == 0
    command = (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8").split("\n")[0]
    assert "--objective proxy_l2" in command and "--mamba_model my/model --allow_toy_model --force" in command
    assert load_config(night.folder(NAMES[0]) / "overnight_config.yaml").mamba_model == "my/model"
    stage2 = night.summary.split("go on with Stage 2:\n")[1].split("\n")[0]
    assert "--mamba_model my/model --allow_toy_model" in stage2 and "NO proof of quality" in night.summary
    assert night.run(*ONE) == 0
    assert night.calls(NAMES[0]) == [0, 0], "runs of other settings do not mix"
    assert len(list(night.out.glob("overnight/*/lr*"))) == 2


# ---------------------------------------------------------------- Stage 2, and what it reaches


def test_stage_2_starts_from_the_best_stage_1_and_ends_in_a_report_card(
    night: Night, monkeypatch: Patch, parse
) -> None:
    import train_vlm

    monkeypatch.setattr(sys, "argv", ["train_vlm.py"])
    defaults = train_vlm.parse_args()
    assert (defaults.lr, defaults.batch_size) == night.script.NO_GRID[2]
    with pytest.raises(InputError, match="no checkpoint of Stage 1 for Stage 2: .*overnight_best.pt or .*best_val.pt"):
        night.run("--stage", "2", *GRID)
    night.make_checkpoint(night.out / "vision_bridge_best_val.pt", 0.5)
    commands = []
    monkeypatch.setattr(night.script, "call_patiently", lambda command: commands.append(command) or 0)
    table = night.plans / "test.csv"
    with pytest.raises(InputError, match="no such table"):
        night.run("--stage", "2", "--evaluate", str(table), *GRID)
    table.write_text("image_path", encoding="utf-8")
    night.plan(NAMES[1], val_loss=0.05)
    assert night.run("--stage", "2", "--evaluate", str(table), *GRID, "--", "--lora_rank", "4") == 0

    best = night.out / "vision_bridge_vlm_overnight_best.pt"
    assert load_checkpoint(best).val_loss == 0.05
    assert (night.out / "overnight_stage2_leaderboard.csv").is_file() and not (night.out / BEST).exists()
    summary = (night.out / "overnight_stage2_best_summary.txt").read_text(encoding="utf-8")
    assert "Overnight search of Stage 2" in summary and "best batch_size: 4" in summary
    check = shlex.split(summary.split("write a report:\n")[1].split("\n")[0].replace("\\", "/"))
    assert parse(check[1:]).checkpoint == best
    run = (night.folder(NAMES[1]) / "train.log").read_text(encoding="utf-8").split("\n")[0]
    assert f"--vision_checkpoint {night.out / 'vision_bridge_best_val.pt'}" in run and run.endswith("--lora_rank 4")
    assert len(commands) == 1 and commands[0][0] == sys.executable
    assert Path(commands[0][4]).name == "evaluate_reports.py"
    card = parse(["scripts/evaluate_reports.py", *commands[0][5:]])
    assert (card.checkpoint, card.csv, card.out) == (best, table, night.out / "overnight_card")

    night.make_checkpoint(night.out / BEST, 0.4)
    assert night.run("--stage", "2", *ONE) == 0
    assert len(night.calls(NAMES[0])) == 2, "from another checkpoint it is another night"


def test_flags_of_another_stage_are_refused(night: Night) -> None:
    for flags in (["--evaluate", "a.csv"], ["--vision_checkpoint", "a.pt"]):
        with pytest.raises(InputError, match=f"{flags[0]} belongs to Stage 2"):
            night.run(*flags)


# ---------------------------------------------------------------- the hours of a night


@pytest.mark.parametrize("text", ["24:00", "7", "7.30", "morning"])
def test_a_time_of_day_is_refused_where_it_is_none(night: Night, text: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        night.run("--until", text)
    assert "expected a time of day such as 07:30" in capsys.readouterr().err


def test_a_run_that_would_not_end_in_time_is_not_begun(night: Night, capsys: Capture) -> None:
    for name in NAMES:
        night.plan(name, steps=60)  # a second or two
    assert night.run(*FOUR, "--hours", "1e-9") == 0
    assert sorted(len(night.calls(name)) for name in NAMES) == [0, 0, 0, 1], "the first is begun in any case"
    assert "time budget: a run takes about 0:00:0" in capsys.readouterr().out
    assert night.run(*FOUR, "--hours", "1") == 0
    assert all(night.calls(name) == [0] for name in NAMES), "the same command goes on"


def test_a_run_above_the_median_is_pruned(night: Night, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(overnight, "POLL_SECONDS", 0.05)
    assert night.run(*FOUR, epochs=4) == 0
    third = sorted(NAMES, key=lambda name: (night.plans / f"{name}.calls").stat().st_mtime_ns)[2]  # the order is fixed
    for name in NAMES:
        bad = name == third
        night.plan(name, val_loss=0.2, steps=3000 if bad else 20, curve=[1.0 - (not bad) * 0.1 * n for n in range(8)])
    assert night.run(*FOUR, "--prune", epochs=8) == 0
    states = {f"lr{row['lr']}_bs{row['batch_size']}": row for row in night.board}
    assert states[third]["state"] == "pruned" and "above the median of the others" in states[third]["reason"]
    assert sorted(row["state"] for row in night.board) == ["finished", "finished", "finished", "pruned"]
    assert not training_processes(Path(states[third]["folder"]))
    assert not list(Path(states[third]["folder"]).glob("*_state.pt"))
    assert night.run(*FOUR, "--prune", epochs=8) == 0
    assert len(night.calls(third)) == 2, "a pruned run is not begun again"
    assert "pruned, at epoch " in capsys.readouterr().out


def test_a_terminal_gets_a_table_of_all_runs_and_every_night_a_figure(night: Night, monkeypatch: Patch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    for number, name in enumerate(NAMES[:2]):
        night.plan(name, steps=3, curve=[0.9, 0.5 + number, 0.7])
    assert night.run() == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    last = shown[shown.rindex("Stage 1, 3 epochs") :]
    rows = [re.sub(r"[│┃\s]+", " ", line).strip() for line in last.splitlines()]
    assert "0.0001 2 finished 3 0.7 0.5 2" in rows and "0.0001 4 finished 3 0.7 0.7 3" in rows
    assert "[2/2] " in shown, "the lines are printed above it"
    assert (night.out / "overnight_curves.png").read_bytes().startswith(b"\x89PNG") and "curves: " in night.summary


# ---------------------------------------------------------------- a longer night's best checkpoint


def test_a_shorter_night_writes_beside_a_longer_one(night: Night, capsys: Capture) -> None:
    assert night.run(*ONE, epochs=5) == 0
    (night.out / "overnight_best_summary.txt").unlink()  # the checkpoint itself knows its epochs
    capsys.readouterr()
    night.plan(NAMES[0], val_loss=0.01)
    assert night.run(*ONE) == 0
    assert load_checkpoint(night.out / BEST).val_loss == 0.1
    assert load_checkpoint(night.out / "vision_bridge_overnight_best_3epochs.pt").val_loss == 0.01
    notes = [line for line in capsys.readouterr().out.split("\n") if line.startswith("note: ")]
    assert len(notes) == 1 and "epochs 5, lr 0.0001, batch_size 2" in notes[0] and "_3epochs.pt" in notes[0]
    summary = (night.out / "overnight_best_summary_3epochs.txt").read_text(encoding="utf-8")
    assert notes[0] in summary and "best epochs: 3" in summary
    assert "overnight_best_3epochs.pt" in summary.split("go on with Stage 2:\n")[1]
    assert (night.out / "overnight_leaderboard_3epochs.csv").is_file()
    assert not (night.out / "overnight_best_summary.txt").exists()

    night.plan(NAMES[0], val_loss=0.3)
    assert night.run(*ONE, epochs=7) == 0, "a longer one replaces it, with a larger loss too"
    assert load_checkpoint(night.out / BEST).val_loss == 0.3
    assert torch.load(night.out / BEST, weights_only=True)["overnight"]["epochs"] == 7


def test_a_night_of_equal_length_replaces_a_worse_one_only(night: Night) -> None:
    one = ["--lrs", "5e-5", "--batch_sizes", "2"]
    assert night.run(*one) == 0, "val_loss 0.3"
    night.plan(NAMES[1], val_loss=0.123456789)
    assert night.run("--no_grid") == 0
    assert "best val_loss: 0.123457\n" in night.summary and "note: " not in night.summary
    night.plan(NAMES[2], val_loss=0.25)
    assert night.run(*one, "--seed", "8") == 0
    assert load_checkpoint(night.out / BEST).val_loss == 0.123456789
    assert load_checkpoint(night.out / "vision_bridge_overnight_best_3epochs.pt").val_loss == 0.25
    summary = (night.out / "overnight_best_summary_3epochs.txt").read_text(encoding="utf-8")
    assert "note: " in summary and "another night (epochs 3, lr 0.0001, batch_size 4, val_loss 0.123457" in summary


@pytest.mark.parametrize(("epoch", "kept"), [(2, False), (3, True)])
def test_a_checkpoint_of_an_older_version_counts_by_its_best_epoch(night: Night, epoch: int, kept: bool) -> None:
    night.make_checkpoint(night.out / BEST, 0.001, epoch=epoch)
    assert night.run(*ONE) == 0
    assert (load_checkpoint(night.out / BEST).val_loss == 0.001) == kept


def test_an_unreadable_best_checkpoint_is_reported_before_the_night(night: Night) -> None:
    night.out.mkdir()
    (night.out / BEST).write_bytes(b"truncated")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        night.run()
    assert not night.calls(NAMES[0])


# ---------------------------------------------------------------- runs that went wrong


def test_collapsed_and_untrained_runs_are_reported(night: Night) -> None:
    night.plan(NAMES[0], val_loss=1e-9, collapsed=True)
    night.plan(NAMES[1], val_loss=1e-8, collapsed=True, best=False)
    night.plan(NAMES[2], val_loss=0.3, epoch=0)
    night.plan(NAMES[3], val_loss=0.3, epoch=2)
    assert night.run(*FOUR) == 0
    assert [row["state"] for row in night.board] == ["finished", "finished", "collapsed", "collapsed"]
    assert "best lr: 5e-05\nbest batch_size: 4" in night.summary, "of equal losses, the trained one"
    assert load_checkpoint(night.out / BEST).epoch == 2
    assert f"{NAMES[0]}: vision_bridge_best_val.pt is stamped as collapsed" in night.summary
    assert f"{NAMES[1]}: vision_bridge_final.pt is stamped as collapsed" in night.summary
    assert f"{NAMES[2]}: epoch 0 is the untrained bridge" in night.summary
    assert night.run(*FOUR) == 0
    assert all(night.calls(name) == [0] for name in NAMES), "a collapsed run is complete, it is not tried again"


def test_failed_runs_do_not_stop_the_night_and_are_tried_again(night: Night) -> None:
    night.plan(NAMES[0], status=2, message="error: train.csv, row 3: file not found")
    night.plan(NAMES[1], status=1, steps=5, message="Traceback\nRuntimeError: CUDA driver hiccup")
    nothing = {"steps": 0, "best": None, "final": None, "status": 0, "message": ""}
    (night.plans / f"{NAMES[2]}.json").write_text(json.dumps(nothing), encoding="utf-8")
    assert night.run(*FOUR) == 0
    assert night.calls(NAMES[0]) == [0], "bad input fails again in the same way"
    assert night.calls(NAMES[1]) == [0, 5], "another failure gets a second attempt, which continues from the state"
    assert night.calls(NAMES[2]) == [0, 0] and night.calls(NAMES[3]) == [0]
    assert "status 2 without vision_bridge_final.pt: error: train.csv, row 3: file not found" in night.summary
    assert "RuntimeError: CUDA driver hiccup" in night.summary and "status 0 without" in night.summary
    assert [row["state"] for row in night.board] == ["finished", "failed", "failed", "failed"]

    night.plan(NAMES[0], val_loss=0.01)
    assert night.run(*FOUR) == 0
    assert [len(night.calls(name)) for name in NAMES] == [2, 4, 4, 1]
    assert "best lr: 0.0001\nbest batch_size: 2" in night.summary


def test_all_failed_is_an_error(night: Night, capsys: Capture) -> None:
    night.plan(NAMES[0], status=2, message="error: nothing works")
    assert night.run(*ONE) == 1
    assert "error: no run ended with a usable checkpoint" in capsys.readouterr().err
    assert not (night.out / BEST).exists()
    assert "best: none yet" in night.summary and "nothing works" in night.summary


def test_lost_checkpoints_are_passed_over(night: Night) -> None:
    night.plan(NAMES[2], val_loss=0.3)
    (night.plans / f"{NAMES[2]}.pt").write_bytes(b"truncated")
    assert night.run(*FOUR) == 0
    (night.folder(NAMES[0]) / "vision_bridge_best_val.pt").unlink()
    assert night.run(*FOUR) == 0
    assert load_checkpoint(night.out / BEST).val_loss == 0.2
    assert "passed over: vision_bridge_best_val.pt is missing" in night.summary
    assert "not a readable checkpoint" in night.summary


def test_an_open_spreadsheet_does_not_end_the_night(night: Night, monkeypatch: Patch, capsys: Capture) -> None:
    def refuse(path: Path, text: str) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(overnight_report, "write_text", refuse)
    assert night.run(*ONE) == 0
    assert "overnight_leaderboard.csv is open in another program" in capsys.readouterr().out


# ---------------------------------------------------------------- interrupted and killed


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Do something from a thread while the script runs in this process."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(act)
        yield
        job.result()


@pytest.mark.minutes
def test_kill_of_script_and_run_goes_on_where_it_stood(night: Night) -> None:
    for number, name in enumerate(NAMES[:2]):
        night.plan(name, val_loss=0.1 * (number + 1), steps=50)
    process = night.start()
    night.wait_until(lambda: all(night.calls(name) for name in NAMES[:2]))
    second = max(NAMES[:2], key=lambda name: (night.plans / f"{name}.calls").stat().st_mtime_ns)
    night.wait_for_step(second, 5)
    night.kill_tree(process)
    assert night.run() == 0
    (first,) = set(NAMES[:2]) - {second}
    assert night.calls(first) == [0], "the finished run is kept"
    assert len(night.calls(second)) == 2 and night.calls(second)[1] >= 5, "the killed run goes on from its state"
    assert [row["val_loss"] for row in night.board] == ["0.1", "0.2"]
    assert "best batch_size: 2" in night.summary
    assert load_checkpoint(night.out / BEST).val_loss == 0.1


def test_kill_of_the_script_alone_does_not_start_its_run_twice(night: Night, capsys: Capture) -> None:
    night.plan(NAMES[0], steps=100)
    process = night.start(*ONE)
    night.wait_for_step(NAMES[0], 2)
    process.kill()
    process.join(timeout=20)
    assert len(training_processes(night.folder(NAMES[0]))) == 1
    assert night.run(*ONE) == 0
    assert night.calls(NAMES[0]) == [0]
    assert "waiting for process" in capsys.readouterr().out
    assert night.board[0]["state"] == "finished"


def send_at_step_5(night: Night, *signals: int) -> None:
    night.wait_for_step(NAMES[0], 5)
    for number in signals:
        os.kill(os.getpid(), number)
        time.sleep(0.4)


@no_console
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_run_save(night: Night, number: int) -> None:
    night.plan(NAMES[0], steps=2000)
    with meanwhile(lambda: send_at_step_5(night, number)), pytest.raises(Interrupted, match="the same command goes on"):
        night.run(*ONE)
    assert not training_processes(night.folder(NAMES[0]))
    assert "interrupted: state saved" in (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8")
    assert night.board[0]["state"] == "interrupted" and "best: none yet" in night.summary
    night.plan(NAMES[0], steps=6)
    assert night.run(*ONE) == 0
    assert len(night.calls(NAMES[0])) == 2 and night.calls(NAMES[0])[1] >= 5


@no_console
def test_a_second_ctrl_c_stops_at_once(night: Night) -> None:
    """The fake training needs a while to save; the second signal reaches it in the middle of that."""
    night.plan(NAMES[0], steps=2000)
    with meanwhile(lambda: send_at_step_5(night, signal.SIGINT, signal.SIGINT)), pytest.raises(Interrupted):
        night.run(*ONE)
    log = (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8")
    assert "KeyboardInterrupt" in log and "state saved" not in log


def test_two_scripts_share_a_grid(night: Night, capsys: Capture) -> None:
    """Each takes a point of its own; the one that is done first waits for the other's run instead of repeating it."""
    night.plan(NAMES[0], steps=60)
    night.plan(NAMES[1], steps=60)
    other = night.start()
    night.wait_until(lambda: any(night.calls(name) for name in NAMES))
    assert night.run() == 0
    other.join(timeout=60)
    assert other.exitcode == 0
    assert [night.calls(name) for name in NAMES[:2]] == [[0], [0]]
    assert capsys.readouterr().out.count(": starts; ") == 1
    assert [row["state"] for row in night.board] == ["finished"] * 2


@pytest.mark.minutes
def test_with_the_real_training(small_training: Path, night: Night, monkeypatch: Patch) -> None:
    """One run of train.py itself, killed twice, between two saves and in one, and continued: it ends as the run that
    nobody kills."""
    flags = ["--config", str(small_training / "paths.yaml"), "--output_dir", str(night.out), "--epochs", "6"]
    argv = [str(night.script.__file__), *flags, "--no_grid", "--objective", "proxy_l2"]
    monkeypatch.setattr(night, "set_flags", lambda *_, **__: monkeypatch.setattr(sys, "argv", argv))
    process = night.start()
    # A state is saved at the end of an epoch.
    night.wait_until(lambda: any(night.out.glob("overnight/*/*/stage1_state.pt")), seconds=120)
    night.kill_tree(process)
    process = night.start()
    night.wait_until(lambda: any(night.out.glob("overnight/*/*/.part-*.pt")), seconds=120)
    night.kill_tree(process)
    assert night.run() == 0
    folder = night.folder(NAMES[1])
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert log.count("---- ") == 3 and "resuming at epoch" in log
    command = json.loads((folder / "stage1_run.json").read_text(encoding="utf-8"))["command"]
    command[command.index("--output_dir") + 1] = str(night.out / "whole")
    subprocess.run([sys.executable, *command], check=True, cwd=REPOSITORY)
    assert differing(folder / "vision_bridge_final.pt", night.out / "whole" / "vision_bridge_final.pt") == {}
    best = load_checkpoint(night.out / BEST)
    assert not best.collapsed and best.config.mamba_model == str(small_training / "lm")
    assert best.val_loss == load_checkpoint(night.folder(NAMES[1]) / "vision_bridge_best_val.pt").val_loss
