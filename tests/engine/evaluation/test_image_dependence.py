"""The verdict from its four criteria, and differences between conditions by hand."""

from __future__ import annotations

import pytest

from data.report_language.labeller import label_report
from engine.evaluation.bootstrap import Score
from engine.evaluation.image_dependence import false_findings_on_normal, judge, loss_gap, macro_difference


def score(value: float, low: float, high: float) -> Score:
    return Score(value, low, high, 100)


def test_verdicts_in_between() -> None:
    up, flat = score(0.3, 0.2, 0.4), score(0.0, -0.1, 0.1)
    gaps = {"shuffled": score(0.2, 0.1, 0.3)}
    both = {"shuffled": up, "prior": up}
    assert judge(100, 0.001, both, gaps, 0.1).code == "depends"
    assert judge(100, 0.001, both, {"shuffled": score(0.005, 0.004, 0.006)}, 0.1).code == "partly"
    assert judge(100, 0.5, {"shuffled": flat, "prior": flat}, gaps, 0.1).code == "partly"
    assert judge(100, 0.5, {"shuffled": flat, "prior": flat}, {"shuffled": flat}, 0.1).code == "independent"
    assert judge(100, 0.001, both, gaps, 0.97).code == "independent"
    assert judge(19, 0.001, both, gaps, 0.1).code == "unclear"


def test_differences_and_gaps_by_hand() -> None:
    texts = ["右肺结节。", "左侧胸腔积液。"] * 20
    truth = [label_report(text) for text in texts]
    wrong = [label_report("右肺结节。")] * 40
    difference = macro_difference(truth, truth, wrong)
    assert difference.value == pytest.approx(1 - (2 / 3) / 2) and difference.low > 0.5
    assert macro_difference(truth, wrong, wrong).value == 0
    own = [{"nats": 1.0, "tokens": 10}, {"nats": 2.0, "tokens": 30}]
    other = [{"nats": 3.0, "tokens": 10}, {"nats": 6.0, "tokens": 30}]
    assert loss_gap(own, other).value == pytest.approx((2 + 4) / 40)
    normal = false_findings_on_normal([[], [], truth[0]], [truth[0], [], []])
    assert normal.value == 0.5 and normal.n == 2
