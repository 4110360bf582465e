"""Calibration: ECE by hand, calibrators that find the truth, risk and coverage, marks that change no word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit, logit

from config.errors import InputError
from engine.evaluation.calibration import (
    TO_CHECK,
    draw_reliability,
    fit_isotonic,
    fit_platt,
    mark_unsure,
    reliability,
    risk_coverage,
    split_sentences,
)


def test_ece_by_hand() -> None:
    held = reliability([0.15, 0.15, 0.95, 0.85, 1.0], [False, True, True, False, True])
    # Bins of a tenth: 0.1 (n 2, confidence .15, accuracy .5), 0.8 (n 1, .85, 0), 0.9 (n 2, .975, 1).
    assert held.count.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1, 2]
    assert held.ece == pytest.approx((2 * 0.35 + 0.85 + 2 * 0.025) / 5)
    assert np.isnan(held.accuracy[0]) and held.accuracy[1] == 0.5


def test_outcomes_that_come_as_often_as_said_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    assert reliability(confidence, rng.random(20_000) < confidence).ece < 0.02
    assert reliability(confidence, rng.random(20_000) < confidence**3).ece > 0.15


@pytest.mark.parametrize("fit", [fit_platt, fit_isotonic])
def test_calibrators_mend_overconfidence_on_cases_not_seen(fit) -> None:
    rng = np.random.default_rng(1)
    said = rng.uniform(0.02, 0.98, 4000)
    right = rng.random(4000) < expit(0.5 * logit(said) - 0.7)
    calibrator = fit(said[:2000], right[:2000])
    before, after = reliability(said[2000:], right[2000:]).ece, reliability(calibrator(said[2000:]), right[2000:]).ece
    assert before > 0.1 and after < 0.04
    assert (np.diff(calibrator(np.linspace(0, 1, 50))) >= -1e-12).all()


def test_platt_finds_slope_and_offset_and_stays_finite() -> None:
    rng = np.random.default_rng(2)
    said = rng.uniform(0.01, 0.99, 50_000)
    found = fit_platt(said, rng.random(50_000) < expit(0.6 * logit(said) + 0.4))
    assert (found.slope, found.offset) == pytest.approx((0.6, 0.4), abs=0.05)
    separable = fit_platt([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert np.isfinite(separable([0.0, 0.5, 1.0])).all()
    one_sided = fit_platt([0.5, 0.6], [True, True])([0.5])[0]
    assert 0.5 < one_sided < 1


def test_equal_confidences_share_a_value() -> None:
    calibrator = fit_isotonic([0.5, 0.5, 0.5, 0.9], [True, False, False, True])
    assert calibrator([0.5])[0] == pytest.approx(1 / 3) and calibrator([0.99])[0] == 1


def test_risk_and_coverage_by_hand() -> None:
    curve = risk_coverage([0.9, 0.8, 0.8, 0.1], [True, True, False, False])
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0, 1 / 3, 0.5])
    assert curve.threshold.tolist() == [0.9, 0.8, 0.1]
    assert curve.area == pytest.approx((0 + 2 / 3 + 0.5) / 4)


def test_bad_confidences_are_refused() -> None:
    for confidences, right, message in (
        ([], [], "0 confidences"),
        ([0.5], [True, False], "1 confidences and 2 outcomes"),
        ([1.5], [True], "outside 0 to 1"),
        ([float("nan")], [True], "outside 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            reliability(confidences, right)


def test_sentences_end_at_stops_but_not_within_numbers() -> None:
    assert split_sentences("大小3.5cm。未见积液；\n结论：结节") == ["大小3.5cm。", "未见积液；\n", "结论：结节"]
    assert split_sentences("A 3.5 cm nodule. No effusion.") == ["A 3.5 cm nodule.", " No effusion."]
    assert split_sentences("") == []


@given(st.text(alphabet="右肺结节。；.!\n 3a", max_size=40))
def test_sentences_are_the_text_and_marks_take_nothing_out(text: str) -> None:
    pieces = split_sentences(text)
    assert "".join(pieces) == text
    marked = mark_unsure(text, [0.0] * len(pieces), 0.5)
    assert marked.replace(TO_CHECK["zh"], "") == text
    assert mark_unsure(text, [1.0] * len(pieces), 0.5) == text


def test_only_the_unsure_sentence_is_marked() -> None:
    text = "右肺结节。左侧胸腔积液。\n结论：结节。"
    assert mark_unsure(text, [0.9, 0.2, 0.9], 0.5) == "右肺结节。左侧胸腔积液。【待核实】\n结论：结节。"
    assert mark_unsure("A nodule. An effusion.", [0.1, 0.9], 0.5, "en") == "A nodule.[to be verified] An effusion."
    with pytest.raises(InputError, match="1 confidences for 3 sentences"):
        mark_unsure(text, [0.9], 0.5)


def test_reliability_diagram_is_drawn(tmp_path: Path) -> None:
    draw_reliability(reliability([0.2, 0.9, 0.7], [False, True, True]), tmp_path / "a" / "b.png", "test")
    assert (tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"
