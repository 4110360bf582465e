"""The overnight search: every grid point exactly once, whatever is killed; the best is alive; the rest is told."""

from __future__ import annotations

import csv
import importlib.util
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
from types import ModuleType

import optuna
import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

import engine.overnight as overnight
import engine.overnight_report as report
from config.errors import InputError
from config.plans import PreprocessPlan
from config.schema import load_config
from data.phantom_dataset import make_dataset
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.cli import Interrupted
from engine.overnight import Point, Search, study_name
from engine.overnight_run import training_processes
from models.medical_vlm import VisionBridge
from models.nnunet_checkpoint import load_nnunet_checkpoint
from models.nnunet_encoder import NnUNetEncoder

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "run_overnight_300.py"
FAKE = Path(__file__).with_name("fake_train.py")
GRID = ["--lrs", "1e-4", "5e-5", "--batch_sizes", "2", "4"]
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4", "lr5e-05_bs2", "lr5e-05_bs4"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_overnight_300", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make_checkpoint(assets: Path) -> Callable[..., None]:
    """Writes a real checkpoint of a very small vision part."""
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=1)
    config = load_config(None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=4)
    vision = VisionBridge.build(config, encoder, 8, 0.1, with_cmi=False)
    plan = PreprocessPlan.from_nnunet(source.plans, source.configuration)

    def write(path: Path, val_loss: float, *, epoch: int = 3, collapsed: bool = False) -> None:
        diagnostics = {"token_std": 1e-9 if collapsed else 0.1, "image_std": 0.05, "effective_rank": 3.0}
        diagnostics |= {"expected_std": 0.1, "collapsed": collapsed}
        save_checkpoint(
            path, vision, stage="vision", step=9, epoch=epoch, val_loss=val_loss, config=config, plan=plan, llm={},
            diagnostics=diagnostics,
        )  # fmt: skip

    return write


class Night:
    """A folder with a configuration and plans for the fake training, and the script run on it."""

    def __init__(self, root: Path, script: ModuleType, make_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch):
        self.root, self.script, self.monkeypatch = root, script, monkeypatch
        self.make_checkpoint = make_checkpoint
        self.plans, self.out, self.config = root / "plans", root / "out put", root / "paths.yaml"
        self.plans.mkdir(parents=True)
        keys = {"caption_csv_train": "train.csv", "caption_csv_val": "val.csv", "nnunet_encoder_checkpoint": "net.pth"}
        for name in keys.values():
            (root / name).write_text(name, encoding="utf-8")
        content = {key: str(root / name) for key, name in keys.items()} | {"output_dir": str(self.out)}
        self.config.write_text(yaml.safe_dump(content), encoding="utf-8")
        monkeypatch.setenv("FAKE_PLAN", str(self.plans))
        for number, name in enumerate(NAMES):
            self.plan(name, val_loss=0.1 * (number + 1))

    def plan(self, name: str, *, val_loss: float = 0.1, steps: int = 1, status: int = 0, says: str = "", **options):
        """What the fake training does for one run. ``best=False``: no epoch was alive."""
        best = f"{name}.pt" if options.pop("best", True) else None
        self.make_checkpoint(self.plans / f"{name}.pt", val_loss, **options)
        content = {"steps": steps, "best": best, "final": f"{name}.pt", "status": status, "says": says}
        (self.plans / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def flags(self, *flags: str) -> list[str]:
        return ["--config", str(self.config), "--train_script", str(FAKE), "--epochs", "3", *(flags or GRID)]

    def run(self, *flags: str) -> int:
        self.monkeypatch.setattr(sys, "argv", [str(SCRIPT), *self.flags(*flags)])
        return self.script.main()

    def start(self, *flags: str) -> psutil.Popen:
        """As a process of its own, to be killed."""
        command = [sys.executable, str(SCRIPT), *self.flags(*flags)]
        return psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def calls(self, name: str) -> list[int]:
        """At which step each start of a run began."""
        path = self.plans / f"{name}.calls"
        return [int(line) for line in path.read_text(encoding="utf-8").split()] if path.is_file() else []

    def folder(self, name: str) -> Path:
        return next((self.out / "overnight").glob(f"*/{name}"))

    def wait_for_step(self, name: str, step: int, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for state in self.out.glob(f"overnight/*/{name}/stage1_state.pt"):
                if int(state.read_text()) >= step:
                    return
            time.sleep(0.02)
        raise AssertionError(f"{name} never reached step {step}")

    @property
    def summary(self) -> str:
        return (self.out / "overnight_best_summary.txt").read_text(encoding="utf-8")

    @property
    def board(self) -> list[dict[str, str]]:
        with (self.out / "overnight_leaderboard.csv").open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream))


