"""Calibration of the confidence of statements, its expected calibration error, and selective prediction.

The calibrator is a logistic regression on the features of a statement, fitted on other cases than those reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from data.tables.caption_table import CaptionRow
from engine.evaluation.bootstrap import ratio
from engine.evaluation.confidence import Labeller, Statement, is_right

MIN_STATEMENTS = 30  # to fit six numbers on
FOLDS = 5
FEATURES = 5
EDGES = np.linspace(0, 1, 11)  # of the bins of confidence
RIDGE = 1.0  # half of it times the squared weights of the standardised features is added to the sum of all losses
CURVE_POINTS = 50  # of the card, spread evenly, the first and the last among them


@dataclass(frozen=True)
class Reliability:
    """``ece``: Σ (bin size / n) · |accuracy − confidence| (Naeini et al. 2015); ``confidence``, ``accuracy``: mean of
    each bin of ``EDGES``, NaN where empty; ``count``: of each."""

    ece: float
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(confidences: np.ndarray, right: np.ndarray) -> Reliability:
    """ECE with bins of equal width of N ≥ 1 confidences in [0, 1]; one on an edge belongs to the bin above it."""
    bins = len(EDGES) - 1
    where = np.clip(np.searchsorted(EDGES, confidences, side="right") - 1, 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    confidence, accuracy = (ratio(np.bincount(where, values, bins), count) for values in (confidences, right))
    gaps = np.where(count > 0, np.abs(accuracy - confidence), 0)
    return Reliability(float((gaps * count).sum() / len(where)), confidence, accuracy, count)


def ece_of_perfect(confidences: np.ndarray) -> float:
    """Mean ECE of perfectly calibrated statements with these confidences: what chance alone leaves."""
    rng = np.random.default_rng(0)
    values = [reliability(confidences, rng.random(len(confidences)) < confidences).ece for _ in range(200)]
    return float(np.mean(values))


@dataclass(frozen=True)
class RiskCoverage:
    """Error among the most confident fraction: ``risk[k]`` at ``coverage[k]``, of the statements whose confidence
    reaches ``threshold[k]``; ``area`` is its mean (AURC)."""

    coverage: np.ndarray
    risk: np.ndarray
    threshold: np.ndarray
    area: float


def risk_coverage(confidences: np.ndarray, right: np.ndarray) -> RiskCoverage:
    """The curve of selective prediction (Geifman and El-Yaniv 2017); equal confidences are one point."""
    threshold, where, size = np.unique(-confidences, return_inverse=True, return_counts=True)
    kept = size.cumsum()
    risk = np.bincount(where, 1 - np.asarray(right, float)).cumsum() / kept
    return RiskCoverage(kept / kept[-1], risk, -threshold, float((risk * size).sum() / kept[-1]))


@dataclass(frozen=True)
class Logistic:
    """Logistic regression on several features: σ(features · weights + offset)."""

    weights: tuple[float, ...]
    offset: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Probabilities (N,) of features (N, F)."""
        return expit(np.asarray(features, float) @ np.array(self.weights) + self.offset)


def fit_logistic(features: np.ndarray, right: np.ndarray) -> Logistic:
    """Maximum likelihood with Platt's smoothed targets (Platt 1999) and a ridge penalty.

    ``features``: (N, F) with N ≥ 1; one that does not vary gets weight 0. ``right``: (N,).
    """
    right = np.asarray(right, float)
    good, bad = right.sum(), len(right) - right.sum()
    target = np.where(right > 0, (good + 1) / (good + 2), 1 / (bad + 2))
    mean, deviation = features.mean(0), features.std(0)
    scale = np.where(deviation > 0, deviation, np.inf)
    z = (features - mean) / scale

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a = z @ theta[:-1] + theta[-1]
        error = expit(a) - target
        value = (np.logaddexp(0, a) - target * a).sum() + RIDGE * (theta[:-1] ** 2).sum() / 2
        return float(value), np.append(z.T @ error + RIDGE * theta[:-1], error.sum())

    theta = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weights = theta[:-1] / scale
    return Logistic(tuple(weights.tolist()), float(theta[-1] - mean @ weights))


