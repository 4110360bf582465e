"""Sides, craniocaudal levels and sizes by hand, against references and against masks."""

from __future__ import annotations

import math

from data.lesion_measure import Lesion
from data.report_language.labeller import label_report
from engine.evaluation.localisation import MaskedCase, described, mask_scores, place_scores


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


def lesion(name: str, side: str, zone: str, size: float) -> Lesion:
    return Lesion(1, name, 100.0, size, side, zone, 1.0, 1.0, 1.0)


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
