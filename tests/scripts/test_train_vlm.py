"""Stage 2 as a user runs it, on scans of a few voxels: adapters, lesion tokens, going on, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from config.schema import build_config, write_config
from data.imaging.nifti import write_volume
from engine.checkpoint import load_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
CASES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory, assets: Path) -> Path:
    folder = tmp_path_factory.mktemp("stage2")
    rng = np.random.default_rng(0)
    lines = ["image_path,question,answer,mask_path"]
    for case in range(CASES):
        mask = np.zeros((6, 48, 48), np.uint8)
        mask[2:4, 10 + 5 * case : 20 + 5 * case, 12:20] = 1
        hu = rng.normal(-600, 300, mask.shape).astype(np.int16)
        write_volume(folder / f"{case}.nii.gz", hu, (5.0, 1.6, 1.6))
        write_volume(folder / f"{case}_mask.nii.gz", mask, (5.0, 1.6, 1.6))
        lines.append(f"{case}.nii.gz,Q?,Report {case}.,{case}_mask.nii.gz")
    (folder / "table.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={**{c: i for i, c in enumerate(alphabet)}, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "lm")
    torch.manual_seed(0)
    MambaForCausalLM(MambaConfig(vocab_size=257, hidden_size=32, num_hidden_layers=2, state_size=8)).save_pretrained(
        folder / "lm"
    )
    network = assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth"
    config = build_config(
        {
            "caption_csv_train": str(folder / "table.csv"), "caption_csv_val": str(folder / "table.csv"),
            "cache_dir": str(folder / "cache"), "output_dir": str(folder / "out"), "mamba_model": str(folder / "lm"),
            "nnunet_encoder_checkpoint": str(network), "encoder_target_spatial": 6, "bridge_width": 16,
            "bridge_depth": 1, "slices": 2, "roi_side": 2, "roi_policy": "lesion", "max_visual_tokens": 16,
        },
        "test",
    )  # fmt: skip
    write_config(config, folder / "paths.yaml")
    return folder


def run(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, script, "--config", str(folder / "paths.yaml"), *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False, timeout=300)


def stage2(folder: Path, out: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return run(folder, "train_vlm.py", "--output_dir", str(folder / out), "--batch_size", "2", "--lr", "5e-3", *flags)


@pytest.fixture(scope="module")
def adapted(folder) -> Path:
    done = stage2(folder, "adapted", "--lora_rank", "2", "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "adapters of rank 2 0.00 M (trained), language model" in done.stdout and "(frozen)" in done.stdout
    return folder / "adapted"


def test_adapters_are_in_the_checkpoint_and_the_check_script_uses_them(folder, adapted):
    checkpoint = load_checkpoint(adapted / "vision_bridge_vlm_final.pt")
    assert checkpoint.adapters["rank"] == 2 and len(checkpoint.adapters["layers"]) == 2
    assert all(parts["B"].abs().sum() > 0 for parts in checkpoint.adapters["layers"].values()), "they learnt"
    assert not any("lora" in key for key in checkpoint.model_state_dict)
    assert json.loads((adapted / "stage2_config.json").read_text(encoding="utf-8"))["flags"]["lora_rank"] == 2
    flags = ["--checkpoint", str(adapted / "vision_bridge_vlm_final.pt"), "--max_new_tokens", "8"]
    shown = run(folder, "scripts/check_image_to_text.py", *flags)
    assert shown.returncode == 0 and "生成文本: " in shown.stdout, shown.stderr


def test_going_on_keeps_the_adapters_and_their_rank(folder, adapted):
    start = ["--vision_checkpoint", str(adapted / "vision_bridge_vlm_final.pt"), "--epochs", "1"]
    refused = stage2(folder, "on", *start)
    assert refused.returncode == 2 and "was trained with --lora_rank 2: give the same" in refused.stderr
    done = stage2(folder, "on", *start, "--lora_rank", "2")
    assert done.returncode == 0, done.stderr
    before, after = (
        load_checkpoint(path / "vision_bridge_vlm_final.pt").adapters["layers"] for path in (adapted, folder / "on")
    )
    near = [(before[name]["A"] - after[name]["A"]).abs().max() for name in before]
    assert all(0 < distance < 0.1 for distance in near), "from where they were, not from a fresh start"


def test_the_language_model_alone_stays_frozen_without_adapters(folder):
    done = stage2(folder, "plain", "--epochs", "1")
    assert done.returncode == 0, done.stderr
    assert (
        "adapters" not in done.stdout and load_checkpoint(folder / "plain/vision_bridge_vlm_final.pt").adapters is None
    )
    assert "loss mask checked: 16 visual" in done.stdout


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_rank", "-1"], "--lora_rank is -1, expected 0 (none) or the rank"),
        (["--lora_rank", "2", "--llm_int8"], "--lora_rank and --llm_int8 contradict each other"),
        (["--from_scratch", "--vision_checkpoint", "x.pt"], "contradict each other"),
    ],
)
def test_what_cannot_be_is_one_line(folder, flags, named):
    done = stage2(folder, "refused", *flags)
    assert done.returncode == 2 and named in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
