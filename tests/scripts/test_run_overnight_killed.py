"""The overnight search is killed, in whole and in part, and goes on with the same command."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from data.phantom.dataset import make_dataset
from engine.checkpoint import load_checkpoint
from engine.cli import Interrupted
from engine.training.overnight import training_processes

Night = Any  # tests/scripts/conftest.py
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4"]
ONE = ["--lrs", "1e-4", "--batch_sizes", "2"]
no_console = pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process there")


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Do something from a thread while the script runs in this process."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(act)
        yield
        job.result()


def test_kill_of_script_and_run_goes_on_where_it_stood(night: Night) -> None:
    for number, name in enumerate(NAMES):
        night.plan(name, val_loss=0.1 * (number + 1), steps=50)
    process = night.start()
    night.wait_until(lambda: all(night.calls(name) for name in NAMES))
    second = max(NAMES, key=lambda name: (night.plans / f"{name}.calls").stat().st_mtime_ns)
    night.wait_for_step(second, 5)
    night.kill_tree(process)
    assert night.run() == 0
    (first,) = set(NAMES) - {second}
    assert night.calls(first) == [0], "the finished run is kept"
    assert len(night.calls(second)) == 2 and night.calls(second)[1] >= 5, "the killed run goes on from its state"
    assert [row["val_loss"] for row in night.board] == ["0.1", "0.2"]
    assert "best batch_size: 2" in night.summary
    assert load_checkpoint(night.out / "vision_bridge_overnight_best.pt").val_loss == 0.1


def test_kill_of_the_script_alone_does_not_start_its_run_twice(
    night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
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


def test_kill_of_a_run_is_repaired_in_the_same_night(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    night.plan(NAMES[0], steps=60)

    def kill_it() -> None:
        night.wait_for_step(NAMES[0], 10)
        (run,) = training_processes(night.folder(NAMES[0]))
        run.kill()

    with meanwhile(kill_it):
        assert night.run() == 0
    assert len(night.calls(NAMES[0])) == 2 and night.calls(NAMES[0])[1] >= 10 and night.calls(NAMES[1]) == [0]
    output = capsys.readouterr().out
    assert "continues from its saved state" in output and (os.name == "nt" or "status -9 without" in output)
    assert [row["state"] for row in night.board] == ["finished"] * 2


@no_console
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_lets_the_run_save(night: Night, number: int) -> None:
    night.plan(NAMES[0], steps=2000)

    def stop() -> None:
        night.wait_for_step(NAMES[0], 5)
        os.kill(os.getpid(), number)

    with meanwhile(stop), pytest.raises(Interrupted, match="the same command goes on from here"):
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

    def stop() -> None:
        night.wait_for_step(NAMES[0], 5)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(stop), pytest.raises(Interrupted):
        night.run(*ONE)
    log = (night.folder(NAMES[0]) / "train.log").read_text(encoding="utf-8")
    assert "KeyboardInterrupt" in log and "state saved" not in log


def test_two_scripts_share_a_grid(night: Night, capsys: pytest.CaptureFixture[str]) -> None:
    """Each takes a point of its own; the one that is done first waits for the other's run instead of repeating it."""
    night.plan(NAMES[0], steps=60)
    night.plan(NAMES[1], steps=60)
    other = night.start()
    night.wait_until(lambda: any(night.calls(name) for name in NAMES))
    assert night.run() == 0
    other.join(timeout=60)
    assert other.exitcode == 0
    assert [night.calls(name) for name in NAMES] == [[0], [0]]
    assert capsys.readouterr().out.count(": starts; ") == 1
    assert [row["state"] for row in night.board] == ["finished"] * 2


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
def test_with_the_real_training(tmp_path: Path, assets: Path, night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run of train.py itself on synthetic scans, killed in the middle and continued."""
    data = make_dataset(tmp_path / "data", 4, 2, 0, seed=1, workers=1)
    tiny_language_model(tmp_path / "lm")
    settings = {
        "caption_csv_train": str(data.train_csv), "caption_csv_val": str(data.val_csv),
        "caption_prompt_json": str(data.prompt_json), "cache_dir": str(tmp_path / "cache"),
        "nnunet_encoder_checkpoint": str(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"),
        "mamba_model": str(tmp_path / "lm"), "encoder_target_spatial": 4, "bridge_width": 16, "bridge_depth": 1,
        "max_visual_tokens": 16,
    }  # fmt: skip
    night.config.write_text(yaml.safe_dump(settings | {"output_dir": str(night.out)}), encoding="utf-8")
    flags = ["--config", str(night.config), "--epochs", "6", "--lrs", "1e-3", "--batch_sizes", "1"]
    monkeypatch.setattr(night, "set_flags", lambda *_, **__: monkeypatch.setattr(sys, "argv", [__file__, *flags]))
    process = night.start()
    # A state is saved at the end of an epoch.
    night.wait_until(lambda: any(night.out.glob("overnight/*/*/stage1_state.pt")), seconds=120)
    night.kill_tree(process)
    assert night.run() == 0
    log = (night.folder("lr0.001_bs1") / "train.log").read_text(encoding="utf-8")
    assert log.count("---- ") == 2 and "resuming at epoch" in log
    best = load_checkpoint(night.out / "vision_bridge_overnight_best.pt")
    assert not best.collapsed and best.config.mamba_model == str(tmp_path / "lm")
    assert best.val_loss == load_checkpoint(night.folder("lr0.001_bs1") / "vision_bridge_best_val.pt").val_loss
