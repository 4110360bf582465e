"""The user's setting: its commands and its configuration; the chain itself is run by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from config.errors import InputError
from config.schema import REPOSITORY, load_config
from scripts import run_user_setting


def plan(monkeypatch: pytest.MonkeyPatch, out: Path, *flags: str) -> dict[str, list[str]]:
    command = ["run_user_setting.py", "u3", "--seed", "2", "--out", str(out), "--language_model", str(out / "lm")]
    monkeypatch.setattr(sys, "argv", [*command, *flags])
    return {step.name: step.command for step in run_user_setting.plan(run_user_setting.parse_args())}


def test_every_command_has_flags_that_exist_and_no_mask_reaches_the_scored_cases(tmp_path, monkeypatch, parse) -> None:
    commands = plan(monkeypatch, tmp_path)
    for command in commands.values():
        assert parse(command).seed == 2
    assert str(tmp_path / "data" / "test_no_masks.csv") in commands["scores"]
    assert "--one_class" in commands["segmentation"]
    assert load_config(tmp_path / "paths.yaml").language_model_adapters


def test_both_stages_are_trained_as_the_readme_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse) -> None:
    """Its commands for one's own data are those of the measured scores."""
    commands, readme = plan(monkeypatch, tmp_path), (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Training and checking") :]
    for stage, script in (("stage1", "train.py"), ("stage2", "train_vlm.py")):
        line = next(line for line in section.splitlines() if line.startswith(f"python {script} "))
        wanted, found = parse(line.split()[1:]), parse(commands[stage])
        for flag in ("epochs", "batch_size", "lr", "objective", "lora_rank", "warmup_ratio"):
            assert getattr(found, flag, None) == getattr(wanted, flag, None), flag


def test_flags_of_an_ablation_reach_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = plan(monkeypatch, tmp_path, "--no_stage0", "--lora_rank", "8", "--set", "slice_policy=mask", "slices=3")
    assert "stage0" not in commands and "--lora_rank" in commands["stage2"]
    assert str(tmp_path / "data" / "test.csv") in commands["scores"]
    config = load_config(tmp_path / "paths.yaml")
    assert (config.slice_policy, config.slices, config.language_model_adapters) == ("mask", 3, None)


@pytest.mark.parametrize("pair", ["slices", "slices=", "=3", "slice=3"])
def test_a_pair_without_key_or_value_and_an_unknown_key_are_refused(pair: str, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(InputError, match=pair.partition("=")[0] or "--set"):
        plan(monkeypatch, tmp_path, "--set", pair)
