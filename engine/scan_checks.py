"""What a scan must pass before a report of it can be believed, and what is said where it does not.

    image checks       of data/checks, made when a case is prepared: errors stop, warnings are printed
    segmentation       one that labels a large part of the scan as lesion is none
    description        extent, spacing, air and noise, beside the range of the training cases
    feature distance   of the scan's encoder features to those of the training cases, beside what validation cases have

The sentences of :func:`notice` are the system's own, marked as such, and stand before the model's text.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config.errors import InputError
from data.augmentation import Augmentation
from data.cache import CachedVolume, CaseCache
from data.checks.data_check import compare_rows
from data.checks.image_checks import check_header
from data.checks.problems import Problem, raise_errors
from data.imaging.reader import read_header
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.report_language.labeller import language_of
from data.tables.caption_table import CaptionRow
from data.view_selection import ViewSelection
from models.medical_vlm import VisionBridge

MOST_PRINTED = 8  # lesions
MOST_LESION = 0.3  # of the scan's voxels; a lung is a sixth of a chest CT
FIT_CASES, LIMIT_CASES = 256, 128  # training cases of the mean and covariance, validation cases of the limit
_SHRINKAGE = 0.1  # of the correlation matrix towards the identity: there are fewer cases than features
_MARGIN = 0.1  # of a range, and of its ends
_QUANTILE = 0.99  # of the validation cases lie within the limit

NOTICES = {
    "blind": {
        "zh": "【系统提示】本次阅读的层面并非依据病灶选取，其余层面上可能有病灶，不能据此排除病变。",
        "en": "[System note] The slices were chosen without knowing of a lesion: one elsewhere is not excluded.",
    },
    "forced": {
        "zh": "【系统提示】影像未通过检查，以下文字不可作为报告使用。",
        "en": "[System note] The image failed its checks; the following text must not be used as a report.",
    },
    "unfamiliar": {
        "zh": "【系统提示】该影像与训练数据差异很大，以下文字可能不可靠。",
        "en": "[System note] The scan is unlike the training cases; the following text may be unreliable.",
    },
}


def notice(kinds: Iterable[str], language: str) -> str:
    """The sentences of these kinds ("blind", "forced", "unfamiliar"), to stand before a report; empty without any."""
    return " ".join(NOTICES[kind][language] for kind in kinds)


# ------------------------------------------------------------------ images


def case_problems(cache: CaseCache, rows: Sequence[CaptionRow]) -> list[Problem]:
    """Problems that the image checks found in the prepared cases of ``rows``."""
    found = []
    for row in rows:
        for problem in cache.get(row.image_path, row.mask_path).problems:
            found.append(replace(problem, row=row.number, image=str(row.image_path)))
    return found


def check_scans(
    cache: CaseCache, tables: dict[str, Sequence[CaptionRow]], others: Sequence[Problem] = (), *, force: bool
) -> list[Problem]:
    """Problems of all prepared cases, and images or patients that are in two tables; warnings are counted and printed.

    Args:
        tables: rows by name, ``train`` and ``val`` among them where there are two.
        others: problems found before, to be counted too.
        force: print errors as warnings and go on.

    Raises:
        InputError: an image cannot be a chest CT in HU, and not ``force``.
    """
    problems = list(others)
    for name, rows in tables.items():
        problems += [replace(problem, table=name) for problem in case_problems(cache, rows)]
    if "train" in tables and "val" in tables:
        both = [*tables["train"], *tables["val"]]
        voxels = {row.image_path: cache.get(row.image_path, row.mask_path).voxels for row in both}
        problems += compare_rows(tables["train"], tables["val"], voxels)
    if not force:
        named = (replace(p, problem=f"{p.image}: {p.problem}", remedy=f"{p.remedy}, or --force") for p in problems)
        raise_errors(named)
    counted = [problem for problem in problems if problem.level != "note"]
    kinds = Counter(problem.problem for problem in counted)
    if counted:
        rows_with = len({(problem.table, problem.row) for problem in counted})
        first, most = counted[0], kinds.most_common(1)[0]
        more = f", most often ({most[1]} times): {most[0]}" if most[1] > 1 else ""
        line = f"warning: {len(counted)} warnings in {rows_with} rows{more}; the first: {first.table}, {first}"
        print(f"{line} (python scripts/check_data.py lists all)", flush=True)
    return problems


def check_new_scan(cache: CaseCache, image: Path, mask: Path | None, *, force: bool) -> list[Problem]:
    """Problems of one scan, its header's included.

    Raises InputError where it cannot be a chest CT, and not ``force``.
    """
    problems = [*check_header(read_header(image)), *cache.volumes.read(image, mask, lambda volume: volume.problems)]
    problems = [problem for problem in problems if problem.level != "note"]
    if not force:
        for problem in problems:
            if problem.fatal:
                raise InputError(f"{image}: {problem.problem}; {problem.remedy}, or --force")
    return problems


def implausible_segmentation(volume: CachedVolume) -> str:
    """Why the segmentation of a case cannot be one of lesions, or empty."""
    if volume.lesions_from != "segmentation":
        return ""
    fraction = float(volume.lesion_voxels.sum()) / float(torch.Size(volume.image.shape[1:]).numel())
    return f"the nnU-Net labels {100 * fraction:.0f} % of the scan as lesion" if fraction > MOST_LESION else ""


def chosen_blindly(volume: CachedVolume, selection: ViewSelection) -> bool:
    """Whether the view of a case was selected without knowing of a lesion: no policy that looks for one, nothing that
    shows one, or a segmentation that cannot be one of lesions."""
    looks = selection.policy in ("auto", "mask", "nnunet") and volume.lesions_from is not None
    return not looks or bool(implausible_segmentation(volume))


def describe_view(volume: CachedVolume, selection: ViewSelection) -> list[str]:
    """Lines for people: the lesions that are known, and which slices are read and why."""
    lesions, total = selection.lesions(volume), volume.voxel_map.shape_before_crop[0]
    if len(selection.patch_size) == 2:
        at = np.array([[z, 0, 0] for z in selection.chosen_slices(volume)])
        axis = volume.voxel_map.transpose_forward[0]
        numbers = np.rint(volume.voxel_map.to_original(at)[:, axis]).astype(int) + 1
        numbers = total + 1 - numbers if volume.first_slice_is_highest else numbers
        read = (
            f"slices read: {', '.join(map(str, dict.fromkeys(numbers.tolist())))} of {total}, counted from the lowest"
        )
    else:
        starts, sizes = selection.box(volume)
        read = f"patch read: {sizes[0]} preprocessed slices from {max(starts[0], 0) + 1} on"
    if reason := implausible_segmentation(volume):
        why = f"warning: {reason}, so the slices may not show one"
    elif chosen_blindly(volume, selection):
        why = f"chosen by slice_policy {selection.policy}, without knowing of a lesion"
    elif not lesions:
        why = f"no lesion in the {volume.lesions_from}"
    else:
        why = f"{len(lesions)} lesion(s) of the {volume.lesions_from}"
    kept = selection.measured(volume) or []
    measured = [f"measured on the {volume.lesions_from}: {finding.describe()}" for finding in kept[:MOST_PRINTED]]
    more = [f"and {len(kept) - MOST_PRINTED} smaller lesions"] if len(kept) > MOST_PRINTED else []
    return [f"{read}: {why}", *measured, *more]


# ------------------------------------------------------------------ features


def feature_summary(features: Tensor) -> Tensor:
    """Mean and standard deviation of each channel (B, 2·C) over slices and positions of features (B, K, C, T, T)."""
    values = features.float().transpose(1, 2).flatten(2)  # (B, C, K·T·T)
    return torch.cat([values.mean(2), values.std(2)], dim=1)


@dataclass
class FeatureDistance:
    """Mahalanobis distance of a scan's features to the training cases (Lee et al. 2018), per feature.

    Attributes:
        mean, std: (F,) of the training cases' summaries.
        precision: (F, F), inverse of their shrunk correlation matrix.
        known: (M,) distances of validation cases, ascending.
    """

    mean: Tensor
    std: Tensor
    precision: Tensor
    known: Tensor

    @classmethod
    def fit(cls, train: Tensor, val: Tensor) -> FeatureDistance:
        """From summaries (N, F) of training and (M, F) of validation cases."""
        train, val = train.double(), val.double()
        mean, std = train.mean(0), train.std(0).clamp_min(1e-6) if len(train) > 1 else torch.ones_like(train[0])
        z = (train - mean) / std
        correlation = z.T @ z / max(len(z) - 1, 1)
        shrunk = (1 - _SHRINKAGE) * correlation + _SHRINKAGE * torch.eye(len(mean), dtype=torch.float64)
        fitted = cls(mean.float(), std.float(), torch.linalg.inv(shrunk).float(), torch.empty(0))
        fitted.known = torch.tensor(sorted(fitted.of(val).tolist()))
        return fitted

    def of(self, summaries: Tensor) -> Tensor:
        """Distances (B,) of summaries (B, F); about 1 for training cases."""
        z = (summaries.float() - self.mean) / self.std
        return ((z @ self.precision) * z).sum(1).clamp_min(0).div(len(self.mean)).sqrt()

    @property
    def limit(self) -> float:
        """Distance that 99 % of the validation cases keep; of fewer than 100 cases the largest."""
        return float(torch.quantile(self.known, _QUANTILE, interpolation="higher"))

    def judge(self, summary: Tensor) -> tuple[bool, str]:
        """Whether the scan of a summary (1, F) lies outside the limit, and a line that says so."""
        distance = float(self.of(summary))
        outside = distance > self.limit
        words = "outside" if outside else "within"
        return outside, (
            f"feature distance to the training cases {distance:.2f}, {words} the limit {self.limit:.2f} of "
            f"{len(self.known)} validation cases (median {float(self.known.median()):.2f})"
        )

    def state(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return dict(vars(self))


def compare_described(ranges: dict[str, Sequence[float]] | None, volume: CachedVolume) -> list[str]:
    """A line for each property of a scan that lies outside those of the training cases, with a margin."""
    lines = []
    for name, (low, high) in (ranges or {}).items():
        value, margin = volume.described[name], _MARGIN * (high - low)
        if not low * (1 - _MARGIN) - margin <= value <= high * (1 + _MARGIN) + margin:
            lines.append(f"warning: {name} {value:.3g}, in the training cases {low:.3g} to {high:.3g}")
    return lines


def judge_features(state: dict[str, Tensor] | None, features: Tensor) -> tuple[bool, str]:
    """Whether a scan with these features (1, K, C, T, T) is unlike the training cases, and a line that says so.

    ``state``: of the checkpoint. Raises InputError for features that are not finite."""
    summary = feature_summary(features).cpu()
    if not torch.isfinite(summary).all():
        raise InputError("the encoder's features of this scan are not finite: check the image and the nnU-Net")
    if state is None:
        return (
            False,
            "note: this checkpoint holds no features of its training cases: whether the scan is like them is unknown",
        )
    return FeatureDistance(**state).judge(summary)


@torch.no_grad()
def summarise(vision: VisionBridge, data: MedicalVLMDataset, most: int) -> Tensor:
    """Summaries (N, F) of up to ``most`` cases, spread evenly over the table, without augmentation."""
    plain = copy.copy(data)
    plain.view_selection = copy.copy(data.view_selection)
    plain.view_selection.augmentation = Augmentation()
    device, training = next(vision.parameters()).device, vision.training
    vision.eval()
    step = max(1, -(-len(plain) // most))
    found = []
    for row in range(0, len(plain), step):
        images = CaptionCollator.images([plain[row]])["images"]
        found.append(feature_summary(vision.features(images.to(device))).cpu())
    vision.train(training)
    return torch.cat(found)


class ScanChecks:
    """What a checkpoint stores for checking new scans: feature distances for the vision part as it is now (fitted once
    where the encoder is frozen), the digest of the nnU-Net that segments, and the language of most reports."""

    def __init__(self, vision: VisionBridge, train: MedicalVLMDataset, val: MedicalVLMDataset) -> None:
        self.vision, self.tables, self._state = vision, (train, val), None
        cases = [train.cache.get(row.image_path, row.mask_path).described for row in train.rows]
        self._ranges = {key: [min(c[key] for c in cases), max(c[key] for c in cases)] for key in cases[0]}

    def __call__(self) -> dict[str, Any]:
        return {
            "feature_distance": self._feature_distance(),
            "segmentation_network": self.tables[0].cache.network,
            "described": self._ranges,
            "language": language_of([row.answer for row in self.tables[0].rows]),
        }

    def _feature_distance(self) -> dict[str, Tensor]:
        frozen = not any(p.requires_grad for p in self.vision.encoder.parameters())
        if self._state is None or not frozen:
            train, val = (
                summarise(self.vision, *part) for part in zip(self.tables, (FIT_CASES, LIMIT_CASES), strict=True)
            )
            self._state = FeatureDistance.fit(train, val).state()
        return self._state
