"""Segmentations beside masks, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data.segmentation_scores import MIN_LESION_MM3, choose_min_lesion, compare, scores

SPACING = (2.0, 1.0, 1.0)


def labels(*boxes: tuple[slice, slice, slice]) -> np.ndarray:
    array = np.zeros((10, 30, 30), np.uint8)
    for box in boxes:
        array[box] = 1
    return array


A, B, SPECK = np.s_[1:3, 2:6, 2:6], np.s_[6:8, 20:24, 20:24], np.s_[9:10, 2:3, 28:29]


def test_found_missed_and_false_lesions_by_hand() -> None:
    half = np.s_[1:3, 2:6, 2:4]
    case = compare(labels(half, SPECK), labels(A, B), SPACING)
    assert case.dice == pytest.approx(2 * 16 / (17 + 64))
    assert sorted(case.predicted) == [(2.0, False), (32.0, True)]
    assert sorted(case.true) == [(64.0, 0.0), (64.0, 32.0)]
    every = scores([case])
    assert (every.recall, every.false_lesions, every.lesions) == (0.5, 1.0, 2)
    assert scores([case], 5.0).false_lesions == 0 and scores([case], 50.0).recall == 0


def test_the_speck_size_is_the_largest_that_loses_no_lesion() -> None:
    assert choose_min_lesion([compare(labels(A, B, SPECK), labels(A, B), SPACING)]) == 50.0  # A and B have 64
    small = np.s_[1:2, 2:4, 2:4]  # 8 mm3
    assert choose_min_lesion([compare(labels(small, B, SPECK), labels(A, B), SPACING)]) == 5.0
    assert choose_min_lesion([compare(labels(A), labels(), SPACING)]) == MIN_LESION_MM3


def test_cases_without_lesion_have_no_dice_and_a_weak_segmentation_is_told() -> None:
    normal = compare(labels(SPECK), labels(), SPACING)
    assert normal.dice is None and scores([normal]).recall is None and "Dice none" in str(scores([normal]))
    everywhere = compare(labels(np.s_[:, :, :]), labels(A), SPACING)
    assert scores([everywhere]).weak and not scores([compare(labels(A), labels(A), SPACING)]).weak
