"""The evaluation end to end on a random model and phantoms: files, keys, and a second start that adds nothing."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import load_config
from data.phantom.dataset import DatasetPaths, make_dataset
from data.phantom.finding import FINDING_TYPES
from engine.checkpoint import save_checkpoint
from engine.evaluation.report_writer import Report, ReportWriter
from models.language_model.identity import lm_identity
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder
from tests.models.language_model.tiny import byte_tokenizer, random_mamba

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate_reports.py"
LABELS = [f"{value}={name}" for value, name in enumerate(FINDING_TYPES) if value]
PROMISED = (
    "language findings.macro_f1 findings.chance location_acc size_within_3mm audit.shuffled.macro_f1 "
    "audit.blank.macro_f1 audit.normal_false_finding_rate audit.duplicate_rate audit.verdict confidence.ece "
    "pointing_game"
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> tuple[Path, DatasetPaths]:
    root = tmp_path_factory.mktemp("desk")
    data = make_dataset(root / "data", 0, 3, 6, seed=3, workers=1, normal_share=0.3)
    byte_tokenizer(pad_token=None).save_pretrained(root / "lm")
    random_mamba(vocab_size=257, hidden_size=16, num_hidden_layers=2, state_size=4).save_pretrained(root / "lm")
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    config = load_config(
        None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=4,
        mamba_model=str(root / "lm"), cache_dir=str(root / "cache"), caption_csv_train=str(data.val_csv),
        caption_csv_val=str(data.val_csv), caption_prompt_json=str(data.prompt_json), slice_policy="mask",
        mamba_dtype="bfloat16",  # as on a GPU
    )  # fmt: skip
    torch.manual_seed(1)
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=1)
    vision = VisionBridge.build(config, encoder, 16, 0.5, with_cmi=False)
    diagnostics = {"token_std": 0.5, "image_std": 0.5, "effective_rank": 3.0, "expected_std": 0.5, "collapsed": False}
    save_checkpoint(
        root / "vlm.pt", vision, stage="vlm", step=1, epoch=1, val_loss=1.0, config=config,
        plan=PreprocessPlan.from_nnunet(source.plans, source.configuration),
        llm=lm_identity(str(root / "lm")).to_dict(), diagnostics=diagnostics,
    )  # fmt: skip
    return root, data


@pytest.fixture
def evaluate(desk: tuple[Path, DatasetPaths], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    root, data = desk
    spec = importlib.util.spec_from_file_location("evaluate_reports", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(out: str, *flags: str) -> Path:
        command = [SCRIPT, "--checkpoint", root / "vlm.pt", "--csv", data.test_csv, "--out", root / out]
        monkeypatch.setattr(sys, "argv", [*map(str, command), "--max_new_tokens", "12", "--batch_size", "4", *flags])
        script.main()
        return root / out

    return run


def read_card(out: Path) -> dict:
    return json.loads((out / "report_card.json").read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0)


def test_a_random_model_from_end_to_end(
    evaluate: Callable[..., Path], desk: tuple[Path, DatasetPaths], capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluate("card", "--mask_labels", *LABELS, "--samples", "1", "--maps", "2")
    card = read_card(out)
    for name in PROMISED.split():
        value = card
        for key in name.split("."):
            value = value[key]
    assert card["cases"] == 6 and card["findings"]["macro_f1"] == 0 and card["audit"]["verdict_code"] == "unclear"
    assert card["text"]["cut_at_limit"] == 1, "a random model does not end in 12 tokens"
    assert card["pointing_game"] is None and card["mask"]["references"]["side_acc"]["value"] == 1
    page = (out / "report_card.html").read_text(encoding="utf-8")
    assert page.count("<div class='card case'>") == 6 and page.count("<div class='card tile'>") == 5
    assert page.index("too few cases") < page.index("class='card tile'") < page.index("class='card case'")
    assert page.index("class='card case'") < page.index("<details>") and page.count("<details>") == page.count(
        "<summary>"
    )
    assert "too few cases" in page and not re.search(r"(src|href)=['\"](?!data:)", page)
    assert "| finding | in references |" in (out / "report_card.md").read_text(encoding="utf-8")
    with (out / "reports.csv").open(encoding="utf-8-sig", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 6
    printed = capsys.readouterr().out
    assert "verdict: too few cases" in printed and "baseline nearest: macro-F1 " in printed
    assert set(card["baselines"]) == {"nearest", "lookup", "frequent"}
    assert card["baselines_note"] == f"3 training cases of {desk[1].val_csv}"
    assert card["baselines"]["frequent"]["whole_reports"]["garbled_rate"]["value"] == 0
    assert card["findings"]["crg"]["value"] == 1 / 3, "a random model states nothing"

    before = {path: path.read_bytes() for path in out.glob("generations-*.jsonl")}
    again = evaluate("card", "--mask_labels", *LABELS, "--samples", "1", "--maps", "2")
    assert {path: path.read_bytes() for path in again.glob("generations-*.jsonl")} == before
    assert read_card(again) == card


def test_maps_of_true_reports_are_written_in_the_space_of_the_scan(
    evaluate: Callable[..., Path], desk: tuple[Path, DatasetPaths], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a writer that is given the reference of every image, as if it had recognised it."""
    _, data = desk
    with data.test_csv.open(encoding="utf-8", newline="") as stream:
        reports = [row["answer"] for row in csv.DictReader(stream)]

    def write(writer: ReportWriter, visual: torch.Tensor, batch: dict, *_: object, **__: object) -> list[Report]:
        rows = batch["row"].tolist() if "row" in batch else [0] * len(visual)
        written = [(reports[row % len(reports)], writer.tokenizer.encode(reports[row % len(reports)])) for row in rows]
        return [Report(text, ids, [-0.01] * len(ids)) for text, ids in written]

    monkeypatch.setattr(ReportWriter, "write_prompted", write)
    out = evaluate("true", "--mask_labels", *LABELS, "--same_finding", "miliary=tree_in_bud")
    card = read_card(out)
    assert card["findings"]["macro_f1"] == 1 and card["location_acc"] == 1 and card["size_within_3mm"] == 1
    assert card["audit"]["normal_false_finding_rate"] == 0 and card["audit"]["normal_cases"] == 2
    assert card["mask"]["reports"]["size_within_3mm"]["value"] == 1
    assert card["pointing"]["n"] == 4 and not card["pointing"]["not_played"]
    maps = sorted((out / "maps").glob("*.nii.gz"))
    assert len(maps) == len(list((out / "maps").glob("*.png"))) == 4
    for path in maps:
        row = int(path.name[4:8])
        scan, heat = nib.load(data.root / "images" / f"test_{row:04d}.nii.gz"), nib.load(path)
        assert heat.shape == scan.shape and np.allclose(heat.affine, scan.affine)
        assert np.abs(heat.get_fdata()).any((0, 1)).sum() == 1  # the one slice that the model was shown
    page = (out / "report_card.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * 4 + 2, (
        "maps at the top and below, reliability, risk and coverage"
    )


