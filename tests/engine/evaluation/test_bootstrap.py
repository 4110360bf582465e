"""Intervals over cases: samples with replacement, their coverage, and values that are not defined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from engine.evaluation.bootstrap import case_weights, difference, hit_score, interval, mean_score


def test_weights_are_samples_with_replacement() -> None:
    weights = case_weights(7)
    assert weights.shape == (1000, 7) and (weights.sum(1) == 7).all() and weights.max() > 1
    assert (weights == case_weights(7)).all()


def test_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        score = mean_score(rng.normal(1.0, 2.0, 60))
        covered += score.low <= 1.0 <= score.high
    assert 0.88 <= covered / 200 <= 0.99


def test_intervals_of_nothing() -> None:
    assert math.isnan(mean_score([]).value) and mean_score([]).n == 0
    assert all(math.isnan(v) for v in interval(np.array([np.nan, np.nan])))


def test_hits_are_counted_and_resampled_by_case() -> None:
    """Hits of one case are drawn together: with all of them in one case, every sample has the same value."""
    score = hit_score([(1, True), (1, False), (1, True)], 4, "hits")
    assert (score.value, score.low, score.high, score.n) == (pytest.approx(2 / 3), *[pytest.approx(2 / 3)] * 2, 3)
    spread = hit_score([(0, True), (1, False), (2, True)], 4, "hits")
    assert spread.value == pytest.approx(2 / 3) and spread.low < 0.5 and spread.high == 1


def test_paired_differences_are_narrower_than_their_parts() -> None:
    rng = np.random.default_rng(0)
    hard = rng.normal(0.0, 2.0, 60)
    one, other = mean_score(hard + 0.5), mean_score(hard + rng.normal(0.0, 0.1, 60))
    margin = difference(one, other, "mean")
    assert margin.value == pytest.approx(one.value - other.value) and margin.n == 60 and margin.what == "mean"
    assert margin.low > 0.4 and margin.high < 0.6 and one.low < other.high
    assert difference(one, one).bounds == [0, 0] and math.isnan(difference(one, mean_score([np.nan] * 60)).low)
