"""Statements and marks from made-up token probabilities; ECE, risk and calibrators by hand, on held-out cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from data.report_language.sections import split_sentences
from engine.evaluation.confidence import (
    TO_CHECK,
    Labeller,
    Outcomes,
    Statement,
    confidence_scores,
    content_words,
    ece_of_perfect,
    fit_logistic,
    is_right,
    log_probability,
    mark_unsure,
    reliability,
    risk_coverage,
    statements,
)

ZH = Labeller("zh")
TEXT = "所见：右肺上野见12mm结节，边缘光滑。左侧胸腔积液。结论：结节可能性大。建议：随访结节。"


def characters(text: str) -> list[tuple[int, int]]:
    return [(k, k + 1) for k in range(len(text))]


def test_only_the_words_of_a_statement_count() -> None:
    log_probs = np.zeros(len(TEXT))
    at = TEXT.index("光滑")
    log_probs[at : at + 2] = -5  # how a margin is put says nothing of whether the nodule is there
    said = statements(TEXT, ZH, characters(TEXT), log_probs.tolist())
    assert [s.mention.finding for s in said] == ["nodule", "effusion", "nodule"]
    assert [s.sentence for s in said] == [0, 1, 2] and [s.raw for s in said] == [1, 1, 1]
    log_probs[TEXT.index("12")] = math.log(0.3)
    log_probs[TEXT.index("右")] = math.log(0.5)
    log_probs[TEXT.index("积液")] = math.log(0.2)
    said = statements(TEXT, ZH, characters(TEXT), log_probs.tolist())
    assert [s.raw for s in said] == pytest.approx([0.15, 0.2, 1.0])
    assert said[0].features == pytest.approx((0, math.log(0.5), math.log(0.3), 1, 0)), "finding, place, size"
    assert said[1].features == pytest.approx((math.log(0.2), 0, 0, 0, 0))


def test_samples_that_agree() -> None:
    samples = ["所见：右肺上野见13mm结节。", "所见：右肺上野见30mm结节。", "所见：左肺空洞。", "双肺未见异常。"]
    said = statements(TEXT, ZH, characters(TEXT), [0.0] * len(TEXT), samples)
    assert said[0].features[4] == 0.25 and said[1].features[4] == 0 and said[2].features[4] == 0.5


def test_clauses_without_a_finding_belong_to_their_neighbour() -> None:
    groups = content_words("右肺上叶，见结节，大小约12mm；左肺未见空洞，积液。", "zh")
    words = [["右肺上叶，见结节，大小约12mm；左肺未见空洞，积液。"[w.start : w.end] for w in g] for g in groups]
    assert len(words) == 3 and "右肺上叶" in "".join(words[0]) and "12mm" in words[0]
    assert "未见" in words[1]
    assert log_probability([], [], []) < -10


@pytest.mark.parametrize(
    ("stated", "right"),
    [
        ("所见：右肺上野见13mm结节。", True),
        ("所见：右肺上野见16mm结节。", False),  # the impression without a size does not bear it out
        ("所见：右肺见结节。", True),
        ("所见：左肺上野见12mm结节。", False),
        ("所见：空洞。", False),
        ("所见：未见空洞。", True),
        ("所见：未见结节。", False),
        ("所见：结节可能。", True),
    ],
)
def test_which_statements_are_right(stated: str, right: bool) -> None:
    truth = ZH("所见：右肺上野见12mm结节。结论：右肺上野结节。建议：随访空洞。")
    assert is_right(ZH(stated)[0], truth) is right


def test_findings_counted_as_one() -> None:
    label = Labeller("zh", {"miliary": "nodule"})
    assert [m.finding for m in label("粟粒样小结节。")] == ["nodule"]


def test_sentences_end_at_stops_but_not_within_numbers() -> None:
    assert split_sentences("大小3.5cm。未见积液；\n结论：结节") == ["大小3.5cm。", "未见积液；\n", "结论：结节"]
    assert split_sentences("A 3.5 cm nodule. No effusion.") == ["A 3.5 cm nodule.", " No effusion."]
    assert split_sentences("") == []


@given(st.text(alphabet="右肺结节。；.!\n 3a", max_size=40), st.integers(0, 5))
def test_sentences_are_the_text_and_marks_take_nothing_out(text: str, sentence: int) -> None:
    assert "".join(split_sentences(text)) == text
    unsure = Statement(None, sentence, (), 0.0, (0.0,) * 5)
    assert mark_unsure(text, [unsure], [0.0], 0.5).replace(TO_CHECK["zh"], "") == text


@pytest.mark.parametrize(
    ("confidences", "marked"),
    [
        ([0.9, 0.4, 0.5, 0.9], "右肺结节，左肺空洞。【待核实】左侧胸腔积液。\n结论：结节。建议：随访。"),
        ([0.9, 0.6, 0.2, 0.9], "右肺结节，左肺空洞。左侧胸腔积液。【待核实】\n结论：结节。建议：随访。"),
        ([0.5, 0.5, 0.5, 0.5], "右肺结节，左肺空洞。左侧胸腔积液。\n结论：结节。建议：随访。"),
    ],
)
def test_a_sentence_is_as_sure_as_its_least_sure_statement(confidences: list[float], marked: str) -> None:
    text = marked.replace(TO_CHECK["zh"], "")
    said = statements(text, ZH, characters(text), [0.0] * len(text))
    assert mark_unsure(text, said, confidences, 0.5) == marked


def test_the_mark_is_in_the_language_of_the_report() -> None:
    text = "A nodule. An effusion."
    said = statements(text, Labeller("en"), characters(text), [0.0] * len(text))
    assert mark_unsure(text, said, [0.1, 0.9], 0.5, "en") == "A nodule.[to be verified] An effusion."


def test_ece_by_hand() -> None:
    ece, bins = reliability(np.array([0.15, 0.15, 0.95, 0.85, 1.0]), np.array([0, 1, 1, 0, 1]))
    # Bins of a tenth: 0.1 (n 2, confidence .15, accuracy .5), 0.8 (n 1, .85, 0), 0.9 (n 2, .975, 1).
    assert bins["count"].tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 1, 2]
    assert ece == pytest.approx((2 * 0.35 + 0.85 + 2 * 0.025) / 5)
    assert np.isnan(bins["right"][0]) and bins["right"][1] == 0.5


def test_outcomes_that_come_as_often_as_said_are_calibrated() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.random(20_000)
    assert reliability(confidence, rng.random(20_000) < confidence)[0] < 0.02
    assert reliability(confidence, rng.random(20_000) < confidence**3)[0] > 0.15


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
    area, curve = risk_coverage(np.array([0.9, 0.8, 0.8, 0.1]), np.array([True, True, False, False]))
    assert curve["coverage"].tolist() == [0.25, 0.75, 1.0]
    assert curve["risk"].tolist() == pytest.approx([0, 1 / 3, 0.5])
    assert curve["threshold"].tolist() == [0.9, 0.8, 0.1]
    assert area == pytest.approx((0 + 2 / 3 + 0.5) / 4)


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
    none = confidence_scores(Outcomes.of([], [], ZH), None, "")
    assert none.card["ece"] is None and none.card["statements"] == 0
