"""Where the model looked: what a stretch of its report owes to each cell of the encoder's feature grid.

    features [1, K, C, T, T] → bridge → (CMI) → Mamba → Σ log p(tokens of the stretch) → map [K, T, T]

All ways compare the image with a baseline, the mean features of many cases. ``integrated``: the gradient,
averaged over the way from the baseline to the image, times their difference, summed over channels (integrated
gradients, Sundararajan et al. 2017): the values of a map add up to what the image changes, and are positive where it
speaks for the stretch. ``occlusion``: one cell after the other is replaced by the baseline's, and the fall of the
log-probability is its value (Zeiler & Fergus 2014).

``evidence``, the default: of the same integrated gradients what speaks for the stretch, channel by channel, and not
what is left when channels of one cell speak against each other; then a Gaussian with a deviation of one feature,
because a feature sees much more than its cell and what shows a small lesion is spread over its neighbours. How often
the peak of each lies on the lesion is in ``docs/evaluation.md``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from engine.evaluation.report_writer import answer_log_probs
from models.medical_vlm import MedicalVLM, answer_inputs
from models.nnunet.encoder import NnUNetEncoder

METHODS = ("evidence", "integrated", "occlusion")
STEPS = 8


def attribution_maps(
    model: MedicalVLM,
    batch: Mapping[str, Any],
    ids: Sequence[int],
    stretches: Sequence[Sequence[int]],
    baseline: Tensor,
    method: str = METHODS[0],
    *,
    steps: int = STEPS,
    chunk: int = 8,
) -> Tensor:
    """Maps (S, K, T, T), float32 on the CPU, one for each of S stretches of one report.

    Args:
        batch: of one case: ``images``, ``slice_position``, ``roi``, ``question_ids``, ``question_mask``.
        ids: tokens of the report.
        stretches: positions in ``ids``.
        baseline: (K, C, T, T), the mean features of many cases.
        method: one of ``METHODS``.
        steps: points of the way at which the gradient is taken.
        chunk: copies of the case that are read at a time.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    with torch.no_grad():
        features = model.vision.features(batch["images"])
    answer = torch.tensor([list(ids)], dtype=torch.long, device=features.device)
    case = {**batch, "answer_ids": answer, "answer_mask": torch.ones_like(answer)}
    baseline = baseline[None].to(features)
    if not stretches:
        return torch.zeros(0, *_grid(features))
    if method == "occlusion":
        return _occlusion(model, case, features, baseline, stretches, chunk)
    parts = _integrated(model, case, features, baseline, stretches, steps, chunk)
    if method == "integrated":
        return torch.stack([part.sum(1) for part in parts])
    width = feature_width(model.vision.encoder, batch["images"], _grid(features)[1:])
    return torch.stack([smoothed(part.clamp(min=0).sum(1), width) for part in parts])


def feature_width(
    encoder: NnUNetEncoder, images: Tensor | Sequence[Tensor], grid: tuple[int, int]
) -> tuple[float, float]:
    """Extent of one feature of the encoder's stage, (rows, columns), in cells of the ``grid`` it is pooled to."""
    image = images if isinstance(images, Tensor) else images[0]
    axes = zip(encoder.total_stride[-2:], grid, image.shape[-2:], strict=True)
    rows, columns = (stride * cells / extent for stride, cells, extent in axes)
    return rows, columns


def smoothed(heat: Tensor, width: tuple[float, float]) -> Tensor:
    """(K, T, U) under a Gaussian in plane, of deviations ``width`` in cells; the border repeats its last cell."""
    return torch.from_numpy(gaussian_filter(heat.numpy(), (0, *width), mode="nearest"))


def _integrated(
    model: MedicalVLM,
    case: Mapping[str, Any],
    features: Tensor,
    baseline: Tensor,
    stretches: Sequence[Sequence[int]],
    steps: int,
    chunk: int,
) -> list[Tensor]:
    """Of each stretch (K, C, T, T), float32 on the CPU: what each channel of each cell contributes."""
    difference = features - baseline
    total = [torch.zeros_like(features[0]) for _ in stretches]
    for part in ((torch.arange(steps, device=features.device) + 0.5) / steps).split(chunk):
        points = (baseline + part.to(features)[:, None, None, None, None] * difference).requires_grad_()
        log_probs = torch.stack(_log_probs(model, case, points))  # (chunk, tokens)
        for number, positions in enumerate(stretches):
            kept = number + 1 < len(stretches)
            (gradient,) = torch.autograd.grad(log_probs[:, list(positions)].sum(), points, retain_graph=kept)
            total[number] += gradient.sum(0) / steps
    return [(mean * difference[0]).float().cpu() for mean in total]


@torch.no_grad()
def _occlusion(
    model: MedicalVLM,
    case: Mapping[str, Any],
    features: Tensor,
    baseline: Tensor,
    stretches: Sequence[Sequence[int]],
    chunk: int,
) -> Tensor:
    K, T, U = _grid(features)
    whole = _log_probs(model, case, features)[0]
    falls = []
    for cells in torch.arange(K * T * U).split(chunk):
        copies = features.repeat(len(cells), 1, 1, 1, 1)
        for b, cell in enumerate(cells.tolist()):
            k, i, j = cell // (T * U), cell // U % T, cell % U
            copies[b, k, :, i, j] = baseline[0, k, :, i, j]
        falls += [whole - values for values in _log_probs(model, case, copies)]
    fall = torch.stack(falls)  # (cells, tokens)
    return torch.stack([fall[:, list(positions)].sum(1).view(K, T, U).float().cpu() for positions in stretches])


def _log_probs(model: MedicalVLM, case: Mapping[str, Any], features: Tensor) -> list[Tensor]:
    """Of the report's tokens, for each of B copies of the case."""
    B = features.shape[0]
    names = ("slice_position", "question_ids", "question_mask", "answer_ids", "answer_mask")
    copies = {name: case[name].expand(B, -1) for name in names}
    roi = case["roi"].expand(B, -1, -1)
    question = model.lm.embed(copies["question_ids"]).float()
    visual = model.vision.tokens(features, copies["slice_position"], question, copies["question_mask"], roi=roi)
    return answer_log_probs(model.lm, *answer_inputs(model.lm, visual, copies))


def _grid(features: Tensor) -> tuple[int, int, int]:
    return features.shape[1], features.shape[3], features.shape[4]