def test_more_cases_keep_what_was_generated(evaluate: Callable[..., Path]) -> None:
    few = evaluate("growing", "--limit", "3", "--maps", "0", "--pointing_cases", "0")
    [path] = few.glob("generations-*.jsonl")
    before = path.read_text(encoding="utf-8").splitlines()
    evaluate("growing", "--maps", "0", "--pointing_cases", "0")
    after = path.read_text(encoding="utf-8").splitlines()
    assert after[: len(before)] == before
    own = [json.loads(line) for line in after[len(before) :] if '"own"' in line]
    assert [record["row"] for record in own] == [3, 4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--abstain_below", "2"], "--abstain_below 2.0: expected a confidence from 0 to 1"),
        (["--samples", "-1"], "--samples -1: expected a whole number from 0 on"),
        (["--mask_labels", "1=tumour"], "--mask_labels 1=tumour: expected N=FINDING"),
        (["--mask_labels", "none.json"], "--mask_labels none.json: expected nnU-Net's dataset.json"),
        (["--same_finding", "miliary"], "--same_finding miliary: expected A=B, each one of"),
        (["--same_finding", "miliary=tumour"], "--same_finding miliary=tumour: expected A=B"),
        (["--pointing_cases", "-1"], "--pointing_cases -1: expected a whole number from 0 on"),
        (["--csv", "none.csv"], "--csv not found: none.csv"),
        (["--calibration_csv", "none.csv"], "--calibration_csv not found: none.csv"),
        (["--limit", "1"], "images cannot be shuffled between patients"),
    ],
)
def test_what_cannot_be_used_is_said_before_a_model_is_loaded(
    evaluate: Callable[..., Path], flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MambaLM, "load", lambda *_, **__: pytest.fail("it has started"))
    with pytest.raises(InputError, match=re.escape(message)):
        evaluate("bad", *flags)
