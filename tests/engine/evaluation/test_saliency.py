"""Attribution maps against their definitions, and the pointing game."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.evaluation.saliency import METHODS, ReportLikelihood, attribution_maps, feature_width, smoothed
from models.medical_vlm import MedicalVLM

IDS = [70, 71, 72, 73]


@pytest.fixture(scope="module")
def report(model: MedicalVLM, batch: dict[str, Tensor]) -> ReportLikelihood:
    case = {name: value[:1, :3] if name.startswith("question") else value[:1] for name, value in batch.items()}
    return ReportLikelihood(model, case, IDS)


@pytest.fixture(scope="module")
def baseline(model: MedicalVLM, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.vision.features(batch["images"]).mean(0)


@torch.no_grad()
def log_probs(report: ReportLikelihood, features: Tensor) -> Tensor:
    return report(features[None])[0]


def test_integrated_maps_add_up_to_what_the_image_changes(report: ReportLikelihood, baseline: Tensor) -> None:
    spans = [[0, 1], [2, 3], [3]]
    maps = attribution_maps(report, spans, baseline, "integrated", steps=200, chunk=64)
    assert maps.shape == (3, 2, 4, 4)
    change = log_probs(report, report.features) - log_probs(report, baseline)
    expected = torch.stack([change[span].sum() for span in spans])
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(maps.sum((1, 2, 3)), expected, rtol=0.02, atol=0.01)
    in_parts, at_once = (
        attribution_maps(report, spans, baseline, "integrated", steps=6, chunk=chunk) for chunk in (4, 6)
    )
    torch.testing.assert_close(in_parts, at_once, rtol=1e-3, atol=1e-4)


def test_evidence_is_what_speaks_for_a_span_channel_by_channel(report: ReportLikelihood, baseline: Tensor) -> None:
    """Against the definition, one step at a time; images of 64 voxels, stride 16, in 4 cells."""
    steps, spans = 3, ([0, 1], [3])
    maps = attribution_maps(report, spans, baseline, "evidence", steps=steps)
    difference = report.features - baseline
    for got, positions in zip(maps, spans, strict=True):
        mean = torch.zeros_like(difference)
        for step in range(steps):
            at = (baseline + (step + 0.5) / steps * difference).requires_grad_()
            (gradient,) = torch.autograd.grad(report(at[None])[0, positions].sum(), at)
            mean += gradient / steps
        expected = (mean * difference).clamp(min=0).sum(1)
        assert expected.max() > 1e-4
        width = feature_width(report.model.vision.encoder, report.batch["images"], (4, 4))
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


def test_occlusion_is_the_fall_for_each_cell(report: ReportLikelihood, baseline: Tensor) -> None:
    maps = attribution_maps(report, [[0, 1], [3]], baseline, "occlusion", chunk=5)
    for k, i, j in ((0, 0, 0), (1, 2, 3), (1, 3, 0)):
        hidden = report.features.clone()
        hidden[k, :, i, j] = baseline[k, :, i, j]
        fall = log_probs(report, report.features) - log_probs(report, hidden)
        torch.testing.assert_close(maps[:, k, i, j], torch.stack([fall[:2].sum(), fall[3]]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_baseline_itself_has_an_empty_map(report: ReportLikelihood, method: str) -> None:
    assert attribution_maps(report, [[0]], report.features, method).abs().max() < 1e-4
    assert attribution_maps(report, [], report.features, method).shape == (0, 2, 4, 4)


@pytest.mark.parametrize("method", METHODS)
def test_a_lesion_of_the_prompt_counts_where_it_lies(
    model: MedicalVLM, batch: dict[str, Tensor], report: ReportLikelihood, baseline: Tensor, method: str
) -> None:
    def prompted(*ids: int) -> dict[str, Tensor]:
        prompt = torch.tensor([ids], dtype=torch.long)
        return {**report.batch, "key_point_ids": prompt, "key_point_mask": torch.ones_like(prompt)}

    full, spans = prompted(80, 81, 82), [[0, 1], [3]]
    whole = ReportLikelihood(model, full, IDS, [prompted(80), prompted(80, 81)])
    lesions = torch.zeros(2, 2, 4, 4)
    lesions[0, 0, 1, 1:3], lesions[1, 1, 3, 0] = 0.5, 1.0
    plain = attribution_maps(ReportLikelihood(model, full, IDS), spans, baseline, method)
    added = attribution_maps(whole, spans, baseline, method, lesions) - plain
    with torch.no_grad():
        falls = whole(whole.features[None]) - torch.cat(
            [ReportLikelihood(model, one, IDS)(whole.features[None]) for one in (prompted(80), prompted(80, 81))]
        )
    of_spans = torch.stack([falls[:, span].sum(1) for span in spans], 1)
    of_spans = of_spans.clamp(min=0) if method == "evidence" else of_spans
    expected = torch.einsum("ms,mkij->skij", of_spans, lesions)
    if method == "evidence":
        width = feature_width(model.vision.encoder, full["images"], (4, 4))
        expected = torch.stack([smoothed(heat, width) for heat in expected])
    assert falls.abs().min() > 1e-4, "the prompt must matter"
    torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-5)
