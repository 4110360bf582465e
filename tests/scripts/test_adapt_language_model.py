"""Stage 0 as a user runs it, on a language model of a few thousand weights; Stage 2 goes on with its adapters."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from config.errors import InputError
from config.schema import load_config, write_config
from data.phantom.finding import Finding
from data.phantom.report import write_report
from engine.checkpoint import load_checkpoint
from models.language_model.adapter_file import ADAPTER_FILE, adapter_digest
from models.language_model.mamba_lm import MambaLM

FINAL = "vision_bridge_vlm_final.pt"


def reports(count: int, language: str = "zh") -> list[str]:
    rng = np.random.default_rng(0)
    return [write_report([Finding("nodule", "left", "upper", 5 + k)], rng, language) for k in range(count)]


@pytest.fixture
def stage0(small_training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_accelerator):
    """``stage0("--steps", "3", texts=…)``: the script's main with so many extra reports; returns its output folder."""
    script = importlib.import_module("scripts.adapt_language_model")

    def run(
        *flags: str, texts: list[str] | None = None, held_out: list[str] | None = None, dtype: str = "float32"
    ) -> Path:
        extra, out = tmp_path / "extra.txt", tmp_path / "out"
        extra.write_text("\n".join(reports(24) if texts is None else texts), encoding="utf-8")
        lines = [f"{small_training / '0.nii.gz'},Q?,{text}" for text in held_out or reports(30)[24:]]
        (tmp_path / "val.csv").write_text("\n".join(["image_path,question,answer", *lines]), encoding="utf-8")
        keys = {"caption_csv_val": str(tmp_path / "val.csv"), "mamba_dtype": dtype}
        config = load_config(small_training / "paths.yaml").replace(**keys)
        write_config(config, tmp_path / "stage0.yaml")
        command = ["adapt", "--config", str(tmp_path / "stage0.yaml"), "--output_dir", str(out)]
        command += ["--extra_reports", str(extra), "--batch_size", "2", "--steps", "2", "--rank", "2", *flags]
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(script, "GENERATED", 2)
        forget_accelerator()
        script.main()
        return out

    return run


def test_adapters_are_trained_saved_and_used_by_stage_2(stage0, run_stage, small_training, tmp_path, capsys):
    out = stage0(dtype="bfloat16")  # as on a GPU
    printed = capsys.readouterr().out
    assert "key points, for example: 已知：" in printed and "nats/character, four sections 0.00 → " in printed
    assert f"set  language_model_adapters: {(out / ADAPTER_FILE).as_posix()}" in printed
    config = load_config(small_training / "paths.yaml").replace(language_model_adapters=str(out / ADAPTER_FILE))
    write_config(config, tmp_path / "paths.yaml")
    folder = ["--output_dir", str(tmp_path / "on")]
    run_stage("train_vlm", *folder, "--epochs", "1", "--lora_rank", "2", config=tmp_path / "paths.yaml")
    checkpoint = load_checkpoint(tmp_path / "on" / FINAL)
    assert checkpoint.llm["adapters"] == adapter_digest(out / ADAPTER_FILE) and checkpoint.adapters["rank"] == 2
    both = MambaLM.load(config.mamba_model, stage0=config.language_model_adapters, adapters=checkpoint.adapters)
    assert both.identity.adapters == checkpoint.llm["adapters"]
    trained_with = re.escape(str(out / ADAPTER_FILE))
    with pytest.raises(InputError, match=f"adapters is empty .none., .*final.pt was trained with {trained_with}"):
        run_stage("train_vlm", *folder, "--epochs", "1", "--lora_rank", "2")


def test_the_held_out_loss_falls(stage0, capsys):
    stage0("--steps", "40", "--lr", "1e-2")
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Stage 0 (40 steps)"))
    before, after = (float(part.split()[-1]) for part in line.split(" nats")[0].split("→"))
    assert after < before - 0.2


def test_too_few_reports(stage0):
    with pytest.raises(InputError, match="^13 different reports to learn from, expected at least 20: add some to"):
        stage0(texts=reports(9))


