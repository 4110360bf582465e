"""What the language model reaches on the reports alone, and the line about a caption loss far above it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from data.medical_vlm_dataset import CaptionCollator, encode_answer
from data.report_language.key_points import key_points_of
from engine.training.text_loss import far_above, text_loss
from models.medical_vlm import MedicalVLM
from tests.models.language_model.tiny import sharp_lm

ZH = "所见：右肺上野见结节，大小约12mm。结论：右肺上野结节。"


def table(reports: list[str], language: str | None) -> SimpleNamespace:
    """What is read of a data set."""
    stated = [key_points_of(report, language) if language else [] for report in reports]
    rows = [SimpleNamespace(answer=report) for report in reports]

    class Data(SimpleNamespace):
        def __len__(self) -> int:
            return len(self.rows)

    return Data(rows=rows, questions=["问？"] * len(rows), language=language, stated=stated)


def flags(config: str | None = None, rank: int = 0) -> argparse.Namespace:
    return argparse.Namespace(config=Path(config) if config else None, lora_rank=rank)


def test_the_loss_is_that_of_the_report_after_its_key_points(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, from the model's own logits; no image, and the same for a second copy of the report."""
    lm = sharp_lm()
    model = MedicalVLM(torch.nn.Identity(), lm)
    value = text_loss(Accelerator(cpu=True), model, table([ZH] * 2, "zh"), CaptionCollator(lm.tokenizer, 16, 400))
    answer = encode_answer(lm.tokenizer, ZH, 400)[0]
    prompt = lm.tokenizer.encode("已知：右肺上野结节12mm。问？\n", add_special_tokens=False)
    logits = lm.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1, : lm.known_tokens]
    expected = torch.nn.functional.cross_entropy(logits.float(), torch.tensor(answer)).item()
    assert value == pytest.approx(expected, rel=1e-4) and value > 3
    assert "language model on 2 validation reports, from their true key points" in capsys.readouterr().out


def test_a_language_without_key_points_is_not_measured() -> None:
    assert text_loss(Accelerator(cpu=True), None, table(["Bericht"], None), None) is None


def test_only_some_reports_are_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("engine.training.text_loss.REPORTS", 2)
    lm = sharp_lm()
    model, data = MedicalVLM(torch.nn.Identity(), lm), table(["结论：右肺结节。"] * 3, "zh")
    text_loss(Accelerator(cpu=True), model, data, CaptionCollator(lm.tokenizer, 8, 8))
    assert "language model on 2 validation reports" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("caption", "text", "rank", "said"),
    [
        (4.3, 4.1, 0, "not learnt to write such reports (4.10 even from their true key points); run Stage 0"),
        (4.3, 4.1, 0, "or train with --lora_rank 16"),
        (2.8, 2.0, 8, "run Stage 0"),  # within a nat of what it reaches on text: the image is not the cause
        (5.6, None, 0, "has not learnt to write such reports; run Stage 0"),
        (3.0, 0.2, 0, "reaches 0.20, from these visual tokens it does not; train longer"),
        (1.4, 0.2, 0, "train longer"),
        (math.nan, 0.2, 0, ""),
        (2.4, 4.1, 0, ""),  # Stage 2 taught it
        (0.9, 0.2, 0, ""),
        (2.4, None, 0, ""),
    ],
)
def test_cause_and_next_command(caption: float, text: float | None, rank: int, said: str) -> None:
    line = far_above(caption, text, flags(rank=rank))
    assert (said in line and line.startswith(f"warning: caption loss {caption:.2f}")) if said else not line
    assert "--lora_rank" not in line if rank else True


def test_the_command_names_the_configuration() -> None:
    assert "python scripts/adapt_language_model.py --config my.yaml  " in far_above(4.0, 4.0, flags("my.yaml"))
    assert "python scripts/adapt_language_model.py  " in far_above(4.0, 4.0, flags())
