"""Probabilities of written reports, and the maps of what they owe to the image."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from config.schema import load_config
from engine.evaluation.attribution import METHODS, _log_probs, attribution_maps, feature_width, smoothed
from engine.evaluation.report_writer import ReportWriter, answer_log_probs, token_spans
from models.language_model.decoding import Decoding
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM, VisionBridge, answer_inputs
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder

WIDTH = 16


def make_lm() -> MambaLM:
    """Random weights, large enough that the text depends on what was read; one token a byte."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=264, hidden_size=WIDTH, num_hidden_layers=2, state_size=4, tie_word_embeddings=False
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        for layer in model.backbone.layers:
            for part in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.conv1d):
                part.weight.mul_(3)
    return MambaLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end), "random")


@pytest.fixture(scope="module")
def model(assets: Path) -> MedicalVLM:
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=2)
    config = load_config(
        None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=8, slices=2, use_cmi=True
    )
    torch.manual_seed(1)
    return MedicalVLM(VisionBridge.build(config, encoder, WIDTH, 1.0, with_cmi=True), make_lm()).eval()


@pytest.fixture(scope="module")
def batch(model: MedicalVLM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    questions = [model.lm.tokenizer.encode(text) for text in ("a\n", "long?\n", "xy\n")]
    ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
    for b, row in enumerate(questions):
        ids[b, : len(row)] = torch.tensor(row)
        mask[b, : len(row)] = 1
    answers = torch.randint(0, 256, (3, 7), generator=generator)
    return {
        "images": torch.randn(3, 2, 1, 64, 64, generator=generator),
        "slice_position": torch.tensor([[0.2, 0.6]] * 3),
        "roi": torch.zeros(3, 2, 4),
        "question_ids": ids,
        "question_mask": mask,
        "answer_ids": answers,
        "answer_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
    }


def test_losses_are_the_training_loss(model: MedicalVLM, batch: dict[str, Tensor]) -> None:
    writer = ReportWriter(model, 5)
    losses = writer.losses(writer.visual(batch), batch)
    total, count = model(batch)
    assert [n for _, n in losses] == [7, 4, 6] and int(count) == 17
    assert sum(nats for nats, _ in losses) == pytest.approx(float(total.detach()), rel=1e-5)


@pytest.mark.parametrize("decoding", [None, Decoding(temperature=1.0)])
def test_log_probs_are_those_of_each_step(
    model: MedicalVLM, batch: dict[str, Tensor], decoding: Decoding | None
) -> None:
    writer = ReportWriter(model, 6)
    visual = writer.visual(batch)
    torch.manual_seed(4)
    written = writer.write(visual, batch, decoding)
    if decoding is None:
        assert [one.text for one in written] == model.generate(batch, 6)
    lm, table = model.lm, model.lm.model.get_input_embeddings()
    for b, one in enumerate(written):
        assert 0 < len(one.ids) == len(one.log_probs) <= 6
        question = batch["question_ids"][b, : int(batch["question_mask"][b].sum())]
        for k in range(len(one.ids)):
            read = torch.cat([visual[b], table(question), table(torch.tensor(one.ids[:k], dtype=torch.long))])
            logits = lm.model(inputs_embeds=read[None], use_cache=False).logits[0, -1, : lm.known_tokens]
            expected = logits.float().log_softmax(-1)
            assert one.log_probs[k] == pytest.approx(float(expected[one.ids[k]]), abs=2e-3)
            if decoding is None:
                assert int(expected.argmax()) == one.ids[k]


def test_an_answer_of_no_token_has_no_probability(model: MedicalVLM, batch: dict[str, Tensor]) -> None:
    empty = {**batch, "answer_ids": torch.zeros(3, 0, dtype=torch.long), "answer_mask": torch.zeros(3, 0)}
    inputs = answer_inputs(model.lm, model.visual_tokens(batch), empty)
    assert [len(values) for values in answer_log_probs(model.lm, *inputs)] == [0, 0, 0]


def test_spans_of_tokens_are_their_characters(model: MedicalVLM) -> None:
    text = "右肺 8mm。"
    ids = model.lm.tokenizer.encode(text)  # one token a byte: three for a Chinese character
    spans = token_spans(model.lm.tokenizer, ids)
    assert spans[:6] == [(0, 1)] * 3 + [(1, 2)] * 3 and spans[6:10] == [(2, 3), (3, 4), (4, 5), (5, 6)]
    assert spans[-1] == (6, 7) and len(spans) == len(ids)
    assert token_spans(model.lm.tokenizer, []) == []


# ------------------------------------------------------------------ maps


@pytest.fixture(scope="module")
def case(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1, :3] if name == "question_ids" else value[:1] for name, value in batch.items()} | {
        "question_mask": batch["question_mask"][:1, :3]
    }


