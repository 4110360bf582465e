"""Sizes of measured lesions as reports state them: each finding's own map, and nothing fitted to few lesions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.findings import DESCRIPTORS, LESION, FindingRecord, Measurement
from data.lesion_sizes import _LEAST, _PENALTIES, fit_sizes

NAMES = ("nodule", "effusion", "cavity")
Case = tuple[list[FindingRecord], list[FindingRecord]]


def cases(count: int, noise: float = 0.0, seed: int = 0) -> list[Case]:
    """A nodule is measured 1.25 times too large; of an effusion the depth is stated, within one part in ten."""
    rng = np.random.default_rng(seed)
    made: list[Case] = []
    for k in range(count):
        name, mm, thick = NAMES[k % 2], rng.uniform(10, 60), rng.uniform(8, 30)
        stated = mm / 1.25 if name == "nodule" else 1.1 * thick
        stated *= math.exp(noise * rng.standard_normal())
        measured = FindingRecord(LESION, side="left", size_mm=mm, source="segmentation")
        shape = Measurement(1, mm**3 / 2, -50.0, 1, 1, 1, hu=(-90.0, -50.0, 0.0), rim_hu=-700.0, thick_mm=thick)
        made.append(
            (
                [FindingRecord(name, side="left", size_mm=stated)],
                [FindingRecord(**{**vars(measured), "measured": shape})],
            )
        )
    return made


def said(weights: np.ndarray, case: Case) -> float:
    stated, measured = case
    return measured[0].size_mm * math.exp(weights[NAMES.index(stated[0].finding)] @ measured[0].descriptors())


def test_each_finding_has_its_own_map() -> None:
    fit, new = fit_sizes(NAMES, cases(200)), cases(50, seed=1)
    assert fit.weights.shape == (3, DESCRIPTORS) and fit.lesions == 200
    errors = [abs(said(fit.weights, case) / case[0][0].size_mm - 1) for case in new]
    assert max(errors) < 0.02
    assert fit.left_out < 0.02 < 0.2 < fit.measured, "logarithms"


def test_a_finding_without_lesions_has_the_shared_map() -> None:
    only_nodules = [case for case in cases(200) if case[0][0].finding == "nodule"]
    weights = fit_sizes(NAMES, only_nodules).weights
    row = np.array(only_nodules[0][1][0].descriptors())
    nodule, effusion, cavity = np.exp(weights @ row)
    assert nodule == pytest.approx(1 / 1.25, abs=0.01) and effusion == cavity
    assert nodule < cavity < 1, "nearer to the measured size"


def test_left_out_errors_equal_those_of_as_many_fits() -> None:
    """The closed form beside fits without each lesion, at the penalty that was chosen."""
    made = cases(36, noise=0.1)
    fit = fit_sizes(NAMES, made)
    of_penalty = []
    for penalty in _PENALTIES:
        errors = []
        for k, case in enumerate(made):
            weights = _ridge([*made[:k], *made[k + 1 :]], penalty)
            errors.append(math.log(case[0][0].size_mm / said(weights, case)))
        of_penalty.append((np.mean(np.square(errors)), np.quantile(np.abs(errors), 0.9), penalty))
    _, left_out, penalty = min(of_penalty)
    assert fit.left_out == pytest.approx(left_out, rel=1e-6)
    np.testing.assert_allclose(fit.weights, _ridge(made, penalty), atol=1e-9)


def _ridge(made: list[Case], penalty: float) -> np.ndarray:
    """The same regression in its dual form, by the kernel of the shared and of each finding's own map."""
    rows = np.array([case[1][0].descriptors() for case in made])
    rows[:, :11] = 0  # label and place
    kinds = [NAMES.index(case[0][0].finding) for case in made]
    target = np.array([math.log(case[0][0].size_mm / case[1][0].size_mm) for case in made])
    same = np.equal.outer(kinds, kinds)
    kernel = (rows @ rows.T) * (4.0 + same)
    dual = np.linalg.solve(kernel + penalty * np.eye(len(made)), target)
    return np.stack([(dual * (4.0 + np.equal(kinds, k))) @ rows for k in range(len(NAMES))])


def test_too_few_lesions_say_nothing() -> None:
    few = fit_sizes(NAMES, cases(_LEAST - 1))
    assert few.lesions == _LEAST - 1 and not few.weights.any() and math.isnan(few.left_out)
    assert fit_sizes(NAMES, cases(_LEAST)).weights.any()


@pytest.mark.parametrize(
    "pair",
    [
        ([FindingRecord("nodule", side="left")], [FindingRecord(LESION, side="left", size_mm=10.0)]),
        ([FindingRecord("mass", side="left", size_mm=9.0)], [FindingRecord(LESION, side="left", size_mm=10.0)]),
        ([FindingRecord("nodule", side="right", size_mm=9.0)], [FindingRecord(LESION, side="left", size_mm=10.0)]),
        ([], []),
    ],
    ids=["no stated size", "a finding that is not learnt", "another lesion", "a normal scan"],
)
def test_what_says_nothing_of_a_size_is_left_out(pair: Case) -> None:
    fit = fit_sizes(NAMES, [pair])
    assert fit.lesions == 0 and not fit.weights.any() and math.isnan(fit.left_out)