@dataclass(frozen=True)
class Outcomes:
    """N statements of one table with their outcome.

    ``case`` (N,); ``raw`` (N,) and ``features`` (N, 5) as of ``Statement``; ``right`` (N,): whether the reference of
    the case confirms the statement.
    """

    case: np.ndarray
    raw: np.ndarray
    features: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, stated: Sequence[Sequence[Statement]], table: Sequence[CaptionRow], label: Labeller) -> Outcomes:
        """Of the statements of each row's report."""
        truths = [label(row.answer) for row in table]
        rows = [
            (case, statement.raw, statement.features, is_right(statement.mention, truth))
            for case, (statements, truth) in enumerate(zip(stated, truths, strict=True))
            for statement in statements
        ]
        case, raw, features, right = zip(*rows, strict=True) if rows else ((), (), (), ())
        features = np.array(features, float).reshape(-1, FEATURES)
        return cls(np.array(case, int), np.array(raw, float), features, np.array(right, bool))


@dataclass(frozen=True)
class ConfidenceScores:
    """``calibrated``: confidence of each statement, in the order of ``Outcomes``; ``card``: JSON values. Without
    statements there is no reliability and no curve."""

    calibrated: np.ndarray
    card: dict[str, Any]
    reliability: Reliability | None = None
    curve: RiskCoverage | None = None


def confidence_scores(outcomes: Outcomes, other: Outcomes | None, other_name: str) -> ConfidenceScores:
    """Calibrate on ``other``, or where there is none by cross-fitting: each fifth of the cases on the rest.

    With fewer than 30 statements to fit on, the raw confidence is kept, and ``calibrated_on`` has the reason.
    """
    fitted = None
    if other is not None and len(other.raw) >= MIN_STATEMENTS:
        fitted = fit_logistic(other.features, other.right)
        calibrated, on = fitted(outcomes.features), f"{other_name} ({len(other.raw)} statements)"
    elif other is None and len(outcomes.raw) >= MIN_STATEMENTS * FOLDS / (FOLDS - 1):
        calibrated, on = _cross_fitted(outcomes), f"the same table, cross-fitted over {FOLDS} folds of cases"
        fitted = fit_logistic(outcomes.features, outcomes.right)
    else:
        calibrated, on = outcomes.raw, f"nothing: fewer than {MIN_STATEMENTS} statements to fit on"
    card: dict[str, Any] = {"ece": None, "ece_before": None, "statements": len(calibrated), "calibrated_on": on}
    card["calibrator"] = fitted and asdict(fitted)
    if not len(calibrated):
        return ConfidenceScores(calibrated, card)
    before, after = (reliability(values, outcomes.right) for values in (outcomes.raw, calibrated))
    curve = risk_coverage(calibrated, outcomes.right)
    bins = zip(EDGES[:-1], after.confidence, after.accuracy, after.count, strict=True)
    size = len(curve.risk)
    shown = np.unique(np.linspace(0, size - 1, min(CURVE_POINTS, size)).round().astype(int))
    points = zip(curve.coverage[shown], curve.risk[shown], curve.threshold[shown], strict=True)
    card |= {
        "ece": after.ece,
        "ece_before": before.ece,
        "area_under_risk_coverage": curve.area,
        "ece_of_perfect": ece_of_perfect(calibrated),
        "reliability": [dict(zip(("from", "confidence", "right", "count"), row, strict=True)) for row in bins],
        "risk_coverage": [dict(zip(("coverage", "risk", "threshold"), row, strict=True)) for row in points],
    }
    return ConfidenceScores(calibrated, card, after, curve)


def _cross_fitted(outcomes: Outcomes) -> np.ndarray:
    calibrated, fold = outcomes.raw.copy(), outcomes.case % FOLDS
    for tested in (fold == number for number in np.unique(fold) if (fold != number).any()):
        fitted = fit_logistic(outcomes.features[~tested], outcomes.right[~tested])
        calibrated[tested] = fitted(outcomes.features[tested])
    return calibrated
