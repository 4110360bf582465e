"""The verdict from its four criteria, differences between conditions by hand, and corrected findings prompts."""

from __future__ import annotations

import numpy as np
import pytest

from data.findings import FindingRecord
from data.report_language.key_points import point_key, write_key_points
from data.report_language.labeller import label_report
from engine.evaluation.bootstrap import Score
from engine.evaluation.image_dependence import (
    KINDS,
    VERDICTS,
    correct,
    correction_scores,
    false_findings_on_normal,
    follows,
    judge,
    loss_gap,
    macro_difference,
)

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


# ---------------------------------------------------------------------------- corrected findings prompts

NAMES = ["nodule", "cavity", "effusion"]
NODULE = FindingRecord("nodule", side="right", zone="upper", size_mm=12.0)
CAVITY = FindingRecord("cavity", side="left", zone="lower", size_mm=30.0)
EFFUSION = FindingRecord("effusion", side="left", size_mm=25.0)


def test_one_point_is_changed_and_the_others_stay() -> None:
    seen = set()
    for seed in range(200):
        said = [NODULE, CAVITY, EFFUSION]
        asked, kind, point = correct(said, NAMES, np.random.default_rng(seed))
        seen.add(kind)
        kept = [one for one in asked if one in said]
        assert len(kept) == 2
        if kind == "presence":
            assert len(asked) == 2 and point in said
        else:
            assert point in asked and point not in said
            assert sum(a != b for a, b in zip(map(point_key, asked), map(point_key, said), strict=True)) == 1
            assert point.finding != "effusion" or kind in ("side", "size")
    assert seen == set(KINDS)


def test_nothing_said_gets_a_point() -> None:
    asked, kind, point = correct([], NAMES, np.random.default_rng(0))
    assert asked == [point] and kind == "presence" and point.finding in ("nodule", "cavity")


def test_a_finding_that_is_the_only_one_is_not_changed_to_another() -> None:
    kinds = {correct([NODULE], ["nodule", "effusion"], np.random.default_rng(seed))[1] for seed in range(60)}
    assert kinds == {"presence", "side", "level", "size"}


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ([NODULE, CAVITY], (True, True)),
        ([CAVITY], (False, True)),
        ([NODULE], (True, False)),
        ([NODULE, CAVITY, EFFUSION], (True, False)),
        ([], (False, False)),
    ],
)
def test_a_report_is_held_against_the_corrected_prompt(report, expected) -> None:
    record = {"asked": [NODULE.to_dict(), CAVITY.to_dict()], "kind": "size", "point": NODULE.to_dict()}
    text = "所见：" + write_key_points(report, "zh").removeprefix("已知：")
    assert follows(record, label_report(text, "zh")) == expected


@pytest.mark.parametrize(("report", "expected"), [([CAVITY], (True, True)), ([CAVITY, NODULE], (False, True))])
def test_a_point_taken_out_must_be_gone(report, expected) -> None:
    record = {"asked": [CAVITY.to_dict()], "kind": "presence", "point": NODULE.to_dict()}
    text = "所见：" + write_key_points(report, "zh").removeprefix("已知：")
    stated = label_report(text, "zh")
    assert follows(record, stated) == expected
    scores = correction_scores([record], [stated])
    assert scores["changed"].value == expected[0] and scores["by_kind"]["presence"]["n"] == 1
