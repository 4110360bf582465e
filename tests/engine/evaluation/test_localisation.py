"""Sides, heights and sizes by hand, and confidence of statements from made-up token probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from config.errors import InputError
from data.lesions import MeasuredLesion
from data.phantom.finding import Finding
from data.phantom.report import write_report
from data.report_language.labeller import label_report
from engine.evaluation.calibration import split_sentences
from engine.evaluation.confidence import (
    Labeller,
    content_words,
    is_right,
    log_probability,
    sentence_confidences,
    statements,
)
from engine.evaluation.confidence_scores import Judged, confidence_scores, ece_of_perfect
from engine.evaluation.localisation import MaskedCase, described, mask_scores, place_scores, whole_report_scores

ZH = Labeller("zh")


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
    labels = ([ZH(text) for text in texts] for texts in (references, reports))
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


def lesion(name: str, side: str, zone: str, size: float) -> MeasuredLesion:
    return MeasuredLesion(1, name, 100.0, size, side, zone, 1.0, 1.0, 1.0)


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


# ------------------------------------------------------------------ confidence

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
    assert said[0].signs == pytest.approx((0, math.log(0.5), math.log(0.3), 1, 0)), "finding, place, size"
    assert said[1].signs == pytest.approx((math.log(0.2), 0, 0, 0, 0))


def test_samples_that_agree() -> None:
    samples = ["所见：右肺上野见13mm结节。", "所见：右肺上野见30mm结节。", "所见：左肺空洞。", "双肺未见异常。"]
    said = statements(TEXT, ZH, characters(TEXT), [0.0] * len(TEXT), samples)
    assert said[0].signs[4] == 0.25 and said[1].signs[4] == 0 and said[2].signs[4] == 0.5


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
    with pytest.raises(InputError, match="'tumour' is no finding"):
        Labeller("zh", {"miliary": "tumour"})


def test_a_sentence_is_as_sure_as_its_least_sure_statement() -> None:
    said = statements(TEXT, ZH, characters(TEXT), [0.0] * len(TEXT))
    assert sentence_confidences(TEXT, said, [0.9, 0.3, 0.6]) == [0.9, 0.3, 0.6, 1.0]
    both = "右肺结节，左肺空洞。未见异常。"
    said = statements(both, ZH, characters(both), [0.0] * len(both))
    assert sentence_confidences(both, said, [0.9, 0.4]) == [0.4, 1.0] and len(split_sentences(both)) == 2


def judged(n: int, seed: int) -> Judged:
    """Statements that are right as often as 0.2 + 0.6 · p(words), whatever is said of p(size)."""
    rng = np.random.default_rng(seed)
    words = np.log(rng.uniform(0.05, 1, n))
    signs = np.stack([words, *[np.zeros(n)] * 4], 1)
    return Judged(np.arange(n) // 2, np.exp(words), signs, rng.random(n) < 0.2 + 0.6 * np.exp(words))


def test_confidence_is_calibrated_on_other_cases() -> None:
    found = confidence_scores(judged(4000, 1), judged(2000, 2), "validation")
    card = found.as_dict()
    assert card["ece_before"] > 0.05 > card["ece"] and card["calibrated_on"] == "validation (2000 statements)"
    assert card["risk_coverage"][9]["risk"] < card["risk_coverage"][-1]["risk"] - 0.05
    assert card["risk_coverage"][-1]["coverage"] == 1 and sum(b["count"] for b in card["reliability"]) == 4000
    assert card["calibrator"]["weights"][1:] == [0, 0, 0, 0]


def test_ece_of_perfect_calibration_falls_with_statements() -> None:
    few, many = (ece_of_perfect(np.random.default_rng(0).random(n)) for n in (100, 10_000))
    assert 0.08 < few < 0.13 and many < 0.015
    assert ece_of_perfect(np.ones(50)) == 0


def test_without_another_table_folds_of_cases_are_held_out() -> None:
    card = confidence_scores(judged(3000, 3), None, "").as_dict()
    assert card["ece"] < 0.05 and "cross-fitted over 5 folds" in card["calibrated_on"]


def test_too_few_statements_are_not_calibrated() -> None:
    few = confidence_scores(judged(40, 1), judged(10, 2), "validation")
    assert few.calibrator is None and "fewer than 30" in few.calibrated_on
    none = confidence_scores(Judged.of([], []), None, "")
    assert none.as_dict()["ece"] is None and none.as_dict()["statements"] == 0
