"""One point of a findings prompt changed, and whether a report follows."""

from __future__ import annotations

import numpy as np
import pytest

from data.findings import FindingRecord
from data.report_language.key_points import point_key, write_key_points
from data.report_language.labeller import label_report
from engine.evaluation.corrections import KINDS, correct, correction_scores, follows

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
