"""Saliency maps of a report's sentences on the encoder's feature grid, and the pointing game against the mask.

    features [1, K, C, T, T] → bridge → (CMI) → Mamba → Σ log p(tokens of the span) → map [K, T, T]

All methods compare the image with a baseline, the mean features of many cases:

``integrated``: integrated gradients (Sundararajan et al. 2017), summed over channels: they add up to the change that
the image makes; a positive value supports the span.

``evidence``, the default: the positive integrated gradients of single channels, summed, then smoothed by a Gaussian
whose standard deviation is the extent of one feature, because its receptive field is much larger than its cell.

``occlusion``: the fall of the log-probability when a cell has the baseline's features (Zeiler & Fergus 2014).

A report is also written from the findings prompt, which says what was measured on the segmentation. For a measured
lesion the fall of the span's log-probability is taken when the lesion is left out of the prompt, in the same unit,
and is spread over the cells that hold the lesion, by voxels. It is added to every map.

The pointing game (Zhang et al. 2018): a map hits where its maximum lies in a cell that holds voxels of the lesion that
the sentence states. Sentences about a lesion that is not there, or that the model was not shown, are not played.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from data.cache import CachedVolume
from data.findings import FindingRecord
from data.imaging.reader import read_mask, read_volume, write_on_grid
from data.imaging.volume import turned
from data.report_language.sections import split_sentences
from engine.evaluation.conditions import OWN, ReportPasses
from engine.evaluation.confidence import Statement, touches
from engine.evaluation.heat_maps import ViewGrid, draw_heat
from engine.evaluation.localisation import MaskedCase, agreement
from engine.evaluation.report_writer import answer_log_probs, token_spans
from engine.findings_prompt import with_key_points
from models.medical_vlm import MedicalVLM
from models.nnunet.encoder import NnUNetEncoder

METHODS = ("evidence", "integrated", "occlusion")
STEPS = 8
CHUNK = 8  # copies of a case in one forward pass, where the memory allows it
Spans = Sequence[Sequence[int]]  # of tokens: positions in a report
Batch = Mapping[str, Any]
_READ = (
    "slice_position", "roi", "question_ids", "question_mask", "key_point_ids", "key_point_mask",
    "answer_ids", "answer_mask",
)  # fmt: skip


def map_case(
    passes: ReportPasses, row: int, stated: list[Statement], masked: MaskedCase | None, method: str, out: Path | None
) -> dict[str, Any]:
    """Maps and pointing game of the sentences of one row's report that state a finding as present or possible.

    Args:
        stated: statements of the report.
        masked: lesions of the mask, where there is one.
        out: folder to write ``case0000_sentence1.nii.gz`` (of the report's first sentence) … and ``case0000.png`` to.

    Returns:
        ``sentences``: each with its number ``sentence``; ``hit``, None where the game is not played; ``chance``, the
        fraction of cells that hold the lesion; ``why`` it is not played. ``figure``: file name, or None.
    """
    data, writer, caption = passes.data, passes.writer, passes.data.rows[row]
    record, (baseline, _) = passes.records(OWN)[row], passes.mean_image
    present = [s for s in stated if s.mention.polarity != "absent"]
    present = [s for s in present if s.mention.section != "impression"] or present
    numbers = sorted({s.sentence for s in present})
    words = [[w for s in present if s.sentence == n for w in s.words] for n in numbers]
    spans = token_spans(writer.tokenizer, record["ids"])
    tokens = [[k for k, span in enumerate(spans) if touches(span, w)] for w in words]
    cached = data.cache.get(caption.image_path, caption.mask_path)
    grid = ViewGrid.of(data.view_selection, cached, tuple(baseline[:, 0].shape))
    said = None if record["believed"] is None else [FindingRecord.from_dict(one) for one in record["believed"]]
    lesions, without = without_each_lesion(said or [])
    batch = passes.batch([data[row]])
    batches = [with_key_points(batch, writer.tokenizer, [prompt], passes.language) for prompt in (said, *without)]
    report = ReportLikelihood(writer.model, batches[0], record["ids"], batches[1:])
    maps = attribution_maps(report, tokens, baseline, method, lesion_cells(cached, grid, lesions)).numpy()
    volume = read_volume(caption.image_path)
    labels = None if caption.mask_path is None else read_mask(caption.mask_path, volume)
    sentences = []
    for number, heat in zip(numbers, maps, strict=True):
        mentions = [s.mention for s in present if s.sentence == number]
        sentences.append({"sentence": number} | _point(heat, mentions, masked, labels, grid))
    if out is None or not sentences:
        return {"sentences": sentences, "figure": None}
    name, heats = f"case{row:04d}", [grid.lay_over(heat) for heat in maps]
    for number, heat in zip(numbers, heats, strict=True):
        file = out / f"{name}_sentence{number + 1}.nii.gz"
        write_on_grid(file, heat.astype(np.float32), volume.path, volume.orientation)
    pieces, marks = split_sentences(record["text"]), {True: "hit", False: "miss", None: "not played"}
    titles = [f"{pieces[one['sentence']].strip()[:24]}\n{marks[one['hit']]}" for one in sentences]
    draw_heat(out / f"{name}.png", volume, heats, titles, labels)
    return {"sentences": sentences, "figure": f"{name}.png"}


# ---------------------------------------------------------------------------- attribution


class ReportLikelihood:
    """Log-probabilities of one report's tokens as a function of the image's features. ``features``: (K, C, T, T)."""

    def __init__(
        self, model: MedicalVLM, batch: Batch, ids: Sequence[int], without_lesion: Sequence[Batch] = ()
    ) -> None:
        """
        Args:
            batch: of one case: ``images``, ``slice_position``, ``roi``, ``question_ids``, ``question_mask``, and
                ``key_point_ids``, ``key_point_mask`` where it has a findings prompt.
            ids: tokens of the report.
            without_lesion: ``batch`` with a findings prompt that leaves out one measured lesion, for each of M.
        """
        with torch.no_grad():
            self.features = model.vision.features(batch["images"])[0]
        answer = torch.tensor([list(ids)], dtype=torch.long, device=self.features.device)
        self.answer = {"answer_ids": answer, "answer_mask": torch.ones_like(answer)}
        self.batch, self.without_lesion, self.model = batch, without_lesion, model

    @property
    def length(self) -> int:
        """Tokens that the language model reads, at most."""
        text = sum(self.batch[name].shape[1] for name in ("question_ids", "key_point_ids") if name in self.batch)
        return self.model.vision.bridge.spec.max_visual_tokens + text + self.answer["answer_ids"].shape[1]

    @torch.no_grad()
    def lesion_falls(self) -> Tensor:
        """(M, tokens): how far they fall when a lesion is left out of the findings prompt."""
        features = self.features[None]
        if not self.without_lesion:
            return features.new_zeros(0, self.answer["answer_ids"].shape[1])
        return self(features) - torch.cat([self(features, batch) for batch in self.without_lesion])

    def __call__(self, features: Tensor, batch: Batch | None = None) -> Tensor:
        """(B, tokens) for features (B, K, C, T, T); ``batch``: with another findings prompt."""
        case = {**(batch or self.batch), **self.answer}
        names = [name for name in _READ if name in case]
        copies = {name: case[name].expand(len(features), *case[name].shape[1:]) for name in names}
        question = self.model.lm.embed(copies["question_ids"]).float()
        vision = self.model.vision
        seen = vision.visual_tokens(features, copies["slice_position"], copies["roi"])
        visual = vision.steer(seen, question, copies["question_mask"])
        return torch.stack(answer_log_probs(self.model.lm, visual, copies))


def attribution_maps(
    report: ReportLikelihood,
    spans: Spans,
    baseline: Tensor,
    method: str,
    lesions: Tensor | None = None,
    steps: int = STEPS,
    chunk: int | None = None,
) -> Tensor:
    """Maps (S, K, T, T), float32 on the CPU, one for each of S spans of one report.

    Args:
        baseline: (K, C, T, T), the mean features of many cases.
        method: one of ``METHODS``.
        lesions: (M, K, T, T), where the M measured lesions of the findings prompt lie: fractions that add up to 1.
        steps: points between baseline and image at which the gradient is taken.
        chunk: copies of the case in one forward pass; default: as many as fit into the memory, at most ``CHUNK``.
    """
    K, _, T, U = report.features.shape
    if not spans:
        return torch.zeros(0, K, T, U)
    chunk = report.model.lm.memory.rows_that_fit(report.length, CHUNK) if chunk is None else chunk
    baseline = baseline.to(report.features)
    of_tokens = report.lesion_falls()
    falls = torch.stack([of_tokens[:, list(positions)].sum(1) for positions in spans]).float().cpu()
    lesions = falls.new_zeros(falls.shape[1], K, T, U) if lesions is None else lesions
    falls = falls.clamp(min=0) if method == "evidence" else falls
    by_lesion = torch.einsum("sm,mkij->skij", falls, lesions)
    if method == "occlusion":
        return _occlusion(report, spans, baseline, chunk) + by_lesion
    gradients = _integrated(report, spans, baseline, steps, chunk)
    if method == "integrated":
        return gradients.sum(2) + by_lesion
    evidence = gradients.clamp(min=0).sum(2) + by_lesion
    width = feature_width(report.model.vision.encoder, report.batch["images"], (T, U))
    return torch.stack([smoothed(heat, width) for heat in evidence])


def without_each_lesion(said: Sequence[FindingRecord]) -> tuple[list[FindingRecord], list[list[FindingRecord]]]:
    """The measured lesions of a findings prompt, and what it says without each of them."""
    lesions = [finding for finding in said if finding.measured]
    return lesions, [[one for one in said if one is not lesion] for lesion in lesions]


def lesion_cells(cached: CachedVolume, grid: ViewGrid, lesions: Sequence[FindingRecord]) -> Tensor:
    """Fractions (M, K, T, T) of the voxels of each measured lesion in the cells of ``grid``; zeros where the model was
    shown none of them."""
    if not lesions:
        return torch.zeros(0, *(weight.shape[1] for weight in grid.weights))
    labels = turned(cached.voxel_map.labels_to_original(np.asarray(cached.mask)), cached.axcodes, "LPS")
    counts = np.stack([grid.count(_voxels(labels, [lesion])) for lesion in lesions]).astype(np.float32)
    return torch.from_numpy(counts / np.maximum(counts.sum((1, 2, 3), keepdims=True), 1))


def feature_width(encoder: NnUNetEncoder, images: Sequence[Tensor], grid: tuple[int, int]) -> tuple[float, ...]:
    """Extent of one feature of the encoder's stage, (rows, columns), in cells of the ``grid`` it is pooled to."""
    axes = zip(encoder.total_stride[-2:], grid, images[0].shape[-2:], strict=True)
    return tuple(stride * cells / extent for stride, cells, extent in axes)


def smoothed(heat: Tensor, width: tuple[float, ...]) -> Tensor:
    """(K, T, U) under an in-plane Gaussian of standard deviations ``width`` in cells; the border is replicated."""
    return torch.from_numpy(ndimage.gaussian_filter(heat.numpy(), (0, *width), mode="nearest"))


def _integrated(report: ReportLikelihood, spans: Spans, baseline: Tensor, steps: int, chunk: int) -> Tensor:
    """Integrated gradients (S, K, C, T, T), float32 on the CPU."""
    difference = report.features - baseline
    total = torch.zeros(len(spans), *difference.shape, device=difference.device)
    for part in ((torch.arange(steps, device=difference.device) + 0.5) / steps).split(chunk):
        points = (baseline + part.to(difference)[:, None, None, None, None] * difference).requires_grad_()
        log_probs = report(points)
        for number, positions in enumerate(spans):
            kept = number + 1 < len(spans)
            (gradient,) = torch.autograd.grad(log_probs[:, list(positions)].sum(), points, retain_graph=kept)
            total[number] += gradient.sum(0) / steps
    return (total * difference).float().cpu()


@torch.no_grad()
def _occlusion(report: ReportLikelihood, spans: Spans, baseline: Tensor, chunk: int) -> Tensor:
    grid = tuple(baseline[:, 0].shape)  # K, T, U
    falls = []
    for cells in torch.arange(baseline[:, 0].numel(), device=baseline.device).split(chunk):
        copies = report.features.repeat(len(cells), 1, 1, 1, 1)
        k, i, j = torch.unravel_index(cells, grid)
        copies[torch.arange(len(cells)), k, :, i, j] = baseline[k, :, i, j]
        falls.append(report(copies))
    fall = report(report.features[None]) - torch.cat(falls)  # (cells, tokens)
    return torch.stack([fall[:, list(positions)].sum(1).view(grid).float().cpu() for positions in spans])


# ---------------------------------------------------------------------------- pointing game


def _point(
    heat: np.ndarray,
    mentions: Sequence[FindingRecord],
    masked: MaskedCase | None,
    labels: np.ndarray,
    grid: ViewGrid,
) -> dict[str, Any]:
    """Hit or miss, fraction of cells that would hit, and why the game is not played."""
    why, cells = "", np.zeros(heat.shape, bool)
    if masked is None:
        why = "no mask"
    elif masked.problem:
        why = "the lesions could not be measured"
    elif not (stated := [x for x in masked.lesions if any(all(agreement(m, x).values()) for m in mentions)]):
        why = "the lesion that it states is not in the mask"
    elif not (cells := grid.cells_of(_voxels(labels, stated))).any():
        why = "the lesion lies in no slice that the model was shown"
    if why:
        return {"hit": None, "chance": float("nan"), "why": why}
    return {"hit": bool(cells.flat[int(heat.argmax())]), "chance": float(cells.mean()), "why": ""}


def _voxels(labels: np.ndarray, lesions: Sequence[FindingRecord]) -> np.ndarray:
    """Voxels of the components that hold these lesions, bool of the shape of ``labels``."""
    found = np.zeros(labels.shape, bool)
    places = [lesion.measured for lesion in lesions]
    for label in {place.label for place in places}:
        parts, count = ndimage.label(labels == label, np.ones((3, 3, 3), bool))
        centres = np.array(ndimage.center_of_mass(labels == label, parts, range(1, count + 1)))
        for at in (place for place in places if place.label == label):
            found |= parts == 1 + np.abs(centres - (at.z, at.y, at.x)).max(1).argmin()
    return found
