"""From a volume to what the encoder sees, and from samples to a batch."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from config.errors import InputError
from config.schema import build_config
from data.cache import VolumeCache
from data.finding_targets import PromptErrors
from data.imaging.nifti import write_volume
from data.medical_vlm_dataset import CaptionCollator, Draw, MedicalVLMDataset, Sample, encode_answer, encode_prompt
from tests.data.imaging.images import PLAN_2D

END = 256


@pytest.fixture(scope="module")
def tokenizer(small_training: Path) -> PreTrainedTokenizerFast:
    """256 byte tokens and an end."""
    return PreTrainedTokenizerFast.from_pretrained(small_training / "lm")


# ---------------------------------------------------------------- text


def test_prompt_is_cut_and_ends_with_a_line_break(tokenizer):
    [newline] = tokenizer.encode("\n")
    assert encode_prompt(tokenizer, "abc", 128) == [*tokenizer.encode("abc"), newline]
    assert encode_prompt(tokenizer, "abc" * 100, 5) == [*tokenizer.encode("abcab"), newline]
    assert encode_prompt(tokenizer, "", 128) == [newline]


def test_key_points_stand_whole_before_the_question(tokenizer):
    ids = encode_prompt(tokenizer, "abc" * 100, 5, key_points="已知：结节。")
    assert tokenizer.decode(ids) == "已知：结节。abcab\n"


def test_answer_ends_with_end_of_text_unless_it_is_cut(tokenizer):
    assert encode_answer(tokenizer, "abc", 4) == ([*tokenizer.encode("abc"), END], False)
    assert encode_answer(tokenizer, "abc", 3) == ([*tokenizer.encode("abc"), END], False)
    ids, cut = encode_answer(tokenizer, "abc", 2)
    assert cut and ids == tokenizer.encode("ab") and END not in ids


def sample(shape: tuple[int, ...], question: str, answer: str, row: int) -> Sample:
    return Sample(
        torch.full(shape, float(row)), torch.tensor([0.25, 0.75]), torch.full((2, 4), 0.5), question, answer, row
    )


def test_collator_stacks_equal_sizes_and_lists_different_ones(tokenizer):
    collator = CaptionCollator(tokenizer, 128, 1024)
    same = collator([sample((2, 1, 8, 8), "", "a", row) for row in (3, 5)])
    assert same["images"].shape == (2, 2, 1, 8, 8)
    assert same["row"].tolist() == [3, 5] and same["slice_position"].tolist() == [[0.25, 0.75]] * 2
    mixed = collator([sample((2, 1, 8, 8), "", "a", 0), sample((2, 1, 8, 16), "", "a", 1)])
    assert [tuple(image.shape) for image in mixed["images"]] == [(2, 1, 8, 8), (2, 1, 8, 16)]
    assert mixed["slice_position"].shape == (2, 2) and mixed["roi"].shape == (2, 2, 4)


def test_collator_pads_on_the_right_and_masks_the_padding(tokenizer):
    samples = [sample((1, 1, 4, 4), "Why?", "结节", 0), sample((1, 1, 4, 4), "", "Normal lungs.", 1)]
    batch = CaptionCollator(tokenizer, 128, 1024)(samples)
    expected = {"question": ["Why?\n", "\n"], "answer": ["结节<|endoftext|>", "Normal lungs.<|endoftext|>"]}
    for name, texts in expected.items():
        ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
        assert ids.shape == mask.shape and ids.dtype == torch.long
        assert (mask.diff(dim=1) <= 0).all(), "ones, then zeros"
        assert (ids[mask == 0] == 0).all()
        assert [tokenizer.decode(row[keep.bool()]) for row, keep in zip(ids, mask, strict=True)] == texts
        assert mask.sum(1).max() == mask.shape[1], "no longer than the longest"


def test_collator_without_a_tokenizer_gives_images_alone():
    batch = CaptionCollator(None, 128, 1024)([sample((1, 1, 4, 4), "Why?", "a", 0)])
    assert set(batch) == {"images", "slice_position", "roi", "row", "lesions"}


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases of two sizes, one with a lesion mask, and a table; no prompt file."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(0)
    rows = ["image_path,question,answer,mask_path"]
    for case, size in enumerate([(6, 12, 14), (6, 12, 14), (7, 20, 30)]):
        write_volume(folder / f"{case}.nii.gz", rng.integers(-1000, 500, size).astype(np.int16), (5.0, 1.0, 1.0))
        rows.append(f"{case}.nii.gz,{'What?' if case == 0 else ''},Report {case}.,{'m.nii.gz' if case == 1 else ''}")
    mask = np.zeros((6, 12, 14), np.uint8)
    mask[5, 3:6, 3:6] = 1
    write_volume(folder / "m.nii.gz", mask, (5.0, 1.0, 1.0))
    (folder / "prompts.json").write_text('{"caption_prompt": ["Describe it."]}', encoding="utf-8")
    (folder / "train.csv").write_text("\n".join(rows), encoding="utf-8")
    return folder / "train.csv"


def dataset(table: Path, **keys: object) -> MedicalVLMDataset:
    values = {"cache_dir": str(table.parent / "cache"), "caption_prompt_json": str(table.parent / "prompts.json")}
    config = build_config({**values, **keys}, "test")
    cache = VolumeCache(Path(config.cache_dir), PLAN_2D)
    encoder = SimpleNamespace(total_stride=(8, 8), receptive_field_offset=(0.0, 0.0))
    return MedicalVLMDataset.from_config(config, table, cache, encoder, seed=0)


def test_samples_carry_their_row(table):
    cases = dataset(table, slices=2)
    assert len(cases) == 3
    samples = [cases[index] for index in range(3)]
    assert [s.row for s in samples] == [0, 1, 2]
    assert [s.question for s in samples] == ["What?", "Describe it.", "Describe it."]
    assert [s.answer for s in samples] == ["Report 0.", "Report 1.", "Report 2."]
    assert [tuple(s.images.shape) for s in samples] == [(2, 1, 16, 24), (2, 1, 16, 24), (2, 1, 24, 32)]
    assert samples[1].slice_position[-1].item() == pytest.approx(5.5 / 6), "the lesion's slice"


def test_a_row_without_question_needs_prompts_before_any_image_is_read(table):
    with pytest.raises(InputError, match="row 3 .*has no question"):
        dataset(table, caption_prompt_json=None)


def test_spawned_worker_gives_what_the_main_process_gives(table, tokenizer):
    """As on Windows: data set and collator travel by pickle, and nothing is inherited."""
    cases, collator = dataset(table), CaptionCollator(tokenizer, 128, 1024)
    here = list(DataLoader(pickle.loads(pickle.dumps(cases)), batch_size=2, collate_fn=collator))
    there = list(DataLoader(cases, 2, collate_fn=collator, num_workers=1, multiprocessing_context="spawn"))
    assert len(here) == len(there) == 2
    torch.testing.assert_close(there, here, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("megabytes", "reads"), [(0, 6), (64, 3)])
def test_images_once_read_stay_in_memory_as_far_as_there_is_room(table, monkeypatch, megabytes, reads):
    cases = dataset(table, memory_cache_mb=megabytes)
    first = [cases[index].images.clone() for index in range(3)]
    get, count = cases.cache.get, []
    monkeypatch.setattr(cases.cache, "get", lambda *args: (count.append(1), get(*args))[1])
    for _ in range(2):
        samples = [cases[index].images for index in range(3)]
        for sample, expected in zip(samples, first, strict=True):
            assert torch.equal(sample, expected)
            sample += 1  # whoever writes to a sample does not write to what is kept
    assert len(count) == reads - (3 if megabytes else 0)


@pytest.fixture(scope="module")
def chinese(table: Path) -> Path:
    text = table.read_text(encoding="utf-8")
    for case, report in enumerate(
        ("所见：双肺清晰。结论：正常。", "结论：右肺上野结节，约12mm。", "结论：左侧胸腔积液。")
    ):
        text = text.replace(f"Report {case}.", report)
    (table.parent / "chinese.csv").write_text(text, encoding="utf-8")
    return table.parent / "chinese.csv"


def test_targets_are_what_report_and_mask_say_together(chinese, table):
    cases = dataset(chinese)
    cases.findings = ("nodule", "effusion")
    samples = [cases[index] for index in range(3)]
    assert [s.targets.presence for s in samples] == [[0, 0], [1, 0], [0, 1]]
    assert samples[1].targets.side == [1, -100] and samples[2].targets.side == [-100, 0]
    assert len(samples[1].measured) == 1 and samples[1].targets.lesion[0] in (0, 2), "paired, or false"
    batch = CaptionCollator(None, 128, 1024)(samples)
    assert batch["targets"].presence.tolist() == [[0, 0], [1, 0], [0, 1]]
    assert (batch["lesions"][..., -1] > 0).sum(1).tolist() == [0, 1, 0]
    unknown = dataset(table)
    unknown.findings = ("nodule",)
    assert unknown.language is None and unknown[0].targets.presence == [-100]


def test_a_training_prompt_is_the_reports_findings_and_now_and_then_absent(chinese, table, tokenizer):
    cases = dataset(chinese)
    assert {cases[index].key_points for index in range(3)} == {""}, "in validation it comes from the model"
    cases.prompt_errors, cases.prompt_dropout = PromptErrors(), 0.3
    drawn = [cases[Draw(1, epoch)].key_points for epoch in range(200)]
    assert 0.2 < drawn.count("") / 200 < 0.4
    right = [line for line in drawn if line.startswith("已知：右肺上野结节1")]
    assert 100 < len(right) < 200 - drawn.count(""), "mostly the truth, never alone"
    assert set(right) == {"已知：右肺上野结节12mm。"}, "the size as the report states it"
    torch.manual_seed(7)
    assert [cases[Draw(1, epoch)].key_points for epoch in range(200)] == drawn, "whatever else was drawn before"
    batch = CaptionCollator(tokenizer, 128, 1024)([sample((1, 1, 4, 4), "Q", "a", 0)] * 2)
    assert batch["key_point_ids"].shape == (2, 0)
    prompted = dataset(table)
    prompted.prompt_errors = PromptErrors()
    assert prompted[0].key_points == "", "of a language that the labeller does not know"
