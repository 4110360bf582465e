"""How reports size the lesions that a segmentation measures, fitted finding by finding.

A network of one class, trained on masks, draws each kind of lesion too large or too small in its own way, and reports
give the depth of an effusion where the segmentation gives its diameter. Learnt with the findings head's other outputs,
by gradient from some 300 cases, sizes were within 3 mm for .93 to .98 of the lesions that it was trained on and for .74
to .80 of new ones; by the maps of this file for .87 to .88 of these (docs/evaluation.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.finding_targets import pair_findings
from data.findings import DESCRIPTORS, LABELS, FindingRecord

# Of the descriptors: lengths, densities, number of parts and the 1; no label, no place.
_SHAPE = slice(LABELS + 3, DESCRIPTORS)
_SHARED = 2.0  # how much freer the map of all findings is than each finding's difference from it
_PENALTIES = np.logspace(-1, 3, 17)
_LEAST = 30  # lesions; sizes fitted on half as many are worse than the measured ones


class SizeFit(NamedTuple):
    """``weights`` (F, P): from a finding's descriptors to the log of stated over measured size; ``span`` (2, P): the
    least and the most of each descriptor. Of ``lesions`` lesions nine in ten have a log of at most ``measured``, and at
    most ``left_out`` off a fit without themselves."""

    weights: np.ndarray
    span: np.ndarray
    measured: float
    left_out: float
    lesions: int


def fit_sizes(
    names: Sequence[str], cases: Sequence[tuple[Sequence[FindingRecord], Sequence[FindingRecord]]]
) -> SizeFit:
    """Ridge regression over the findings that reports state of measured lesions.

    One map that all findings share, and one for each finding's difference from it (Evgeniou and Pontil 2004,
    "Regularized multi-task learning", eq. 1). The penalty is that of the least leave-one-out error, which has a closed
    form (Allen 1974, PRESS). Of fewer than :data:`_LEAST` lesions nothing is fitted: sizes stay as they are measured.

    Args:
        names: the F findings.
        cases: what the report of each states, and its measured lesions.
    """
    pairs = [
        (names.index(a.finding), b.descriptors()[_SHAPE], math.log(a.size_mm / b.size_mm))
        for stated, measured in cases
        for a, b in pair_findings(stated, measured)
        if a and b and a.finding in names and a.size_mm and b.size_mm
    ]
    weights, span = np.zeros((len(names), DESCRIPTORS)), np.array([[-np.inf], [np.inf]]).repeat(DESCRIPTORS, axis=1)
    if len(pairs) < _LEAST:
        return SizeFit(weights, span, math.nan, math.nan, len(pairs))
    kinds, rows, ratios = map(np.array, zip(*pairs, strict=True))
    span[:, _SHAPE] = rows.min(0), rows.max(0)  # metal of 3,071 HU made of a nodule of 28 mm one of 130
    of_kind = np.eye(len(names))[kinds]  # (N, F)
    own_kind = np.concatenate([np.full((len(rows), 1), _SHARED), of_kind], axis=1)  # (N, 1 + F)
    design = (own_kind[:, :, None] * rows[:, None]).reshape(len(rows), -1)
    fits = []
    for penalty in _PENALTIES:
        solve = np.linalg.solve(design.T @ design + penalty * np.eye(design.shape[1]), design.T)
        leverage = (design * solve.T).sum(1)
        fits.append(((ratios - design @ (solve @ ratios)) / (1 - leverage), solve @ ratios))
    left_out, best = min(fits, key=lambda fit: np.mean(fit[0] ** 2))
    shared, *differences = best.reshape(1 + len(names), -1)
    weights[:, _SHAPE] = _SHARED * shared + np.stack(differences)
    return SizeFit(weights, span, *(float(np.quantile(abs(log), 0.9)) for log in (ratios, left_out)), len(rows))
