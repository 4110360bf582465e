"""The bookkeeping of the overnight search: no point lost, none taken twice, whoever dies at whatever moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import pytest

import engine.training.overnight as overnight
from config.schema import Config, load_config
from engine.training.overnight import Point, Search, study_name


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Search]:
    monkeypatch.setattr(overnight, "CLAIM_SECONDS", 0.3)
    storage = optuna.storages.InMemoryStorage()

    def open_search(lrs=(1e-4, 5e-5), batch_sizes=(2, 4)) -> Search:
        return Search(storage, "study", lrs, batch_sizes, tmp_path)

    return open_search


FINISHED = overnight.Result("finished", val_loss=1.0, epoch=1)
NOBODY = 2**22 + 1  # above every process number that Linux gives


def take_all(search: Search) -> list[Point]:
    taken = []
    while (trial := search.claim()) is not None:
        taken.append(Point(**trial.params))
        search.finish(trial, FINISHED)
        assert len(taken) < 50
    return taken


class Killed(BaseException):
    pass


@pytest.mark.parametrize("already_done", [0, 1, 3])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (optuna.samplers.GridSampler, "before_trial"),
        (optuna.samplers.GridSampler, "sample_independent"),
        (Search, "_own"),
        (Search, "folder_of"),
        (Search, "_is_duplicate"),
    ],
    ids=["no point chosen", "point not written", "not signed", "half signed", "signed"],
)
def test_no_point_is_lost_when_a_script_dies_while_it_claims(
    search: Callable[..., Search], monkeypatch: pytest.MonkeyPatch, owner: type, name: str, already_done: int
) -> None:
    def die(*_: object) -> None:
        raise Killed

    first = search()
    first.owner = {"host": first.host, "pid": NOBODY, "started": 0.0}
    for _ in range(already_done):
        first.finish(first.claim(), FINISHED)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, die)
        first.claim()
    again = search()
    taken = take_all(again)
    assert len(taken) == len(set(taken)) == 4 - already_done
    assert [row.state for row in again.rows()] == ["finished"] * 4


def test_runs_of_other_machines_are_left_alone_until_reclaimed(search: Callable[..., Search]) -> None:
    other = search()
    other.host, other.owner = "elsewhere", {"host": "elsewhere", "pid": 1, "started": 0.0}
    theirs = Point(**other.claim().params)
    here = search()
    taken = take_all(here)
    assert len(taken) == 3 and theirs not in taken
    assert [row.state for row in here.rows()] == ["finished"] * 3 + ["running"]
    assert Point(**here.claim(reclaim=["elsewhere"]).params) == theirs


@pytest.mark.parametrize(("age", "theirs"), [(0, True), (100, False)], ids=["alive", "its number was reused"])
def test_a_live_script_of_this_machine_is_left_alone(search: Callable[..., Search], age: float, theirs: bool) -> None:
    other, process = search(), psutil.Process(os.getppid())
    other.owner = {"host": other.host, "pid": process.pid, "started": process.create_time() - age}
    point = Point(**other.claim().params)
    taken = take_all(search())
    assert len(taken) == len(set(taken)) and (point not in taken) == theirs


def test_a_wider_grid_keeps_what_is_done(search: Callable[..., Search]) -> None:
    assert len(take_all(search())) == 4
    wider = search(lrs=(1e-4, 5e-5, 2e-5), batch_sizes=(2, 4, 8))
    taken = take_all(wider)
    assert len(taken) == len(set(taken)) == 5
    assert sorted(take_all(search(lrs=(1e-4, 7e-5)))) == [Point(7e-5, 2), Point(7e-5, 4)]
    assert len(wider.rows()) == 11, "the leaderboard shows every comparable run"


def test_failed_points_of_an_interrupted_grid_are_retried_without_losing_others(
    search: Callable[..., Search],
) -> None:
    """A retried point must not use up the number of a point that was not drawn yet."""
    failed = overnight.Result("failed", "once")
    first = search(lrs=(1e-4,), batch_sizes=(2,))
    first.finish(first.claim(), failed)
    retry = first.claim()
    first.finish(retry, FINISHED)
    taken = take_all(search(lrs=(1e-4, 5e-5), batch_sizes=(2, 4)))
    assert sorted(taken) == [Point(5e-5, 2), Point(5e-5, 4), Point(1e-4, 4)]


def test_given_up_points_are_not_offered(search: Callable[..., Search]) -> None:
    one = search(lrs=(1e-4,), batch_sizes=(2,))
    trial = one.claim()
    one.finish(trial, overnight.Result("failed", "for good"))
    assert one.claim(given_up=[Point(1e-4, 2)]) is None
    assert one.claim() is not None


# ---------------------------------------------------------------- which runs may be compared


@pytest.fixture
def config(tmp_path: Path) -> Config:
    keys = {"caption_csv_train": "train.csv", "caption_csv_val": "val.csv", "nnunet_encoder_checkpoint": "net.pth"}
    for name in keys.values():
        (tmp_path / name).write_text(name, encoding="utf-8")
    return load_config(None, caption_prompt_json="", **{key: str(tmp_path / name) for key, name in keys.items()})


def test_other_settings_are_another_study(config: Config, tmp_path: Path) -> None:
    name = study_name(config, "proxy_l2", 3, 42)
    others = [
        study_name(config, "align", 3, 42),
        study_name(config, "proxy_l2", 4, 42),
        study_name(config, "proxy_l2", 3, 43),
        study_name(config.replace(bridge_depth=3), "proxy_l2", 3, 42),
        study_name(config.replace(mamba_model="another/model"), "proxy_l2", 3, 42),
    ]
    (tmp_path / "train.csv").write_text("one more row", encoding="utf-8")
    others.append(study_name(config, "proxy_l2", 3, 42))
    assert len({name, *others}) == 7


def test_the_place_of_the_data_is_no_setting(config: Config, tmp_path: Path) -> None:
    moved = tmp_path / "moved.csv"
    moved.write_bytes((tmp_path / "train.csv").read_bytes())
    there = config.replace(caption_csv_train=str(moved), output_dir=str(tmp_path / "b"), cache_dir="c", num_workers=3)
    assert study_name(config, "align", 3, 42) == study_name(there, "align", 3, 42)
