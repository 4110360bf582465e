"""The verdict from its four criteria, and differences between conditions by hand."""

from __future__ import annotations

import pytest

from data.report_language.labeller import label_report
from engine.evaluation.bootstrap import Score
from engine.evaluation.image_dependence import VERDICTS, false_findings_on_normal, judge, loss_gap, macro_difference

UP, FLAT, GAP, SMALL_GAP = (
    Score(value, low, high, 100)
    for value, low, high in ((0.3, 0.2, 0.4), (0.0, -0.1, 0.1), (0.2, 0.1, 0.3), (0.005, 0.004, 0.006))
)
DOWN = Score(-0.2, -0.3, -0.1, 100, "exact_acc")


@pytest.mark.parametrize(
    ("arguments", "verdict"),
    [
        ((100, 0.001, UP, UP, GAP, 0.1), "depends"),
        ((100, 0.001, UP, UP, SMALL_GAP, 0.1), "partly"),
        ((100, 0.5, FLAT, FLAT, GAP, 0.1), "partly"),
        ((100, 0.5, FLAT, FLAT, FLAT, 0.1), "independent"),
        ((100, 0.001, UP, UP, GAP, 0.97), "independent"),
        ((19, 0.001, UP, UP, GAP, 0.1), "unclear"),
    ],
)
def test_verdicts(arguments: tuple, verdict: str) -> None:
    assert judge(*arguments)[0] == verdict


@pytest.mark.parametrize(
    ("cases", "gap", "copied", "verdict"),
    [
        (100, GAP, {"nearest": UP, "lookup": UP, "frequent": UP}, "depends"),
        (100, GAP, {"nearest": FLAT}, "depends"),
        (100, GAP, {"nearest": DOWN, "lookup": DOWN, "frequent": UP}, "below_nearest"),
        (100, SMALL_GAP, {"nearest": FLAT, "lookup": UP, "frequent": DOWN}, "below_frequent"),
        (19, GAP, {"nearest": DOWN}, "unclear"),
    ],
)
def test_reports_below_copied_ones(cases: int, gap: Score, copied: dict[str, Score], verdict: str) -> None:
    code, reasons = judge(cases, 0.001, UP, UP, gap, 0.1, copied)
    assert code == verdict
    for reason, score in zip(reasons[-len(copied) :], copied.values(), strict=True):
        assert reason.startswith("yes: " if score is UP else "no: ") and f"{score.value:+.3f}" in reason
    if verdict == "below_nearest":
        assert VERDICTS[code] == "the reports are below copying the nearest training case's report"
        assert "exact_acc is above copying the nearest training case's report (-0.200" in reasons[-3]


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
