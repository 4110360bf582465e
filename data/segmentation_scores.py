"""How good a segmentation is beside masks (Dice, lesion-wise recall, false lesions), and the size of its specks.

Lesions are those of :func:`data.lesions.lesion_numbers`: components with small gaps between them are one. A lesion of
the mask is found where a lesion of the segmentation overlaps it; one of the segmentation that overlaps none is false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from data.lesions import lesion_numbers

MIN_LESION_MM3 = 30.0  # where there is no mask to choose it by: a nodule of 4 mm has 34
_CANDIDATES_MM3 = (0.0, 5.0, 10.0, 20.0, 30.0, 50.0, 100.0, 200.0, 500.0)
MAX_LOSS = 0.01  # of the lesions, for dropping specks
# Below these a report would rest on lesions that are not there, or lack those that are.
WARN_DICE, WARN_RECALL, WARN_FALSE_LESIONS = 0.3, 0.7, 3.0


@dataclass(frozen=True)
class ComparedCase:
    """One case.

    ``dice``: of all lesions against background, None where the mask is empty. ``predicted``: volume (mm3) of each
    lesion of the segmentation, and whether it overlaps the mask. ``true``: volume of each lesion of the mask, and of
    the largest lesion of the segmentation that overlaps it, 0 for none.
    """

    dice: float | None
    predicted: tuple[tuple[float, bool], ...]
    true: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class SegmentationScores:
    """Over cases. ``dice``: mean over those with a mask that is not empty; ``recall``: of lesions, lesion-wise;
    ``false_lesions``: per case. None where there is nothing to count."""

    cases: int
    lesions: int
    dice: float | None
    recall: float | None
    false_lesions: float
    min_lesion_mm3: float

    @property
    def weak(self) -> bool:
        """The segmentation cannot carry a report."""
        poor = self.dice is not None and (self.dice < WARN_DICE or self.recall < WARN_RECALL)
        return poor or self.false_lesions > WARN_FALSE_LESIONS

    def __str__(self) -> str:
        dice, recall = ("none" if value is None else f"{value:.2f}" for value in (self.dice, self.recall))
        return (
            f"Dice {dice}, lesion-wise recall {recall} of {self.lesions}, {self.false_lesions:.2f} false lesions a case"
            f" (lesions of {self.min_lesion_mm3:g} mm3 or more; {self.cases} cases with a mask)"
        )


def compare(predicted: np.ndarray, truth: np.ndarray, spacing: tuple[float, float, float]) -> ComparedCase:
    """Compare labels (z, y, x) with the mask on the same grid; ``spacing`` in mm. Kinds of lesions are not compared."""
    voxel = float(np.prod(spacing))
    both = np.count_nonzero((predicted > 0) & (truth > 0))
    either = np.count_nonzero(predicted) + np.count_nonzero(truth)
    found, masked = lesion_numbers(predicted), lesion_numbers(truth)
    volumes = np.bincount(found.ravel()) * voxel
    met = np.isin(np.arange(len(volumes)), found[masked > 0])
    pairs = np.unique(np.stack([masked[masked > 0], found[masked > 0]]), axis=1)
    largest = {int(k): 0.0 for k in np.unique(masked) if k}
    for lesion, number in pairs.T.tolist():
        if number:
            largest[lesion] = max(largest[lesion], float(volumes[number]))
    sizes = np.bincount(masked.ravel()) * voxel
    return ComparedCase(
        dice=2 * both / either if truth.any() else None,
        predicted=tuple((float(v), bool(m)) for v, m in zip(volumes[1:], met[1:], strict=True)),
        true=tuple((float(sizes[k]), volume) for k, volume in largest.items()),
    )


def scores(cases: Sequence[ComparedCase], min_lesion_mm3: float = 0.0) -> SegmentationScores:
    """Scores over cases, without the lesions of the segmentation below ``min_lesion_mm3``."""
    dice = [case.dice for case in cases if case.dice is not None]
    hits = [volume > 0 and volume >= min_lesion_mm3 for case in cases for _, volume in case.true]
    wrong = sum(not met and volume >= min_lesion_mm3 for case in cases for volume, met in case.predicted)
    return SegmentationScores(
        len(cases),
        len(hits),
        fmean(dice) if dice else None,
        fmean(hits) if hits else None,
        wrong / len(cases) if cases else 0.0,
        min_lesion_mm3,
    )


def choose_min_lesion(cases: Sequence[ComparedCase]) -> float:
    """The volume (mm3) below which lesions of the segmentation are dropped: of the candidates the largest that loses no
    more than one in a hundred lesions, since a missed lesion is worse than a false one.

    :data:`MIN_LESION_MM3` without a lesion in the masks.
    """
    if not any(case.true for case in cases):
        return MIN_LESION_MM3
    enough = scores(cases).recall - MAX_LOSS
    return max(least for least in _CANDIDATES_MM3 if scores(cases, least).recall >= enough)