@pytest.fixture(scope="module")
def baseline(model: MedicalVLM, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.vision.features(batch["images"]).mean(0)


IDS = [70, 71, 72, 73]


def whole(model: MedicalVLM, case: dict[str, Tensor], features: Tensor) -> Tensor:
    answer = torch.tensor([IDS])
    with torch.no_grad():
        return _log_probs(model, {**case, "answer_ids": answer, "answer_mask": torch.ones_like(answer)}, features)[0]


def test_integrated_maps_add_up_to_what_the_image_changes(
    model: MedicalVLM, case: dict[str, Tensor], baseline: Tensor
) -> None:
    maps = attribution_maps(model, case, IDS, [[0, 1], [2, 3], [3]], baseline, "integrated", steps=200, chunk=64)
    assert maps.shape == (3, 2, 4, 4)
    with torch.no_grad():
        features = model.vision.features(case["images"])
    change = whole(model, case, features) - whole(model, case, baseline[None])
    expected = torch.stack([change[:2].sum(), change[2:].sum(), change[3]])
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(maps.sum((1, 2, 3)), expected, rtol=0.02, atol=0.01)
    in_parts = attribution_maps(model, case, IDS, [[0, 1], [2, 3], [3]], baseline, "integrated", steps=6, chunk=4)
    at_once = attribution_maps(model, case, IDS, [[0, 1], [2, 3], [3]], baseline, "integrated", steps=6, chunk=6)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-3, atol=1e-4)


def test_evidence_is_what_speaks_for_a_stretch_channel_by_channel(
    model: MedicalVLM, case: dict[str, Tensor], baseline: Tensor
) -> None:
    """Against the definition, one step and one channel at a time; images of 64 voxels, stride 16, in 4 cells."""
    steps = 3
    maps = attribution_maps(model, case, IDS, [[0, 1], [3]], baseline, steps=steps)
    with torch.no_grad():
        features = model.vision.features(case["images"])
    difference = features - baseline
    answer = torch.tensor([IDS])
    inputs = {**case, "answer_ids": answer, "answer_mask": torch.ones_like(answer)}
    for got, positions in zip(maps, ([0, 1], [3]), strict=True):
        mean = torch.zeros_like(features)
        for step in range(steps):
            at = (baseline + (step + 0.5) / steps * difference).requires_grad_()
            (gradient,) = torch.autograd.grad(_log_probs(model, inputs, at)[0][positions].sum(), at)
            mean += gradient / steps
        expected = torch.zeros(2, 4, 4)
        for channel in range(features.shape[2]):
            part = (mean * difference)[0, :, channel]
            expected += torch.where(part > 0, part, 0.0)
        assert expected.max() > 1e-4
        width = feature_width(model.vision.encoder, case["images"], (4, 4))
        torch.testing.assert_close(got, smoothed(expected, width), rtol=1e-3, atol=1e-6)
    assert maps.min() >= 0


def test_a_map_is_smoothed_by_the_extent_of_one_feature(model: MedicalVLM) -> None:
    """Pooled to half as many cells, a feature is half a cell wide."""
    encoder, images = model.vision.encoder, torch.zeros(1, 2, 1, 64, 96)
    stride = encoder.total_stride[-1]
    assert feature_width(encoder, images, (64 // stride, 96 // stride)) == (1, 1)
    assert feature_width(encoder, [images[0]], (32 // stride, 96 // stride)) == (0.5, 1)
    heat = torch.zeros(2, 9, 9)
    heat[0, 4, 4] = 1
    blurred = smoothed(heat, (1.0, 0.5))
    assert blurred[1].abs().max() == 0, "slices do not mix"
    assert blurred[0].argmax() == 4 * 9 + 4 and float(blurred.sum()) == pytest.approx(1, abs=1e-4)
    assert blurred[0, 5, 4] / blurred[0, 4, 4] == pytest.approx(0.6065, abs=1e-3)  # exp(-1/2)
    assert blurred[0, 4, 5] < blurred[0, 5, 4]
    assert torch.equal(smoothed(torch.ones(1, 5, 5), (2.0, 2.0)), torch.ones(1, 5, 5)), "also at the border"


def test_occlusion_is_the_fall_for_each_cell(model: MedicalVLM, case: dict[str, Tensor], baseline: Tensor) -> None:
    maps = attribution_maps(model, case, IDS, [[0, 1], [3]], baseline, "occlusion", chunk=5)
    with torch.no_grad():
        features = model.vision.features(case["images"])
    full = whole(model, case, features)
    for k, i, j in ((0, 0, 0), (1, 2, 3), (1, 3, 0)):
        hidden = features.clone()
        hidden[0, k, :, i, j] = baseline[k, :, i, j]
        fall = full - whole(model, case, hidden)
        torch.testing.assert_close(maps[:, k, i, j], torch.stack([fall[:2].sum(), fall[3]]), rtol=1e-3, atol=1e-4)


def test_the_baseline_itself_has_an_empty_map(model: MedicalVLM, case: dict[str, Tensor]) -> None:
    with torch.no_grad():
        own = model.vision.features(case["images"])[0]
    for method in METHODS:
        assert attribution_maps(model, case, IDS, [[0]], own, method).abs().max() < 1e-4
    assert attribution_maps(model, case, IDS, [], own).shape == (0, 2, 4, 4)
    with pytest.raises(ValueError, match="method 'saliency'"):
        attribution_maps(model, case, IDS, [[0]], own, "saliency")
