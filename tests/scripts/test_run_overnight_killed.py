"""The overnight search is killed, in whole and in part, and goes on with the same command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from data.phantom.dataset import make_dataset
from engine.checkpoint import load_checkpoint
from engine.cli import Interrupted
from engine.training.overnight import Search
from engine.training.overnight_run import training_processes

Night = Any  # tests/scripts/conftest.py
NAMES = ["lr0.0001_bs2", "lr0.0001_bs4", "lr5e-05_bs2", "lr5e-05_bs4"]
GRID = ["--lrs", "1e-4", "5e-5", "--batch_sizes", "2", "4"]


def test_kill_of_script_and_run_goes_on_where_it_stood(night: Night) -> None:
    for name in NAMES:
        night.plan(name, val_loss=0.1 * (NAMES.index(name) + 1), steps=50)
    process = night.start()
    first = wait_for_first(night)
    night.wait_until(lambda: len([n for n in NAMES if night.calls(n)]) == 2)
    (second,) = [n for n in NAMES if night.calls(n) and n != first]
    night.wait_for_step(second, 5)
    night.kill_tree(process)
    assert night.run() == 0
    assert night.calls(first) == [0], "the finished run is kept"
    assert len(night.calls(second)) == 2 and night.calls(second)[1] >= 5, "the killed run goes on from its state"
    assert all(night.calls(name) == [0] for name in NAMES if name not in (first, second))
    assert [row["state"] for row in night.board] == ["finished"] * 4
    assert "best: lr 0.0001 batch_size 2" in night.summary


def wait_for_first(night: Night) -> str:
    night.wait_until(lambda: any(night.calls(name) for name in NAMES))
    return next(name for name in NAMES if night.calls(name))


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
    night.wait_until(lambda: any(night.calls(name) for name in NAMES))
    assert night.run(*GRID, "--storage", storage) == 0
    said = other.communicate(timeout=60)[0].decode("utf-8")
    assert other.returncode == 0, said
    assert {name: night.calls(name) for name in NAMES} == {name: [0] for name in NAMES}
    assert 1 <= said.count(": starts;") <= 3, "both took part"
    assert [row["state"] for row in night.board] == ["finished"] * 4


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
    tmp_path: Path, assets: Path, overnight_script: ModuleType, night: Night, monkeypatch: pytest.MonkeyPatch
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
    command = [sys.executable, overnight_script.__file__, *flags, "--batch_sizes", "1", "2"]
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    # A state is saved at the end of an epoch.
    night.wait_until(lambda: any(out.glob("overnight/*/*/stage1_state.pt")) or process.poll() is not None, seconds=120)
    assert process.poll() is None, process.stdout.read().decode("utf-8")
    night.kill_tree(process)
    monkeypatch.setattr(sys, "argv", [overnight_script.__file__, *command[2:]])
    assert overnight_script.main() == 0
    logs = [path.read_text(encoding="utf-8") for path in out.glob("overnight/*/*/train.log")]
    assert sorted(log.count("---- ") for log in logs) == [1, 2] and sum("resuming at epoch" in log for log in logs) == 1
    best = load_checkpoint(out / "vision_bridge_overnight_best.pt")
    assert not best.collapsed and best.config.mamba_model == str(tmp_path / "lm")
    assert best.val_loss == min(
        load_checkpoint(path).val_loss for path in out.glob("overnight/*/*/vision_bridge_best_val.pt")
    )