@pytest.fixture
def night(tmp_path: Path, script: ModuleType, make_checkpoint: Callable, monkeypatch: pytest.MonkeyPatch) -> Night:
    return Night(tmp_path, script, make_checkpoint, monkeypatch)


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
    assert "NO proof of quality" in " ".join(night.summary.split())
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
    assert night.run("--objective", "align", "--lrs", "5e-5", "--batch_sizes", "2", "4") == 0
    assert "objective: align" in night.summary and "compare runs of one batch_size" in night.summary
    assert "--objective align" in (night.folder(NAMES[2]) / "train.log").read_text(encoding="utf-8")


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


# ---------------------------------------------------------------- killed


def kill_tree(process: psutil.Popen) -> None:
    """kill -9 for a script and the run that it started (which is in a session of its own)."""
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=20)


def test_kill_of_script_and_run_goes_on_where_it_stood(night: Night) -> None:
    for name in NAMES:
        night.plan(name, val_loss=0.1 * (NAMES.index(name) + 1), steps=25)
    process = night.start()
    first = wait_for_first(night)
    wait_until(lambda: len([n for n in NAMES if night.calls(n)]) == 2)
    (second,) = [n for n in NAMES if night.calls(n) and n != first]
    night.wait_for_step(second, 5)
    kill_tree(process)
    assert night.run() == 0
    assert night.calls(first) == [0], "the finished run is kept"
    assert len(night.calls(second)) == 2 and night.calls(second)[1] >= 5, "the killed run goes on from its state"
    assert all(night.calls(name) == [0] for name in NAMES if name not in (first, second))
    assert [row["state"] for row in night.board] == ["finished"] * 4
    assert "best: lr 0.0001 batch_size 2" in night.summary


