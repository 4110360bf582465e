"""Calibration: ECE and risk by hand, a calibrator that finds the truth, folds and tables that are held out."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit

from engine.evaluation.calibration import (
    Outcomes,
    confidence_scores,
    ece_of_perfect,
    fit_logistic,
    reliability,
    risk_coverage,
)
from engine.evaluation.confidence import Labeller


def test_ece_by_hand() -> None:
    bins = reliability(np.array([0.15, 0.15, 0.95, 0.85, 1.0]), np.array([0, 1, 1, 0, 1]))
    # Bins of a tenth: 0.1 (n 2, confidence .15, accuracy .5), 0.8 (n 1, .85, 0), 0.9 (n 2, .975, 1).
    assert bins.count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1, 2]
    assert bins.ece == pytest.approx((2 * 0.35 + 0.85 + 2 * 0.025) / 5)
    assert np.isnan(bins.accuracy[0]) and bins.accuracy[1] == 0.5


def test_outcomes_that_come_as_often_as_said_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    assert reliability(confidence, rng.random(20_000) < confidence).ece < 0.02
    assert reliability(confidence, rng.random(20_000) < confidence**3).ece > 0.15


def test_logistic_regression_finds_weights_and_offset_and_stays_finite() -> None:
    rng = np.random.default_rng(2)
    features = np.stack([rng.normal(0, 2, 50_000), rng.normal(5, 0.5, 50_000), np.full(50_000, 3.0)], 1)
    found = fit_logistic(features, rng.random(50_000) < expit(features @ [0.6, -1.0, 0] + 4.4))
    assert found.weights == pytest.approx((0.6, -1.0, 0), abs=0.05) and found.weights[2] == 0
    assert found.offset == pytest.approx(4.4, abs=0.25)
    separable = fit_logistic(np.array([[0.1], [0.2], [0.8], [0.9]]), np.array([0, 0, 1, 1]))
    assert np.isfinite(separable(np.array([[0.0], [1.0]]))).all()
    one_sided = fit_logistic(np.array([[0.5], [0.6]]), np.array([1, 1]))(np.array([[0.5]]))[0]
    assert 0.5 < one_sided < 1


def test_risk_and_coverage_by_hand() -> None:
    curve = risk_coverage(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 3, 0.5])
    assert curve.threshold.tolist() == [0.9, 0.8, 0.1]
    assert curve.area == pytest.approx((0 + 2 / 3 + 0.5) / 4)


def outcomes(n: int, seed: int) -> Outcomes:
    """Statements that are right as often as 0.2 + 0.6 · p(words), whatever is said of p(size)."""
    rng = np.random.default_rng(seed)
    words = np.log(rng.uniform(0.05, 1, n))
    features = np.stack([words, *[np.zeros(n)] * 4], 1)
    return Outcomes(np.arange(n) // 2, np.exp(words), features, rng.random(n) < 0.2 + 0.6 * np.exp(words))


def test_confidence_is_calibrated_on_other_cases() -> None:
    card = confidence_scores(outcomes(4000, 1), outcomes(2000, 2), "validation").card
    assert card["ece_before"] > 0.05 > card["ece"] and card["calibrated_on"] == "validation (2000 statements)"
    assert card["risk_coverage"][9]["risk"] < card["risk_coverage"][-1]["risk"] - 0.05
    assert card["risk_coverage"][-1]["coverage"] == 1 and sum(b["count"] for b in card["reliability"]) == 4000
    assert card["calibrator"]["weights"][1:] == (0, 0, 0, 0)


def test_ece_of_perfect_calibration_falls_with_statements() -> None:
    few, many = (ece_of_perfect(np.random.default_rng(0).random(n)) for n in (100, 10_000))
    assert 0.08 < few < 0.13 and many < 0.015
    assert ece_of_perfect(np.ones(50)) == 0


def test_without_another_table_folds_of_cases_are_held_out() -> None:
    card = confidence_scores(outcomes(3000, 3), None, "").card
    assert card["ece"] < 0.05 and "cross-fitted over 5 folds" in card["calibrated_on"]


def test_too_few_statements_are_not_calibrated() -> None:
    few = confidence_scores(outcomes(40, 1), outcomes(10, 2), "validation")
    assert few.card["calibrator"] is None and "fewer than 30" in few.card["calibrated_on"]
    none = confidence_scores(Outcomes.of([], [], Labeller("zh")), None, "")
    assert none.card["ece"] is None and none.card["statements"] == 0
