"""The order of the overnight search: no grid point lost, none repeated, at whatever moment a process dies."""

from __future__ import annotations

import argparse
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

import engine.training.overnight as overnight
from config.errors import InputError
from config.schema import Config, load_config
from engine.training.overnight import Night, study_name

Open = Callable[..., Night]
RESULT = {"val_loss": 1.0, "epoch": 1, "collapsed": False, "reason": ""}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    keys = {"caption_csv_train": "train.csv", "caption_csv_val": "val.csv", "nnunet_encoder_checkpoint": "net.pth"}
    for name in keys.values():
        (tmp_path / name).write_text(name, encoding="utf-8")
    paths = {key: str(tmp_path / name) for key, name in keys.items()}
    return load_config(None, caption_prompt_json="", output_dir=str(tmp_path / "out"), **paths)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs in their order; each start of a run completes it."""
    names: list[str] = []

    def train(command: list[str], log: Path, stop: Callable[[], bool]) -> int:
        names.append(log.parent.name)
        log.write_text("trained", encoding="utf-8")
        (log.parent / overnight.STAGES[1].final_file).touch()
        return 0

    storage = optuna.storages.InMemoryStorage()  # faster than a database
    monkeypatch.setattr(overnight, "RDBStorage", lambda *args, **options: storage)
    monkeypatch.setattr(overnight, "train", train)
    monkeypatch.setattr(overnight, "training_processes", lambda folder: [])
    monkeypatch.setattr(overnight, "read_result", lambda *_: RESULT)
    monkeypatch.setattr(Night, "show_progress", lambda *_: None)
    return names


@pytest.fixture
def open_night(config: Config, trained: list[str]) -> Open:
    def build(lrs: tuple[float, ...] = (1e-4, 5e-5), batch_sizes: tuple[int, ...] = (2,)) -> Night:
        flags = {"objective": "align", "epochs": 3, "seed": 42, "config": None, "output_dir": None}
        flags |= {"mamba_model": None, "allow_toy_model": False, "force": False, "train_script": Path("train.py")}
        flags |= {"stage": 1, "vision_checkpoint": None, "prune": False, "deadline": None, "train_flags": []}
        return Night(argparse.Namespace(lrs=lrs, batch_sizes=batch_sizes, **flags), config)

    return build


class Killed(BaseException):
    """Ends a trial as kill -9 does: optuna does not hear of it."""


def die(*_: Any, **__: Any) -> None:
    raise Killed


@pytest.mark.parametrize("moment", ["before_trial", "sample_independent", "train"])
@pytest.mark.parametrize("failed_before", [False, True])
def test_no_point_is_lost_when_a_process_dies(
    open_night: Open, trained: list[str], monkeypatch: pytest.MonkeyPatch, moment: str, failed_before: bool
) -> None:
    """No point chosen, point not stored, training; also after taking a failed run from the queue."""
    if failed_before:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(overnight, "train", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            open_night().search()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(overnight if moment == "train" else optuna.samplers.GridSampler, moment, die)
        open_night().search()
    night = open_night()
    night.search()
    assert sorted(set(trained)) == ["lr0.0001_bs2", "lr5e-05_bs2"] and len(trained) == 2
    assert night.report.leaderboard()["state"].tolist() == ["finished"] * 2


def test_a_trial_without_heartbeats_is_queued_again_and_continues_in_its_folder(
    open_night: Open, trained: list[str], monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    monkeypatch.setattr(overnight, "RDBStorage", optuna.storages.RDBStorage)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(overnight, "train", die)
        open_night().search()
    with sqlite3.connect(config.resolved("output_dir") / "overnight" / "overnight.db") as database:
        database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-10 minutes')")
    night = open_night()
    night.search()
    dead, *_ = trials = night.study.trials
    (again,) = [trial for trial in trials if trial.system_attrs.get("retry_history") == [dead.number]]
    assert (dead.state.name, again.state.name) == ("FAIL", "COMPLETE") and again.params == dead.params
    assert trained[0] == night.report.run_folder(**dead.params).name and len(trained) == 2, "the queued one comes first"


# ---------------------------------------------------------------- which runs are comparable


def name_of(config: Config, objective: str, epochs: int, seed: int) -> str:
    args = argparse.Namespace(objective=objective, epochs=epochs, seed=seed, stage=1, train_flags=[])
    return study_name(args, config)


def test_other_settings_are_another_study_and_the_place_of_the_data_is_no_setting(
    config: Config, tmp_path: Path
) -> None:
    moved = tmp_path / "moved.csv"
    moved.write_bytes((tmp_path / "train.csv").read_bytes())
    there = config.replace(caption_csv_train=str(moved), output_dir=str(tmp_path / "b"), cache_dir="c", num_workers=3)
    assert name_of(config, "align", 3, 42) == name_of(there, "align", 3, 42)
    names = {name_of(config, *others) for others in (("proxy_l2", 3, 42), ("align", 3, 42), ("align", 4, 42))}
    names |= {name_of(config.replace(bridge_depth=3), "align", 3, 42), name_of(config, "align", 3, 43)}
    names |= {name_of(config.replace(mamba_model="another/model"), "align", 3, 42)}
    (tmp_path / "train.csv").write_text("one more row", encoding="utf-8")
    assert len(names | {name_of(config, "align", 3, 42)}) == 7
    adapters = config.replace(language_model_adapters=str(tmp_path / "adapters"))
    for content in ("of one Stage 0", "of another"):
        (tmp_path / "adapters").write_text(content, encoding="utf-8")
        names.add(name_of(adapters, "align", 3, 42))
    assert len(names) == 8


@pytest.mark.parametrize("missing", ["train.csv", "val.csv", "net.pth"])
def test_missing_files_are_reported_before_the_night(config: Config, tmp_path: Path, missing: str) -> None:
    (tmp_path / missing).unlink()
    with pytest.raises(InputError, match=missing):
        name_of(config, "align", 3, 42)
