"""The quick start's own logic; the chain itself is run by hand, as the README says."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest
import torch

from config.schema import load_config
from data.general_text import ChineseParagraphs, python_files
from engine import chain

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of scripts/ the way ``python scripts/x.py`` finds it."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def test_its_configuration_is_valid_and_every_command_has_flags_that_exist(script, parse, tmp_path: Path) -> None:
    for from_scratch in (False, True):
        steps = script("quickstart").plan(tmp_path, 7, from_scratch)
        config = load_config(tmp_path / "paths.yaml")
        for key in ("caption_csv_train", "cache_dir", "output_dir"):
            assert Path(getattr(config, key)).is_relative_to(tmp_path)
        for key in ("nnunet_encoder_checkpoint", "mamba_model", "language_model_adapters"):
            assert Path(getattr(config, key)).is_relative_to(tmp_path) == from_scratch
        assert len(steps) == 4 + 3 * from_scratch
        for step in steps:
            assert parse(step.command).seed == 7


def test_summary_holds_what_the_report_card_measured(script, tmp_path: Path, card: dict) -> None:
    quickstart = script("quickstart")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "report_card.json").write_text(json.dumps(card), encoding="utf-8")
    reports = "image_path,reference,generated\na.nii.gz,一,二\n"
    (tmp_path / "card" / "reports.csv").write_text(reports, encoding="utf-8-sig")
    steps = [chain.Step("stage2", "title", [], steps=10), chain.Step("scores", "title", [])]
    quickstart.summarise(tmp_path, steps, {"stage2": 5.0, "scores": 1.0}, seed=3)
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    names = ("location_acc", "type_acc", "size_within_4mm", "exact_acc", "garbled_rate", "normal_false_finding_rate")
    assert {*names, "n", "shuffled_images", "baselines", "seed", "seconds", "seconds_total"} <= set(written)
    assert written["exact_acc"] == 0.5 and written["shuffled_images"]["exact_acc"] == 0.25 and written["n"] == 4
    assert written["seconds_per_step"] == {"stage2": 0.5} and written["seconds_total"] == 6.0
    kept = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert kept["cases"] == [{"image_path": "a.nii.gz", "reference": "一", "generated": "二"}]


def test_small_lesions_count_as_much_as_large_ones(script) -> None:
    """The loss of a slice is the mean over its lesion's cells, so its area does not matter."""
    loss = script("make_tiny_nnunet").balanced_entropy
    losses = []
    for side in (2, 10):
        label = torch.zeros(1, 16, 16, dtype=torch.long)
        label[0, :side, :side] = 3
        share = torch.nn.functional.one_hot(label, 8).movedim(-1, 1).float()
        losses.append(loss(torch.zeros(1, 8, 16, 16), share).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert loss(torch.where(share > 0, 50.0, 0.0), share) < 1e-3


def tokenizer_of(make_tiny_lm, language: str, texts: int = 400, vocabulary: int = 1200):
    source = make_tiny_lm.ReportTexts(language, 1, seed=0)
    return make_tiny_lm.train_tokenizer(["\n".join(source.draw()) for _ in range(texts)], vocabulary, source.alone)


def test_tiny_tokenizer_gives_every_text_back(script) -> None:
    tokenizer = tokenizer_of(script("make_tiny_lm"), "zh", 50, 400)
    for text in ("所见：右肺上野见12mm结节。", "unseen words, 未见过的字 ✓"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("zh", "考虑左肺上野空洞，约27mm", ("左", "上", "空洞", "27")),
        ("en", "A 27 mm cavity in the left upper lung zone", ("27", " cavity", " left", " upper")),
    ],
)
def test_what_reports_differ_in_is_one_token_each(script, language: str, text: str, words: tuple[str, ...]) -> None:
    tokenizer = tokenizer_of(script("make_tiny_lm"), language)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert [word for word in words if word not in pieces] == []


def test_embeddings_of_near_numbers_start_alike(script) -> None:
    make_tiny_lm = script("make_tiny_lm")
    tokenizer = tokenizer_of(make_tiny_lm, "zh")
    model = make_tiny_lm.build_model(argparse.Namespace(width=192, layers=1), tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    make_tiny_lm.order_numbers(model, tokenizer, torch.Generator().manual_seed(0))
    table = model.get_input_embeddings().weight.detach()
    row = {n: tokenizer.encode(str(n))[0] for n in (20, 21, 40)}
    similarity = torch.nn.functional.cosine_similarity
    near, far = (similarity(table[row[20]], table[row[other]], dim=0) for other in (21, 40))
    assert near > 0.9 > 0.3 > far.abs()
    changed = (table != before).any(1).nonzero().flatten().tolist()
    assert all(tokenizer.decode([token]).isdigit() for token in changed)
    assert table[row[20]].std().item() == pytest.approx(before.std().item(), rel=0.2)


def test_general_text_is_no_report_and_its_numbers_are_one_token_below_100(script) -> None:
    make_tiny_lm = script("make_tiny_lm")
    paragraphs = ChineseParagraphs(0)
    texts = [paragraphs.draw() for _ in range(300)]
    assert ChineseParagraphs(0).draw() == texts[0]
    assert "class _Feature" in next(python_files())  # of __future__.py
    assert not any(word in text for text in texts for word in ("肺", "结节", "胸", "CT", "诊断", "所见"))
    tokenizer = make_tiny_lm.train_tokenizer(texts, 800, make_tiny_lm.GeneralText.alone)
    text = "约127mm，左上方的红色帽子"
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert pieces[1:4] == ["12", "7", "mm"] and {"左", "上", "方"} <= set(pieces)
