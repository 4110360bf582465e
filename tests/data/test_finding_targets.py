"""Pairs of stated and measured findings, targets of the findings head, and prompts that err as held-out cases do."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.finding_targets import (
    LEAST_POSITIVE,
    MOST_LESIONS,
    TYPICAL_MM,
    UNKNOWN,
    PromptErrors,
    descriptors,
    learnable,
    pair_findings,
    targets,
)
from data.findings import DESCRIPTORS, LABELS, LESION, FindingRecord, Measurement

NAMES = ("nodule", "effusion")


def stated(finding: str = "nodule", side: str | None = "right", zone: str | None = "upper", mm: float | None = 12.0):
    return FindingRecord(finding, side=side, zone=zone, size_mm=mm)


def lesion(side: str | None = "right", zone: str | None = "upper", mm: float = 12.0, thick: float = 8.0):
    measured = Measurement(1, mm**3 / 2, -100.0, 5.0, 6.0, 7.0, (-300.0, -80.0, 40.0), -700.0, thick, mm, 0.8, 0.2, 0.5)
    return FindingRecord(LESION, side=side, zone=zone, size_mm=mm, count=1, source="segmentation", measured=measured)


# ------------------------------------------------------------------ pairs


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"side": "left"}, False),
        ({"side": None}, True),
        ({"zone": "middle"}, True),  # a report and a measurement may differ by one step
        ({"zone": "lower"}, False),
        ({"zone": None}, True),
        ({"mm": 29.0}, True),
        ({"mm": 31.0}, False),  # 2.5 · 12 = 30
        ({"mm": 5.0}, True),
        ({"mm": 4.5}, False),
    ],
)
def test_which_lesions_can_be_the_same(changes: dict, same: bool) -> None:
    a, b = stated(), lesion(**changes)
    assert pair_findings([a], [b]) == ([(a, b)] if same else [(a, None), (None, b)])


def test_bilateral_is_on_either_side() -> None:
    a = stated("effusion", side="bilateral", zone=None, mm=None)
    for side in ("left", "right"):
        assert pair_findings([a], [b := lesion(side)]) == [(a, b)]


def test_an_effusion_is_compared_by_its_depth() -> None:
    a, b = stated("effusion", zone=None, mm=20.0), lesion(mm=120.0, thick=18.0)
    assert pair_findings([a], [b]) == [(a, b)]
    assert pair_findings([stated(mm=20.0)], [b])[0][1] is None, "of a nodule the diameter counts"


def test_pairs_are_one_to_one_and_agree_in_as_much_as_possible() -> None:
    """Two nodules of one place and two lesions: each of its own size, whatever the order."""
    small, large = stated(mm=8.0), stated(mm=16.0)
    one, other = lesion(mm=8.5), lesion(mm=15.0)
    for measured in ([one, other], [other, one]):
        assert sorted(pair_findings([small, large], measured), key=lambda pair: pair[0].size_mm) == [
            (small, one), (large, other),
        ]  # fmt: skip
    pairs = pair_findings([small], [one, other])
    assert pairs == [(small, one), (None, other)]
    assert pair_findings([], [one]) == [(None, one)] and pair_findings([small], []) == [(small, None)]


# ------------------------------------------------------------------ targets


def test_targets_of_a_case() -> None:
    report = [stated(mm=12.0), stated(mm=8.0, side="left", zone=None), stated("cavity", side="left", zone="lower")]
    measured = [lesion("left", "lower"), lesion(mm=10.0), lesion("left", "upper", mm=50.0)]
    found = targets(NAMES, report, measured)
    assert found.presence == [1, 0]
    assert found.side == [1, UNKNOWN] and found.zone == [0, UNKNOWN], "of the largest nodule"
    assert found.size[0] == pytest.approx(math.log(12 / TYPICAL_MM)) and math.isnan(found.size[1])
    # A cavity is none of the head's findings, and no false lesion; then the nodule; then a false lesion.
    assert found.lesion == [UNKNOWN, 0, len(NAMES), *[UNKNOWN] * (MOST_LESIONS - 3)]


def test_nothing_is_known_without_a_report_that_can_be_read() -> None:
    found = targets(NAMES, None, [lesion()])
    assert {*found.presence, *found.side, *found.zone, *found.lesion} == {UNKNOWN}
    assert all(map(math.isnan, found.size))
    normal = targets(NAMES, [], [lesion()])
    assert normal.presence == [0, 0] and normal.lesion[0] == len(NAMES)


def test_lesions_beyond_the_most_are_left_out() -> None:
    many = [lesion(mm=30.0 - k) for k in range(MOST_LESIONS + 2)]
    assert len(targets(NAMES, [], many).lesion) == len(descriptors(many)) == MOST_LESIONS
    rows = descriptors([lesion()])
    assert all(len(row) == DESCRIPTORS for row in rows) and rows[0][-1] == 1
    assert rows[1:] == [[0.0] * DESCRIPTORS] * (MOST_LESIONS - 1)
    assert rows[0][LABELS + 3] == pytest.approx(math.log(12 / 15)), "sizes are logarithms beside 15 mm"
    assert rows[0][:LABELS] == [1.0] + [0.0] * (LABELS - 1), "label 1"
    assert rows[0][LABELS : LABELS + 3] == pytest.approx([0.6, -0.6, 0.0]), "places are from -1 to 1"


def test_learnable_findings_are_stated_often_enough() -> None:
    reports = (
        [[stated(), stated()]] * LEAST_POSITIVE + [[stated("effusion")]] * (LEAST_POSITIVE - 1) + [[lesion()]] * 20
    )
    assert learnable(reports) == (["nodule"], {"effusion": LEAST_POSITIVE - 1}), "reports count, not mentions"


# ------------------------------------------------------------------ errors of prompts


def planted(cases: int = 400) -> PromptErrors:
    """Of every 20 nodules 2 missed, 3 taken for a cavity, 1 on both sides, 4 a level too low; sizes a tenth too large;
    3 false lesions in every 10 cases."""
    report, prompts = [], []
    for k in range(cases):
        truth, said = stated(), [stated(mm=13.2)]
        if k % 20 < 2:
            said = []
        elif k % 20 < 5:
            said = [stated("cavity", mm=13.2)]
        elif k % 20 == 5:
            said = [stated(side="bilateral", mm=13.2)]
        elif k % 20 < 10:
            said = [stated(zone="middle", mm=13.2)]
        said += [FindingRecord("opacity", side="left", zone="lower", size_mm=40.0)] * (k % 10 < 3)
        report.append([truth])
        prompts.append(said)
    return PromptErrors.of(report, prompts)


def test_rates_are_those_that_were_planted() -> None:
    expected = {"missed": 0.1, "finding": 3 / 18, "side": 1 / 18, "level": 4 / 18, "false": 0.3}
    assert planted().rates() == pytest.approx(expected)
    assert PromptErrors().rates() == dict.fromkeys(expected, 0.0)


def test_drawn_prompts_err_at_these_rates() -> None:
    errors, rng = planted(), np.random.default_rng(0)
    drawn = [errors.draw([stated()], rng) for _ in range(3000)]
    rates = PromptErrors.of([[stated()]] * len(drawn), drawn).rates()
    assert rates == pytest.approx(errors.rates(), abs=0.03)
    said = [f for prompt in drawn for f in prompt]
    assert {f.finding for f in said} == {"nodule", "cavity", "opacity"}
    # A tenth is no systematic error: the size that was measured is to be stated.
    assert {f.size_mm for f in said} == {12.0, 40.0}
    assert {f.side for f in said if f.size_mm == 12} == {"right", "bilateral"}


def test_false_lesions_may_be_several_a_case() -> None:
    specks = [FindingRecord("opacity", side="left", zone=zone, size_mm=6.0) for zone in ("lower", "upper")]
    errors, rng = PromptErrors.of([[]] * 20, [specks] * 20), np.random.default_rng(0)
    counts = [len(errors.draw([], rng)) for _ in range(1000)]
    assert np.mean(counts) == pytest.approx(2, abs=0.15) and 0 in counts


def test_draws_follow_their_seed() -> None:
    errors = planted()
    first, again, other = (
        [errors.draw([stated(), stated("effusion", "left", None, 30.0)], np.random.default_rng(seed)) for _ in range(5)]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_the_truth_is_never_shown_alone() -> None:
    """Whatever few held-out cases say, and without any."""
    rng = np.random.default_rng(0)
    for errors in (PromptErrors(), PromptErrors.of([[stated()]] * 5, [[stated()]] * 5)):
        drawn = [errors.draw([stated()], rng) for _ in range(400)]
        assert (
            np.mean([[(f.finding, f.side, f.zone) for f in d] != [("nodule", "right", "upper")] for d in drawn]) > 0.05
        )
        assert any(not d for d in drawn), "missed"


def test_a_network_of_one_class_names_every_finding_lesion() -> None:
    """Also one that no held-out case has; and the diameter of an effusion is no size of a nodule."""
    nodules = [([stated()], [lesion(mm=12.0)])] * 10
    effusions = [([stated("effusion", "left", None, 20.0)], [lesion("left", "lower", mm=120.0, thick=20.0)])] * 10
    errors = PromptErrors.of(*map(list, zip(*nodules, *effusions, strict=True)))
    rng = np.random.default_rng(0)
    for truth, size in ((stated(), 12), (stated("effusion", "left", None, 20.0), 120), (stated("cavity"), None)):
        said = [
            f for _ in range(50) for f in errors.draw([truth], rng) if f.side == truth.side and f.source == "report"
        ]
        assert {f.finding for f in said} == {LESION}
        assert size is None or {f.size_mm for f in said} == {size}


@pytest.mark.parametrize(
    ("report", "names"),
    [
        (FindingRecord("nodule", side="bilateral", size_mm=12.0, count=0), [0, 0, 0]),
        (FindingRecord("nodule", side="right", zone="upper", size_mm=12.0, count=2), [0, 0, len(NAMES)]),
        (FindingRecord("nodule", side="right", zone="upper", size_mm=12.0, count=1), [0, len(NAMES), len(NAMES)]),
        (FindingRecord("effusion", side="bilateral"), [1, 1, 1]),
    ],
)
def test_lesions_that_a_report_states_together_are_not_false_ones(report: FindingRecord, names: list[int]) -> None:
    measured = [lesion(mm=12.0, thick=12.0), lesion(mm=4.0), lesion(side="left", mm=5.0)]
    assert targets(NAMES, [report], measured).lesion[:3] == names
    false = PromptErrors.of([[report]], [measured]).rates()["false"]
    assert false == names.count(len(NAMES)), "nor are they false in a prompt"