def test_a_language_the_labeller_does_not_know_is_said(stage0, capsys):
    texts = [f"Befund: Rundherd im linken Oberlappen; {k} mm. Beurteilung: Rundherd links." for k in range(30)]
    assert (stage0(texts=texts[:24], held_out=texts[24:]) / ADAPTER_FILE).is_file()
    printed = capsys.readouterr().out
    assert "training goes on without key points" in printed and "key points as given" not in printed


def test_the_language_is_that_of_the_tables(stage0, capsys):
    english = [f"Findings: a nodule of {k} mm in the left upper lobe. Impression: nodule." for k in range(80)]
    stage0(texts=english)
    assert "key points, for example: 已知：" in capsys.readouterr().out


def test_ctrl_c_keeps_the_best_so_far(stage0, monkeypatch):
    script = importlib.import_module("scripts.adapt_language_model")
    monkeypatch.setattr(script, "EVERY", 1)
    batch, drawn = script.ReportPairs.batch, []

    def interrupted(self: object, done: float, size: int) -> object:
        drawn.append(1)
        if len(drawn) > 4:
            raise KeyboardInterrupt
        return batch(self, done, size)

    monkeypatch.setattr(script.ReportPairs, "batch", interrupted)
    with pytest.raises(script.Interrupted, match="best adapters so far"):
        stage0("--steps", "9")


def test_the_prompt_holds_the_key_points_of_the_changed_report(small_training):
    script = importlib.import_module("scripts.adapt_language_model")
    source = script.ReportPairs(reports(5), ["Q?"], "zh", 0)
    pairs = [source.draw(1.0) for _ in range(100)]
    assert 2 <= sum(known == "" for known, _, _ in pairs) <= 25
    stated = [(known, text) for known, _, text in pairs if known]
    assert all(known == source.key_points(text) for known, text in stated)
    assert len({known for known, _ in stated}) > 40, "sides, zones and sizes change"


def test_the_reports_of_a_batch_are_of_about_one_length(small_training):
    script = importlib.import_module("scripts.adapt_language_model")
    short, long = "所见：右上肺结节，直径约12mm。", "所见：右上肺结节，直径约12mm。左下肺空洞，直径约30mm。"
    source = script.ReportPairs([short, long] * 4, ["Q?"], "zh", 0)
    drawn = [sorted(source.points(text) for _, _, text in source.batch(1.0, 4)) for _ in range(2 * script.BATCHES)]
    assert all(len(points) == 4 for points in drawn) and {points[0] for points in drawn} == {1, 2}
    for round_ in (drawn[: script.BATCHES], drawn[script.BATCHES :]):
        assert sum(points[0] != points[-1] for points in round_) <= 1


def test_tokens_that_state_something_count_more(small_training):
    script = importlib.import_module("scripts.adapt_language_model")
    config = load_config(small_training / "paths.yaml")
    writer = script.Writer(MambaLM.load(config.mamba_model), config)
    report = "所见：右肺上野见12mm结节，边界清楚。"
    weights = writer.weights(("", "Q?", report), "zh")
    letters = [3 * len(word) for word in ("所见：", "右肺上野", "见")] + [4, 3 * 2, 3 * len("，边界清楚。") + 1]
    assert len(weights) == sum(letters), "bytes, and the end of the text"
    kinds = [1.0, script.STATED_WEIGHT, 1.0, script.STATED_WEIGHT, script.STATED_WEIGHT, 1.0]
    assert weights == [kind for count, kind in zip(letters, kinds, strict=True) for _ in range(count)]
    assert set(writer.weights(("", "Q?", report), None)) == {1.0}


def test_reports_with_few_key_points_come_first(small_training):
    script = importlib.import_module("scripts.adapt_language_model")
    one, two = "所见：右上肺结节，直径约12mm。", "所见：右上肺结节，直径约12mm。左下肺空洞，直径约30mm。"
    source = script.ReportPairs([two, one, two], ["Q?"], "zh", 0)
    assert [source.points(report) for report in source.reports] == [1, 2, 2]
    assert {source.points(source.draw(script.FEW_KEY_POINTS)[2]) for _ in range(30)} == {1}
    assert {source.points(source.draw(script.ALL_REPORTS)[2]) for _ in range(60)} == {1, 2}
