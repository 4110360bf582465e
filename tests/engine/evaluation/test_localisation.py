"""Sides, craniocaudal levels and sizes by hand, against references and against masks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.findings import FindingRecord, Measurement
from data.phantom.finding import Finding
from data.phantom.report import write_report
from data.report_language.labeller import label_report
from engine.evaluation.localisation import MaskedCase, described, mask_scores, place_scores, whole_report_scores


def places(references: list[str], reports: list[str]) -> dict[str, float]:
    found = place_scores([label_report(t) for t in references], [label_report(t) for t in reports])
    return {name: score.value for name, score in found.items()}


def test_places_and_sizes_by_hand() -> None:
    truth = "所见：右肺上野见12mm结节。左肺下野见30mm空洞。结论：右肺上野结节，左肺下野空洞。"
    assert places([truth], [truth]) == dict.fromkeys(places([truth], [truth]), 1.0)
    found = places([truth], ["所见：右肺上野见15mm结节。左肺中野见34mm空洞。"])
    assert found["location_acc"] == 0.5 and found["size_within_3mm"] == 0.5
    # Another name in the right place: the place counts, but not among findings named rightly.
    found = places([truth], ["所见：右肺上野见12mm肿块。"])
    assert found["location_acc"] == 0.5 and math.isnan(found["location_acc_found"])
    assert places([truth], ["双肺未见异常。"])["location_acc"] == 0
    assert math.isnan(places(["双肺未见异常。"], [truth])["location_acc"])


def test_pairs_are_one_to_one_and_the_nearest() -> None:
    truth = "所见：右肺上野见10mm结节。右肺上野见20mm结节。"
    assert places([truth], ["所见：右肺上野见21mm结节。右肺上野见9mm结节。"])["size_within_3mm"] == 1
    assert places([truth], ["所见：右肺上野见9mm结节。"])["size_within_3mm"] == 0.5


def test_what_a_report_describes() -> None:
    assert [m.finding for m in described(label_report("所见：右肺结节。结论：空洞。建议：随访肿块。"))] == ["nodule"]
    assert [m.finding for m in described(label_report("右肺结节，未见空洞，实变可能。"))] == ["nodule"]
    assert [m.finding for m in described(label_report("所见：双肺清晰。结论：空洞。"))] == ["cavity"]


NODULE, EFFUSION = Finding("nodule", "right", "upper", 12), Finding("effusion", "left", "lower", 25)


def report(*found: Finding) -> str:
    return write_report(found, np.random.default_rng(0))


def whole(references: list[str], reports: list[str]) -> dict[str, float]:
    labels = ([label_report(text) for text in texts] for texts in (references, reports))
    return {name: score.value for name, score in whole_report_scores(*labels, reports, "zh").items()}


def test_whole_reports_by_hand() -> None:
    reports = [
        report(Finding("nodule", "right", "upper", 16)),  # all right, 4 mm off
        report(Finding("nodule", "right", "upper", 17)),  # size wrong
        report(Finding("cavity", "right", "upper", 12)),  # type wrong
        report(Finding("nodule", "left", "upper", 12)),  # side wrong
        report(NODULE) + "\ufffd",  # garbled
        report(),  # right
        report(NODULE),  # a finding in a healthy chest
    ]
    assert whole([report(NODULE)] * 5 + [report()] * 2, reports) == {
        "location_acc": pytest.approx(3 / 5),
        "type_acc": pytest.approx(4 / 7),
        "size_within_4mm": pytest.approx(3 / 5),
        "exact_acc": pytest.approx(2 / 7),
        "garbled_rate": pytest.approx(1 / 7),
        "missed_lesion_rate": 0.0,
    }


@pytest.mark.parametrize(
    ("text", "exact", "location", "kind"),
    [
        (report(EFFUSION, NODULE), 1, 1, 1),  # order does not matter
        (report(NODULE), 0, 0.5, 0.5),
        (report(NODULE, EFFUSION, Finding("cavity", "left", "middle", 30)), 0, 1, 1),
        ("所见：右上肺野可见一1.2cm结节，未见空洞，无钙化。左侧胸腔积液，深约25 毫米。结论：左肺下野空洞。", 1, 1, 1),
    ],
)
def test_whole_reports_of_several_findings(text: str, exact: float, location: float, kind: float) -> None:
    scores = whole([report(NODULE, EFFUSION)], [text])
    assert (scores["exact_acc"], scores["location_acc"], scores["type_acc"]) == (exact, location, kind)


@pytest.mark.parametrize(
    ("text", "garbled"),
    [
        ("所见：右肺上野见结节影，直径约12mm", 0),  # cut off before the end
        ("所见：双肺未见异常密度影。未见胸腔积液。结论：正常。", 0),
        ("Findings: Both lungs are clear. No pleural effusion.", 1),  # another language than the references
        ("所见：右肺上野见结节影。结论：双肺正常。", 1),  # no size
        ("所见：右肺右肺右肺右肺", 1),
        ("", 1),
    ],
)
def test_a_report_is_garbled_that_states_neither_a_finding_in_full_nor_normal_lungs(text: str, garbled: int) -> None:
    assert whole([report(NODULE)], [text])["garbled_rate"] == garbled


def test_cases_whose_reference_is_not_in_full_are_left_out() -> None:
    scores = whole(["所见：右肺结节。", report()], [report(NODULE), report()])
    assert scores["exact_acc"] == 1 and math.isnan(scores["location_acc"])


def lesion(name: str, side: str, zone: str, size: float) -> FindingRecord:
    measured = Measurement(1, 100.0, None, 1.0, 1.0, 1.0)
    return FindingRecord(name, side=side, zone=zone, size_mm=size, source="mask", measured=measured)


def test_statements_against_masks_by_hand() -> None:
    held = MaskedCase([lesion("nodule", "right", "upper", 12.0), lesion("cavity", "left", "lower", 30.0)])
    reports = [label_report("所见：右肺上野见14mm结节。左肺中野见20mm空洞。右侧胸腔积液，深约20mm。")]
    found = {name: (score.value, score.n) for name, score in mask_scores([held], reports).items()}
    # The effusion is on the side of some lesion; its depth is compared with nothing.
    assert found["side_acc"] == (1.0, 3) and found["zone_acc"] == (0.5, 2) and found["size_within_3mm"] == (0.5, 2)
    unmeasured = mask_scores([None, MaskedCase([], "no lungs")], reports * 2)
    assert all(score.n == 0 and math.isnan(score.value) for score in unmeasured.values())
    empty = mask_scores([MaskedCase([])], reports)
    assert empty["side_acc"].value == 0
