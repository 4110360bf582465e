"""Attribution maps against their definitions, and the pointing game."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.evaluation.saliency import METHODS, ReportLikelihood, attribution_maps, feature_width, smoothed
from models.medical_vlm import MedicalVLM


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
    with torch.no_grad():
        return ReportLikelihood(model, case, IDS)(features)[0]


def test_integrated_maps_add_up_to_what_the_image_changes(
    model: MedicalVLM, case: dict[str, Tensor], baseline: Tensor
) -> None:
    spans = [[0, 1], [2, 3], [3]]
    maps = attribution_maps(model, case, IDS, spans, baseline, "integrated", steps=200, chunk=64)
    assert maps.shape == (3, 2, 4, 4)
    with torch.no_grad():
        features = model.vision.features(case["images"])
    change = whole(model, case, features) - whole(model, case, baseline[None])
    expected = torch.stack([change[span].sum() for span in spans])
    assert expected.abs().min() > 1e-3
    torch.testing.assert_close(maps.sum((1, 2, 3)), expected, rtol=0.02, atol=0.01)
    in_parts, at_once = (
        attribution_maps(model, case, IDS, spans, baseline, "integrated", steps=6, chunk=chunk) for chunk in (4, 6)
    )
    torch.testing.assert_close(in_parts, at_once, rtol=1e-3, atol=1e-4)


def test_evidence_is_what_speaks_for_a_span_channel_by_channel(
    model: MedicalVLM, case: dict[str, Tensor], baseline: Tensor
) -> None:
    """Against the definition, one step and one channel at a time; images of 64 voxels, stride 16, in 4 cells."""
    steps = 3
    maps = attribution_maps(model, case, IDS, [[0, 1], [3]], baseline, steps=steps)
    with torch.no_grad():
        features = model.vision.features(case["images"])
    difference, likelihood = features - baseline, ReportLikelihood(model, case, IDS)
    for got, positions in zip(maps, ([0, 1], [3]), strict=True):
        mean = torch.zeros_like(features)
        for step in range(steps):
            at = (baseline + (step + 0.5) / steps * difference).requires_grad_()
            (gradient,) = torch.autograd.grad(likelihood(at)[0, positions].sum(), at)
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
