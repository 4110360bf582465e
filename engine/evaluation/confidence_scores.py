"""Confidence of statements over a table: calibrated on other cases, with its reliability and what abstaining buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.report_language.labeller import FindingMention
from engine.evaluation.calibration import Logistic, Reliability, RiskCoverage, fit_logistic, reliability, risk_coverage
from engine.evaluation.confidence import SIGNS, Statement, is_right

MIN_STATEMENTS = 30  # to fit six numbers on
FOLDS = 5


@dataclass(frozen=True)
class Judged:
    """N statements of one table. ``case`` (N,); ``raw`` (N,) and ``signs`` (N, 5) as of ``Statement``; ``right`` (N,):
    whether its reference bears it out."""

    case: np.ndarray
    raw: np.ndarray
    signs: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, said: Sequence[Sequence[Statement]], references: Sequence[Sequence[FindingMention]]) -> Judged:
        rows = [
            (case, statement.raw, statement.signs, is_right(statement.mention, truth))
            for case, (statements, truth) in enumerate(zip(said, references, strict=True))
            for statement in statements
        ]
        case, raw, signs, right = zip(*rows, strict=True) if rows else ((), (), (), ())
        held = np.array(signs, float).reshape(-1, SIGNS)
        return cls(np.array(case, int), np.array(raw, float), held, np.array(right, bool))


@dataclass(frozen=True)
class ConfidenceScores:
    """``calibrated``: of each statement, in the order of ``Judged``; ``before``, ``after``: reliability without and
    with calibration; ``calibrated_on``: in words."""

    calibrated: np.ndarray
    before: Reliability | None
    after: Reliability | None
    curve: RiskCoverage | None
    calibrator: Logistic | None
    calibrated_on: str

    def as_dict(self) -> dict[str, Any]:
        """For the card; without statements every number is None."""
        fitted = self.calibrator and {"weights": list(self.calibrator.weights), "offset": self.calibrator.offset}
        found: dict[str, Any] = {"ece": None, "ece_before": None, "statements": len(self.calibrated)}
        found |= {"calibrated_on": self.calibrated_on, "calibrator": fitted}
        if self.after is None or self.before is None or self.curve is None:
            return found
        bins = zip(self.after.edges, self.after.confidence, self.after.accuracy, self.after.count, strict=False)
        found |= {"ece": self.after.ece, "ece_before": self.before.ece, "area_under_risk_coverage": self.curve.area}
        found["ece_of_perfect"] = ece_of_perfect(self.calibrated)
        found["reliability"] = [
            {"from": float(a), "confidence": float(b), "right": float(c), "count": int(d)} for a, b, c, d in bins
        ]
        found["risk_coverage"] = [
            {"coverage": float(a), "risk": float(b), "threshold": float(c)} for a, b, c in thinned(self.curve)
        ]
        return found


def confidence_scores(judged: Judged, other: Judged | None, other_name: str) -> ConfidenceScores:
    """Calibrate on ``other``, or where there is none by cross-fitting: each fifth of the cases on the rest.

    With fewer than 30 statements to fit on, the raw confidence stands, and ``calibrated_on`` says so.
    """
    fitted = None
    if other is not None and len(other.raw) >= MIN_STATEMENTS:
        fitted = fit_logistic(other.signs, other.right)
        calibrated, on = fitted(judged.signs), f"{other_name} ({len(other.raw)} statements)"
    elif other is None and len(judged.raw) >= MIN_STATEMENTS * FOLDS / (FOLDS - 1):
        calibrated, on = _cross_fitted(judged), f"the same table, cross-fitted over {FOLDS} folds of cases"
        fitted = fit_logistic(judged.signs, judged.right)
    else:
        calibrated, on = judged.raw, f"nothing: fewer than {MIN_STATEMENTS} statements to fit on"
    if not len(calibrated):
        return ConfidenceScores(calibrated, None, None, None, fitted, on)
    before, after = (reliability(values, judged.right) for values in (judged.raw, calibrated))
    return ConfidenceScores(calibrated, before, after, risk_coverage(calibrated, judged.right), fitted, on)


def ece_of_perfect(confidences: np.ndarray, draws: int = 200, seed: int = 0) -> float:
    """Mean ECE of as many statements that are right exactly as often as said: what chance alone leaves."""
    rng = np.random.default_rng(seed)
    values = [reliability(confidences, rng.random(len(confidences)) < confidences).ece for _ in range(draws)]
    return float(np.mean(values))


def thinned(curve: RiskCoverage, points: int = 50) -> list[tuple[float, float, float]]:
    """At most so many points of the curve, its end among them."""
    rows = list(zip(curve.coverage, curve.risk, curve.threshold, strict=True))
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(points, len(rows))).round().astype(int))]


def _cross_fitted(judged: Judged) -> np.ndarray:
    calibrated = judged.raw.copy()
    for fold in range(FOLDS):
        held = judged.case % FOLDS == fold
        if held.any() and (~held).any():
            calibrated[held] = fit_logistic(judged.signs[~held], judged.right[~held])(judged.signs[held])
    return calibrated