def wait_for_first(night: Night) -> str:
    wait_until(lambda: any(night.calls(name) for name in NAMES))
    return next(name for name in NAMES if night.calls(name))


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_kill_of_the_script_alone_does_not_start_its_run_twice(
    night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    night.plan(NAMES[0], steps=100)
    process = night.start("--lrs", "1e-4", "--batch_sizes", "2")
    night.wait_for_step(NAMES[0], 2)
    process.kill()
    process.wait(timeout=20)
    assert len(training_processes(night.folder(NAMES[0]))) == 1
    assert night.run("--lrs", "1e-4", "--batch_sizes", "2") == 0
    assert night.calls(NAMES[0]) == [0]
    assert "which an earlier script left at work" in capsys.readouterr().out
    assert night.board[0]["state"] == "finished"


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Do something from a thread while the script runs in this process."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(act)
        yield
        job.result()


def test_kill_of_a_run_is_made_good_in_the_same_night(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    night.plan(NAMES[0], steps=60)

    def kill_it() -> None:
        night.wait_for_step(NAMES[0], 10)
        (run,) = training_processes(night.folder(NAMES[0]))
        run.kill()

    with meanwhile(kill_it):
        assert night.run() == 0
    said = capsys.readouterr().out
    assert len(night.calls(NAMES[0])) == 2 and night.calls(NAMES[0])[1] >= 10
    assert "goes on from its saved state" in said
    assert os.name == "nt" or "killed by SIGKILL (out of memory?)" in said
    assert all(night.calls(name) == [0] for name in NAMES[1:])
    assert [row["state"] for row in night.board] == ["finished"] * 4


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_run_save(night: Night, number: int) -> None:
    night.plan(NAMES[0], steps=2000)

    def stop() -> None:
        night.wait_for_step(NAMES[0], 5)
        os.kill(os.getpid(), number)

    with meanwhile(stop), pytest.raises(Interrupted, match="the same command goes on from here"):
        night.run("--lrs", "1e-4", "--batch_sizes", "2")
    assert not training_processes(night.folder(NAMES[0]))
    assert "interrupted: state saved" in (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8")
    assert night.board[0]["state"] == "interrupted"
    night.plan(NAMES[0], steps=6)
    night.monkeypatch.setattr(Search, "_is_dead", lambda self, owner: bool(owner))  # that script was this process
    assert night.run("--lrs", "1e-4", "--batch_sizes", "2") == 0
    assert len(night.calls(NAMES[0])) == 2 and night.calls(NAMES[0])[1] >= 5


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process there")
def test_a_second_ctrl_c_stops_at_once(night: Night) -> None:
    """The fake training saves for a second; the second signal reaches it in the middle of that."""
    night.plan(NAMES[0], steps=2000)

    def stop() -> None:
        night.wait_for_step(NAMES[0], 5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.7)
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(stop), pytest.raises(Interrupted):
        night.run("--lrs", "1e-4", "--batch_sizes", "2")
    log = (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8")
    assert "KeyboardInterrupt" in log and "state saved" not in log


def test_two_scripts_share_a_grid(night: Night) -> None:
    """On one storage, as two machines would, or two GPUs of one machine."""
    for name in NAMES:
        night.plan(name, steps=30)
    storage = str(night.root / "shared.journal")
    other = night.start(*GRID, "--storage", storage)
    wait_until(lambda: any(night.calls(name) for name in NAMES))
    assert night.run(*GRID, "--storage", storage) == 0
    said = other.communicate(timeout=60)[0].decode("utf-8")
    assert other.returncode == 0, said
    assert {name: night.calls(name) for name in NAMES} == {name: [0] for name in NAMES}
    assert 1 <= said.count(": starts;") <= 3, "both took part"
    assert [row["state"] for row in night.board] == ["finished"] * 4


# ---------------------------------------------------------------- the study's bookkeeping


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


def test_other_settings_are_another_study(night: Night) -> None:
    config = load_config(night.config)
    name = study_name(config, "proxy_l2", 3, 42)
    others = [
        study_name(config, "align", 3, 42),
        study_name(config, "proxy_l2", 4, 42),
        study_name(config, "proxy_l2", 3, 43),
        study_name(config.replace(bridge_depth=3), "proxy_l2", 3, 42),
        study_name(config.replace(mamba_model="another/model"), "proxy_l2", 3, 42),
    ]
    (night.root / "train.csv").write_text("one more row", encoding="utf-8")
    others.append(study_name(config, "proxy_l2", 3, 42))
    assert len({name, *others}) == 7


def test_the_place_of_the_data_is_no_setting(night: Night) -> None:
    config = load_config(night.config)
    moved = night.root / "moved.csv"
    moved.write_bytes((night.root / "train.csv").read_bytes())
    there = config.replace(caption_csv_train=str(moved), output_dir=str(night.root / "b"), cache_dir="c", num_workers=3)
    assert study_name(config, "align", 3, 42) == study_name(there, "align", 3, 42)


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


# ---------------------------------------------------------------- the real thing


def tiny_language_model(folder: Path) -> None:
    """Random weights and one token per byte: Stage 1 asks for its width and its tokenizer only."""
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=1, state_size=8)).save_pretrained(
        folder
    )
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.mark.slow
def test_with_the_real_training(
    tmp_path: Path, assets: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of train.py itself on synthetic scans; the first is killed in the middle and goes on."""
    data = make_dataset(tmp_path / "data", 8, 2, 0, seed=1, workers=1)
    tiny_language_model(tmp_path / "lm")
    settings = {
        "caption_csv_train": str(data.train_csv), "caption_csv_val": str(data.val_csv),
        "caption_prompt_json": str(data.prompt_json), "cache_dir": str(tmp_path / "cache"),
        "nnunet_encoder_checkpoint": str(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"),
        "mamba_model": str(tmp_path / "lm"), "encoder_target_spatial": 4, "bridge_width": 16, "bridge_depth": 1,
        "max_visual_tokens": 16,
    }  # fmt: skip
    config = tmp_path / "paths.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    out = tmp_path / "out"
    flags = ["--config", str(config), "--output_dir", str(out), "--epochs", "6", "--lrs", "1e-3"]
    command = [sys.executable, str(SCRIPT), *flags, "--batch_sizes", "1", "2"]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # A state is saved at the end of an epoch.
    wait_until(lambda: any(out.glob("overnight/*/*/stage1_state.pt")) or process.poll() is not None, seconds=120)
    assert process.poll() is None, process.stdout.read().decode("utf-8")
    kill_tree(process)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *command[2:]])
    assert script.main() == 0
    logs = [path.read_text(encoding="utf-8") for path in out.glob("overnight/*/*/train.log")]
    assert sorted(log.count("---- ") for log in logs) == [1, 2] and sum("resuming at epoch" in log for log in logs) == 1
    best = load_checkpoint(out / "vision_bridge_overnight_best.pt")
    assert not best.collapsed and best.config.mamba_model == str(tmp_path / "lm")
    assert best.val_loss == min(
        load_checkpoint(path).val_loss for path in out.glob("overnight/*/*/vision_bridge_best_val.pt")
    )
