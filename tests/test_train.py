"""Stage 1 as a user runs it, on scans of a few voxels."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from config.errors import InputError
from config.schema import load_config, write_config
from engine.checkpoint import load_checkpoint
from models.nnunet.checkpoint import load_nnunet_checkpoint


def config_with(small_training: Path, folder: Path, **keys: object) -> Path:
    write_config(load_config(small_training / "paths.yaml", **keys), folder / "other.yaml")
    return folder / "other.yaml"


def test_it_prints_what_users_look_for_and_writes_what_the_manual_promises(run_stage, tmp_path, capsys):
    run_stage("train", "--epochs", "2", "--output_dir", str(tmp_path))
    printed = capsys.readouterr().out
    assert "epoch 0/2  val_loss " in printed and "epoch 2/2  step 4/4  train_loss " in printed
    assert "M (trained), bridge" in printed and "(frozen)" not in printed
    lock = set() if os.name == "nt" else {".run.lock"}  # gone after a run on Windows
    assert {path.name for path in tmp_path.iterdir()} == lock | {
        "stage1_config.yaml", "stage1_run.json", "stage1_log.jsonl", "stage1_loss.png", "vision_bridge_best_val.pt",
        "vision_bridge_final.pt",
    }  # fmt: skip
    final, best = (load_checkpoint(tmp_path / f"vision_bridge_{name}.pt") for name in ("final", "best_val"))
    assert (final.stage, final.epoch, final.step) == ("vision", 2, 4) and final.diagnostics["objective"] == "align"
    assert best.val_loss <= final.val_loss and not best.collapsed
    assert load_config(tmp_path / "stage1_config.yaml") == final.config


def test_the_same_seed_gives_the_same_weights_and_another_one_not(run_stage, tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run_stage("train", "--epochs", "1", "--seed", seed, "--output_dir", str(tmp_path / name))
    a, b, c = (load_checkpoint(tmp_path / name / "vision_bridge_final.pt").model_state_dict for name in "abc")
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    assert any(not torch.equal(value, c[key]) for key, value in a.items())


def test_a_frozen_encoder_keeps_nnunets_weights(run_stage, small_training, tmp_path, assets):
    config = config_with(small_training, tmp_path, train_encoder=False)
    run_stage("train", "--epochs", "1", "--output_dir", str(tmp_path / "out"), config=config)
    saved = load_checkpoint(tmp_path / "out" / "vision_bridge_final.pt").model_state_dict
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    assert all(torch.equal(value, saved[f"encoder.{name}"]) for name, value in source.encoder_state.items())


def test_the_proxy_loss_warns_and_needs_no_weights_of_the_language_model(run_stage, small_training, tmp_path, capsys):
    folder = tmp_path / "lm"
    folder.mkdir()
    for path in (small_training / "lm").iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    config = config_with(small_training, tmp_path, mamba_model=str(folder))
    flags = ["--objective", "proxy_l2", "--epochs", "1", "--output_dir", str(tmp_path / "out")]
    run_stage("train", *flags, config=config)
    assert "objective proxy_l2: its minimum is the zero output" in capsys.readouterr().out


def test_cmi_is_left_to_stage_2(run_stage, small_training, tmp_path, capsys):
    config = config_with(small_training, tmp_path, use_cmi=True)
    run_stage("train", "--epochs", "1", "--output_dir", str(tmp_path / "out"), config=config)
    assert "CMI reads the question and is trained in Stage 2" in capsys.readouterr().out
    assert not load_checkpoint(tmp_path / "out" / "vision_bridge_final.pt").has_cmi


@pytest.mark.parametrize("key", ["caption_csv_train", "caption_csv_val"])
def test_tables_of_one_report_are_refused_or_a_warning_where_the_loss_means_something(
    run_stage, small_training, tmp_path, capsys, key
):
    header, row, *_ = (small_training / "table.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "one.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    config = config_with(small_training, tmp_path, image_root=str(small_training), **{key: str(tmp_path / "one.csv")})
    flags = ["--epochs", "1", "--output_dir", str(tmp_path / "out")]
    said = (
        "all reports are the same text" if key == "caption_csv_train" else "has a single case, so val_loss says nothing"
    )
    with pytest.raises(InputError, match=f"one.csv.*{said}"):
        run_stage("train", *flags, config=config)
    assert not (tmp_path / "out" / "vision_bridge_final.pt").exists()
    run_stage("train", *flags, "--objective", "proxy_l2", config=config)
    assert ("so val_loss says nothing" in capsys.readouterr().out) is (key == "caption_csv_val")


def test_tensorboard_shows_what_the_log_holds(run_stage, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_stage("train", "--epochs", "2", "--tracker", "tensorboard", "--output_dir", str(tmp_path))
    events = EventAccumulator(str(tmp_path / "tracker" / "mamba-ct-stage1"))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / "stage1_log.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = [(record["step"], record["val_loss"]) for record in logged if record["event"] == "epoch"]
    shown = [(event.step, event.value) for event in events.Scalars("epoch/val_loss")]
    assert shown == [(step, pytest.approx(value)) for step, value in expected] and len(shown) == 3
    assert {"step/train_loss", "step/lr", "epoch/token_std"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(run_stage, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.get_available_trackers", list)
    with pytest.raises(InputError, match="--tracker wandb needs its package: pip install wandb"):
        run_stage("train", "--tracker", "wandb", "--output_dir", str(tmp_path))
    assert not list(tmp_path.iterdir())
