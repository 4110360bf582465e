"""Stage 2 as a user runs it, on scans of a few voxels: adapters, lesion tokens, continuing, and what is refused."""

from __future__ import annotations

import csv
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from config.errors import InputError
from config.schema import REPOSITORY, Config
from engine import loaders
from engine.checkpoint import load_checkpoint
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import check_regions
from tests.test_train import config_with

FINAL, BEST = "vision_bridge_vlm_final.pt", "vision_bridge_vlm_best_val.pt"
NODULE, NORMAL = "所见：右肺上野见结节，大小约12mm。结论：右肺上野结节。", "所见：双肺清晰。结论：正常。"


@pytest.fixture
def adapted(run_stage: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    run_stage("train_vlm", "--output_dir", str(tmp_path / "adapted"), "--lora_rank", "2", "--epochs", "2")
    printed = capsys.readouterr().out
    assert "adapters of rank 2 0.00 M (trained), language model" in printed and "(frozen)" in printed
    return tmp_path / "adapted"


def test_adapters_are_in_the_checkpoint_and_the_check_script_uses_them(adapted):
    checkpoint = load_checkpoint(adapted / FINAL)
    assert checkpoint.adapters["rank"] == 2 and len(checkpoint.adapters["layers"]) == 2
    assert all(parts["B"].abs().sum() > 0 for parts in checkpoint.adapters["layers"].values()), "they learnt"
    assert not any("lora" in key for key in checkpoint.model_state_dict)
    assert json.loads((adapted / "stage2_config.json").read_text(encoding="utf-8"))["flags"]["lora_rank"] == 2
    command = ["scripts/check_image_to_text.py", "--checkpoint", str(adapted / FINAL), "--max_new_tokens", "8"]
    command = [sys.executable, *command, "--config", str(adapted / "stage2_config.yaml")]
    shown = subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert shown.returncode == 0 and "生成文本: " in shown.stdout, shown.stderr


def test_continuing_keeps_the_adapters_and_their_rank(run_stage, adapted, tmp_path):
    start = ["--vision_checkpoint", str(adapted / FINAL), "--epochs", "1", "--output_dir", str(tmp_path / "on")]
    with pytest.raises(InputError, match="was trained with --lora_rank 2: give the same"):
        run_stage("train_vlm", *start)
    run_stage("train_vlm", *start, "--lora_rank", "2")
    before, after = (load_checkpoint(path / FINAL).adapters["layers"] for path in (adapted, tmp_path / "on"))
    near = [(before[name]["A"] - after[name]["A"]).abs().max() for name in before]
    assert all(0 < distance < 0.1 for distance in near), "from where they were, not from a fresh start"


def test_the_language_model_alone_stays_frozen_without_adapters(run_stage, tmp_path, capsys):
    run_stage("train_vlm", "--output_dir", str(tmp_path), "--epochs", "1")
    printed = capsys.readouterr().out
    assert "adapters of rank" not in printed and load_checkpoint(tmp_path / FINAL).adapters is None
    assert "loss mask checked: 16 visual" in printed and "平均 caption_loss" in printed
    assert "最近 5 个 epoch 平均 caption_loss" in printed and "step 2/2  caption_loss" in printed
    assert "no findings head, no findings prompt" in printed, "the labeller knows no 'Report 0.'"
    assert "run Stage 0,  python scripts/adapt_language_model.py --config " in printed.split("最近 5 个 epoch")[1]


@pytest.fixture
def chinese(small_training: Path, tmp_path: Path) -> Path:
    """A configuration of twelve rows, on the four scans, whose reports state a nodule or none; the language model is in
    bfloat16, as on a GPU."""
    lines = ["image_path,question,answer,mask_path"]
    for row in range(12):
        report = (
            "所见：右肺上野见结节，大小约12mm。结论：右肺上野结节。" if row < 11 else "所见：双肺清晰。结论：正常。"
        )
        lines.append(f"{small_training / str(row % 4)}.nii.gz,Q?,{report},")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tables = dict.fromkeys(("caption_csv_train", "caption_csv_val"), str(tmp_path / "table.csv"))
    return config_with(small_training, tmp_path, **tables, mamba_dtype="bfloat16")


def test_findings_head_and_prompt_go_from_stage_to_stage(run_stage, chinese, tmp_path, capsys, monkeypatch):
    """Stage 1 learns the head, Stage 2 measures how prompts err and goes on with it, and the check script says them."""
    folder = ["--output_dir", str(tmp_path), "--epochs", "1"]
    run_stage("train", *folder, config=chinese)
    assert "findings head: nodule\n" in capsys.readouterr().out
    first = load_checkpoint(tmp_path / "vision_bridge_best_val.pt")
    assert first.findings == ["nodule"]
    run_stage("train_vlm", *folder, "--vision_checkpoint", str(first.path), config=chinese)
    printed = capsys.readouterr().out
    assert "findings prompt (both) on 12 held-out cases: missed " in printed and "head 0." in printed
    assert "language model on 12 validation reports, from their true key points" in printed
    second = load_checkpoint(tmp_path / FINAL)
    assert second.findings == ["nodule"] and second.config.findings_prompt == "both"
    weight = "head.of_finding.weight"
    assert not torch.equal(first.model_state_dict[weight], second.model_state_dict[weight]), "trained in Stage 2 too"
    check = importlib.import_module("scripts.check_image_to_text")
    command = ["check", "--checkpoint", str(tmp_path / FINAL), "--config", str(chinese), "--max_new_tokens", "4"]
    monkeypatch.setattr(sys, "argv", command)
    check.main()
    assert re.search(r"^findings prompt \(both\): 已知：.*。$", capsys.readouterr().out, re.MULTILINE)


def rows(folder: Path) -> list[tuple[str, str]]:
    with (folder / "stage2_train_log.csv").open(encoding="utf-8", newline="") as stream:
        return [(row["step"], row["epoch"]) for row in csv.DictReader(stream)]


def test_the_segmentation_leaves_the_gpu_before_the_language_model_comes(run_stage, tmp_path, monkeypatch):
    order, load = [], MambaLM.load
    monkeypatch.setattr(loaders, "free_network", lambda: order.append("network freed"))
    monkeypatch.setattr(MambaLM, "load", lambda *args, **options: order.append("LLM") or load(*args, **options))
    run_stage("train_vlm", "--output_dir", str(tmp_path), "--epochs", "1")
    assert order == ["network freed", "LLM"]


def test_continuing_keeps_the_best_and_appends_to_the_log(run_stage, tmp_path, capsys):
    """A learning rate that makes every later epoch worse: the best so far stays, bit for bit."""
    folder = ["--output_dir", str(tmp_path)]
    run_stage("train_vlm", *folder, "--epochs", "2")
    best, first = (tmp_path / BEST).read_bytes(), load_checkpoint(tmp_path / BEST)
    capsys.readouterr()
    run_stage("train_vlm", *folder, "--epochs", "1", "--lr", "3")
    assert f"best so far: epoch {first.epoch}, val_loss {first.val_loss:.6f} on this table" in capsys.readouterr().out
    assert (tmp_path / BEST).read_bytes() == best
    final = load_checkpoint(tmp_path / FINAL)
    assert (final.step, final.epoch) == (6, 3) and final.val_loss > first.val_loss
    assert rows(tmp_path) == [("4", "2"), ("6", "3")]
    capsys.readouterr()
    run_stage("train_vlm", *folder, "--epochs", "1", "--vision_checkpoint", str(tmp_path / BEST))
    assert "stage2_train_log.csv goes on from step " in capsys.readouterr().out
    kept = (tmp_path / "stage2_train_log.previous.csv").read_text(encoding="utf-8")
    assert [line.split(",")[0] for line in kept.splitlines()] == ["step", "4", "6"], "an epoch that is left out is kept"


@pytest.mark.minutes
def test_continuing_elsewhere_takes_the_start_as_the_best_so_far(run_stage, tmp_path):
    run_stage("train_vlm", "--output_dir", str(tmp_path / "a"), "--epochs", "1")
    start = ["--vision_checkpoint", str(tmp_path / "a" / FINAL), "--output_dir", str(tmp_path / "b")]
    run_stage("train_vlm", *start, "--epochs", "1", "--lr", "3")
    started, best = load_checkpoint(tmp_path / "a" / FINAL), load_checkpoint(tmp_path / "b" / BEST)
    assert best.epoch == started.epoch == 1
    assert all(torch.equal(value, best.model_state_dict[key]) for key, value in started.model_state_dict.items())


def test_a_best_of_another_training_is_kept_under_another_name(run_stage, tmp_path, capsys):
    run_stage("train_vlm", "--output_dir", str(tmp_path), "--epochs", "1", "--lora_rank", "2")
    other = (tmp_path / BEST).read_bytes()
    run_stage("train_vlm", "--output_dir", str(tmp_path / "a"), "--epochs", "1")
    shutil.copy(tmp_path / "a" / FINAL, tmp_path / FINAL)
    run_stage("train_vlm", "--output_dir", str(tmp_path), "--epochs", "1")
    assert (tmp_path / "vision_bridge_vlm_best_val.previous.pt").read_bytes() == other
    assert "is of another training and is kept as" in capsys.readouterr().out


def test_roi_and_cmi_that_do_not_fit_are_refused_at_once(run_stage, small_training, tmp_path, monkeypatch):
    flags = ["--epochs", "1", "--output_dir", str(tmp_path / "out")]
    run_stage("train_vlm", *flags, config=config_with(small_training, tmp_path, use_cmi=True))
    for stage, changes, words in (
        ("train_vlm", {}, "was trained with CMI, .* set use_cmi: true"),
        ("train_vlm", {"roi_side": 1, "use_cmi": True}, "trained with roi_side: 2, the configuration says roi_side: 1"),
        ("train_vlm", {"max_visual_tokens": 9}, "max_visual_tokens 9 is less than slices 2 need"),
        ("train", {"roi_side": 7}, "roi_side 7 is larger than the 6 x 6 features: lower roi_side, or raise"),
    ):
        monkeypatch.setattr(f"{stage}.start_run", lambda *_: pytest.fail("it has started"))
        with pytest.raises(InputError, match=words):
            run_stage(stage, *flags, config=config_with(small_training, tmp_path, **changes))
    with pytest.raises(InputError, match="roi_policy is lesion and roi_side is empty"):
        check_regions(Config(roi_policy="lesion"))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_rank", "-1"], "--lora_rank is -1, expected 0 .none. or the rank"),
        (["--lora_rank", "2", "--llm_int8"], "--lora_rank and --llm_int8 contradict each other"),
        (["--from_scratch", "--vision_checkpoint", "x.pt"], "contradict each other"),
    ],
)
def test_what_cannot_be_is_one_line(run_stage, tmp_path, flags, named):
    with pytest.raises(InputError, match=named) as caught:
        run_stage("train_vlm", "--output_dir", str(tmp_path / "refused"), *flags)
    assert "\n" not in str(caught.value)
