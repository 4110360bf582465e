"""The overnight search: every grid point exactly once; the best is alive; what went wrong is told."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import engine.training.overnight_report as report
from config.errors import InputError
from config.schema import load_config
from engine.checkpoint import load_checkpoint

Night = Any  # tests/scripts/conftest.py
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4", "lr5e-05_bs2", "lr5e-05_bs4"]
GRID = ["--lrs", "1e-4", "5e-5", "--batch_sizes", "2", "4"]


# ---------------------------------------------------------------- the whole grid


def test_runs_the_grid_once_and_keeps_it(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    night.plan("lr5e-05_bs2", val_loss=0.05)
    assert night.run() == 0
    assert {name: night.calls(name) for name in NAMES} == {name: [0] for name in NAMES}
    assert [row["val_loss"] for row in night.board] == ["0.05", "0.1", "0.2", "0.4"]
    assert {(row["lr"], row["batch_size"]) for row in night.board} == {
        ("0.0001", "2"), ("0.0001", "4"), ("5e-05", "2"), ("5e-05", "4"),
    }  # fmt: skip
    best = load_checkpoint(night.out / "vision_bridge_overnight_best.pt")
    own = load_checkpoint(night.folder("lr5e-05_bs2") / "vision_bridge_best_val.pt")
    assert best.val_loss == own.val_loss == 0.05
    assert all(torch.equal(value, own.model_state_dict[key]) for key, value in best.model_state_dict.items())
    for line in ("best lr: 5e-05", "best batch_size: 2", "best val_loss: 0.05", "best epoch: 3 of 3"):
        assert line in night.summary
    assert "objective: align" in night.summary and "lower is better agreement" in " ".join(night.summary.split())
    said = capsys.readouterr().out
    assert re.findall(r"^\[(\d)/4\] .*: starts;", said, re.MULTILINE) == ["1", "2", "3", "4"]
    assert len(re.findall(r"^\[\d/4\] .*: finished, val_loss .*elapsed 0:00:", said, re.MULTILINE)) == 4
    assert "nothing left" in said and re.search(r"about 0:00:\d\d left", said)

    before = night.summary.split("\n", 1)[1]
    assert night.run() == 0
    assert all(night.calls(name) == [0] for name in NAMES)
    assert night.summary.split("\n", 1)[1] == before


def test_each_run_has_its_own_folder_log_and_copy_of_the_settings(night: Night) -> None:
    night.run()
    for name in NAMES:
        folder = night.folder(name)
        lr, size = re.fullmatch(r"lr(.*)_bs(\d)", name).groups()
        log = (folder / "train.log").read_text(encoding="utf-8")
        assert f"lr {lr} batch_size {size} 报告" in log and log.count("报告") == 1
        assert load_config(folder / "overnight_config.yaml") == load_config(night.config)
        assert load_checkpoint(folder / "vision_bridge_best_val.pt").val_loss == pytest.approx(
            0.1 * (NAMES.index(name) + 1)
        )


def test_the_stage_2_command_of_the_summary_is_one_that_stage_2_takes(
    night: Night, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_vlm

    night.run()
    line = night.summary.split("go on with Stage 2:\n")[1].split("\n")[0]
    python, stage, *flags = shlex.split(line)
    assert (python, stage) == ("python", "train_vlm.py")
    monkeypatch.setattr(sys, "argv", [stage, *flags])
    args = train_vlm.parse_args()
    assert args.vision_checkpoint.is_file() and args.config == night.config


def test_no_grid_is_one_run_with_the_defaults_of_train(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    import train

    monkeypatch.setattr(sys, "argv", ["train.py"])
    defaults = train.parse_args()
    night.plan("default")
    assert night.run("--no_grid") == 0
    assert [(float(r["lr"]), int(r["batch_size"])) for r in night.board] == [(defaults.lr, defaults.batch_size)]
    with pytest.raises(InputError, match="--no_grid"):
        night.run("--no_grid", "--lrs", "1e-3")


def test_the_default_grid_is_the_documented_one(night: Night) -> None:
    night.plan("default")
    assert night.run("--seed", "7") == 0
    assert len(night.board) == 6 and "seed 7" in night.summary


def test_the_objective_is_handed_on_and_its_limits_are_told(night: Night) -> None:
    assert night.run("--objective", "proxy_l2", "--lrs", "5e-5", "--batch_sizes", "2", "4") == 0
    assert "objective: proxy_l2" in night.summary and "NO proof of quality" in " ".join(night.summary.split())
    assert "--objective proxy_l2" in (night.folder(NAMES[2]) / "train.log").read_text(encoding="utf-8")


# ---------------------------------------------------------------- runs that went wrong


def test_collapsed_and_untrained_runs_are_told(night: Night) -> None:
    night.plan("lr0.0001_bs2", val_loss=1e-9, collapsed=True)
    night.plan("lr0.0001_bs4", val_loss=1e-8, collapsed=True, best=False)
    night.plan("lr5e-05_bs2", val_loss=0.3, epoch=0)
    assert night.run() == 0
    states = {f"lr{r['lr']}_bs{r['batch_size']}": (r["state"], r["reason"]) for r in night.board}
    assert states["lr0.0001_bs2"][0] == states["lr0.0001_bs4"][0] == "collapsed"
    assert "stamped as collapsed" in states["lr0.0001_bs2"][1] and "every epoch" in states["lr0.0001_bs4"][1]
    assert "best val_loss: 0.3" in night.summary and "epoch 0 is the untrained bridge" in night.summary
    assert load_checkpoint(night.out / "vision_bridge_overnight_best.pt").epoch == 0
    assert night.run() == 0
    assert all(night.calls(name) == [0] for name in NAMES), "a collapsed run is finished, it is not tried again"


def test_a_trained_run_is_preferred_to_an_untrained_one_of_the_same_loss(night: Night) -> None:
    for name in NAMES:
        night.plan(name, val_loss=0.3, epoch=0 if name != NAMES[3] else 2)
    night.run()
    assert "best: lr 5e-05 batch_size 4" in night.summary


def test_failing_runs_do_not_stop_the_night_and_are_tried_again(night: Night) -> None:
    night.plan(NAMES[0], status=2, says="error: train.csv, row 3: file not found")
    night.plan(NAMES[1], status=1, says="Traceback\nRuntimeError: CUDA driver hiccup")
    assert night.run() == 0
    assert night.calls(NAMES[0]) == [0], "bad input fails again in the same way"
    assert len(night.calls(NAMES[1])) == 2, "another failure gets a second chance, at the end of the night"
    assert night.calls(NAMES[2]) == night.calls(NAMES[3]) == [0]
    assert "row 3: file not found" in night.summary and "CUDA driver hiccup" in night.summary
    assert [row["state"] for row in night.board] == ["finished", "finished", "failed", "failed"]

    night.plan(NAMES[0], val_loss=0.01)
    assert night.run() == 0
    assert [len(night.calls(name)) for name in NAMES] == [2, 4, 1, 1]
    assert "best: lr 0.0001 batch_size 2" in night.summary


def test_all_failing_is_an_error(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        night.plan(name, status=2, says="error: nothing works")
    assert night.run() == 1
    assert "error: no run ended with a usable checkpoint" in capsys.readouterr().err
    assert not (night.out / "vision_bridge_overnight_best.pt").exists()
    assert "best: none yet" in night.summary and night.summary.count("nothing works") == 4


def test_a_run_that_reports_success_but_leaves_nothing_has_failed(night: Night) -> None:
    nothing = {"steps": 0, "best": None, "final": None, "status": 0, "says": ""}
    (night.plans / f"{NAMES[0]}.json").write_text(json.dumps(nothing), encoding="utf-8")
    assert night.run("--lrs", "1e-4", "--batch_sizes", "2") == 1
    assert "ended without vision_bridge_final.pt" in night.summary


def test_a_checkpoint_that_is_gone_is_passed_over_aloud(night: Night) -> None:
    night.run()
    (night.folder(NAMES[0]) / "vision_bridge_best_val.pt").unlink()
    assert night.run() == 0
    assert "lr 0.0001 batch_size 2 (val_loss 0.1" in night.summary and "passed over" in night.summary
    assert load_checkpoint(night.out / "vision_bridge_overnight_best.pt").val_loss == 0.2


def test_an_open_spreadsheet_does_not_end_the_night(
    night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = report.write_text_atomically

    def refuse(path: Path, text: str) -> None:
        if path.suffix == ".csv":
            raise PermissionError(path)
        real(path, text)

    monkeypatch.setattr(report, "write_text_atomically", refuse)
    assert night.run() == 0
    assert "overnight_leaderboard.csv is open in another program" in capsys.readouterr().out


# ---------------------------------------------------------------- other settings, bad settings


def test_other_settings_do_not_mix_with_finished_runs(night: Night) -> None:
    night.run()
    assert night.run(*GRID, "--epochs", "5") == 0
    assert all(night.calls(name) == [0, 0] for name in NAMES)
    assert len(night.board) == 4 and len(list((night.out / "overnight").glob("*/lr*"))) == 8


@pytest.mark.parametrize("missing", ["train.csv", "val.csv", "net.pth"])
def test_missing_files_are_told_before_the_night(night: Night, missing: str) -> None:
    (night.root / missing).unlink()
    with pytest.raises(InputError, match=missing):
        night.run()
    assert not any(night.calls(name) for name in NAMES)


@pytest.mark.parametrize("storage", ["nosuchdialect://x", "sqlite:////nonexistent/folder/x.db"])
def test_a_storage_that_cannot_be_opened_is_one_line(night: Night, storage: str) -> None:
    with pytest.raises(InputError, match=r"--storage .* cannot be opened"):
        night.run(*GRID, "--storage", storage)
