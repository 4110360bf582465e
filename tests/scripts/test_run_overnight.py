"""The overnight search: every grid point once, the best run is not collapsed, what failed is reported."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

import engine.training.overnight as overnight
from config.errors import InputError
from config.schema import load_config
from engine.checkpoint import load_checkpoint

Night = Any  # tests/scripts/conftest.py
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4", "lr5e-05_bs2", "lr5e-05_bs4"]
FOUR = ["--lrs", "1e-4", "5e-5", "--batch_sizes", "2", "4"]
ONE = ["--lrs", "1e-4", "--batch_sizes", "2"]
BEST = "vision_bridge_overnight_best.pt"


@pytest.fixture(autouse=True)
def fast_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """No database on disk; the tests of several processes, in test_run_overnight_killed.py, use it."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(overnight, "RDBStorage", lambda *args, **options: storage)


# ---------------------------------------------------------------- the whole grid


def test_runs_the_grid_once_and_reports_it(
    night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_vlm

    night.plan(NAMES[1], val_loss=0.05)
    assert night.run() == 0
    assert [(row["lr"], row["batch_size"], row["val_loss"], row["epoch"]) for row in night.board] == [
        ("0.0001", "4", "0.05", "3"),
        ("0.0001", "2", "0.1", "3"),
    ]
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
    monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
    assert sys.argv[0] == "train_vlm.py"
    stage2 = train_vlm.parse_args()
    assert stage2.vision_checkpoint == night.out / BEST and stage2.config == night.config

    before = night.summary.split("\n", 1)[1]
    assert night.run() == 0
    assert night.calls(NAMES[0]) == night.calls(NAMES[1]) == [0], "complete runs are kept"
    assert night.summary.split("\n", 1)[1] == before


def test_no_grid_reports_its_own_run_and_a_complete_run_is_not_repeated(night: Night) -> None:
    assert night.run() == 0
    assert night.run("--no_grid") == 0
    assert night.calls(NAMES[1]) == [0]
    assert [(row["lr"], row["batch_size"]) for row in night.board] == [("0.0001", "4")]
    assert "best batch_size: 4" in night.summary and load_checkpoint(night.out / BEST).val_loss == 0.2
    with pytest.raises(InputError, match="--no_grid"):
        night.run("--no_grid", "--lrs", "1e-3")


@pytest.mark.parametrize(("flags", "runs"), [([], 6), (["--no_grid"], 1)])
def test_default_is_300_epochs_with_and_without_the_grid(
    night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], runs: int
) -> None:
    import train

    monkeypatch.setattr(sys, "argv", ["train.py"])
    defaults = train.parse_args()
    assert (defaults.lr, defaults.batch_size) == (night.script.NO_GRID_LR, night.script.NO_GRID_BATCH_SIZE)
    monkeypatch.setattr(overnight.Night, "search", lambda self: None)
    monkeypatch.setattr(sys, "argv", ["run_overnight_300.py", "--config", str(night.config), *flags])
    assert night.script.main() == 1
    assert f"overnight: {runs} run(s) of 300 epochs" in capsys.readouterr().out


def test_objective_and_model_flags_are_passed_on(night: Night) -> None:
    flags = ["--objective", "proxy_l2", "--mamba_model", "my/model", "--allow_toy_model"]
    assert night.run(*ONE, *flags) == 0
    command = (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8").split("\n")[0]
    assert "--objective proxy_l2" in command and "--mamba_model my/model --allow_toy_model" in command
    assert load_config(night.folder(NAMES[0]) / "overnight_config.yaml").mamba_model == "my/model"
    stage2 = night.summary.split("go on with Stage 2:\n")[1].split("\n")[0]
    assert "--mamba_model my/model --allow_toy_model" in stage2 and "NO proof of quality" in night.summary
    assert night.run(*ONE) == 0
    assert night.calls(NAMES[0]) == [0, 0], "runs of other settings do not mix"
    assert len(list(night.out.glob("overnight/*/lr*"))) == 2


def test_help_and_wrong_flags_load_no_heavy_package(night: Night) -> None:
    code = "import runpy, sys\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: print('heavy:', *{'torch', 'optuna', 'pandas', 'numpy'} & set(sys.modules))"
    for flag, status in (("--help", 0), ("--bogus", 2)):
        program = f"import sys; sys.argv = [{night.script.__file__!r}, {flag!r}]\n{code}"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == status and done.stdout.strip().endswith("heavy:")


# ---------------------------------------------------------------- a longer night's best checkpoint


def test_a_shorter_night_writes_beside_a_longer_one(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
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


@pytest.mark.parametrize(("epoch", "kept"), [(3, False), (4, True)])
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
    night.plan(NAMES[1], status=1, message="Traceback\nRuntimeError: CUDA driver hiccup")
    nothing = {"steps": 0, "best": None, "final": None, "status": 0, "message": ""}
    (night.plans / f"{NAMES[2]}.json").write_text(json.dumps(nothing), encoding="utf-8")
    assert night.run(*FOUR) == 0
    assert night.calls(NAMES[0]) == [0], "bad input fails again in the same way"
    assert [len(night.calls(name)) for name in NAMES[1:]] == [2, 2, 1], "another failure gets a second attempt"
    assert "status 2 without vision_bridge_final.pt: error: train.csv, row 3: file not found" in night.summary
    assert "RuntimeError: CUDA driver hiccup" in night.summary and "status 0 without" in night.summary
    assert [row["state"] for row in night.board] == ["finished", "failed", "failed", "failed"]

    night.plan(NAMES[0], val_loss=0.01)
    assert night.run(*FOUR) == 0
    assert [len(night.calls(name)) for name in NAMES] == [2, 4, 4, 1]
    assert "best lr: 0.0001\nbest batch_size: 2" in night.summary


def test_all_failed_is_an_error(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES[:2]:
        night.plan(name, status=2, message="error: nothing works")
    assert night.run() == 1
    assert "error: no run ended with a usable checkpoint" in capsys.readouterr().err
    assert not (night.out / BEST).exists()
    assert "best: none yet" in night.summary and night.summary.count("nothing works") == 2


@pytest.mark.parametrize("damage", ["missing", "unreadable"])
def test_a_lost_checkpoint_is_passed_over(night: Night, damage: str) -> None:
    if damage == "missing":
        night.run()
        (night.folder(NAMES[0]) / "vision_bridge_best_val.pt").unlink()
    else:
        (night.plans / f"{NAMES[0]}.pt").write_bytes(b"truncated")
    assert night.run() == 0
    assert load_checkpoint(night.out / BEST).val_loss == 0.2
    assert {"missing": "passed over: vision_bridge_best_val.pt is missing", "unreadable": "not a readable checkpoint"}[
        damage
    ] in night.summary


def test_an_open_spreadsheet_does_not_end_the_night(
    night: Night, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = overnight.write_text

    def refuse(path: Path, text: str) -> None:
        if path.suffix == ".csv":
            raise PermissionError(path)
        real(path, text)

    monkeypatch.setattr(overnight, "write_text", refuse)
    assert night.run(*ONE) == 0
    assert "overnight_leaderboard.csv is open in another program" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["train.csv", "val.csv", "net.pth"])
def test_missing_files_are_reported_before_the_night(night: Night, missing: str) -> None:
    (night.root / missing).unlink()
    with pytest.raises(InputError, match=missing):
        night.run()
    assert not any(night.calls(name) for name in NAMES)
