"""Precision, recall and F1 of findings by hand; chance; macro over what references state."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from data.report_language.labeller import label_report
from data.report_language.terms import FINDINGS
from engine.evaluation.finding_metrics import clinical_scores, constant_floors, crg, finding_scores, label_matrix

REFERENCES = ["右肺结节。", "右肺结节，左肺空洞。", "左侧胸腔积液。", "双肺未见异常。"]
REPORTS = ["右肺结节。", "右肺结节。", "左肺实变。", "未见结节。"]


def scores(references: list[str], reports: list[str]) -> dict[str, Any]:
    return clinical_scores(*([label_report(text) for text in texts] for texts in (references, reports)))


def test_scores_by_hand() -> None:
    found = scores(REFERENCES, REPORTS)
    rows = {row["finding"]: row for row in found["by_finding"]}
    assert set(rows) == {"nodule", "cavity", "effusion", "consolidation"}
    assert [rows["nodule"][name] for name in ("precision", "recall")] == [1, 1] and rows["nodule"]["f1"].value == 1
    assert [rows["cavity"][name] for name in ("references", "reports", "recall")] == [1, 0, 0]
    assert math.isnan(rows["cavity"]["precision"]) and rows["cavity"]["f1"].value == 0
    assert rows["consolidation"]["precision"] == 0 and math.isnan(rows["consolidation"]["recall"])
    # Macro over the three that references state; micro over all pairs: 2 right of 4 stated and 3 claimed.
    assert found["macro_f1"].value == pytest.approx(1 / 3)
    assert found["micro_precision"].value == pytest.approx(2 / 3)
    assert found["micro_recall"].value == pytest.approx(2 / 4)
    assert found["micro_f1"].value == pytest.approx(2 * 2 / 7)


def test_a_negated_finding_is_not_stated_and_an_uncertain_one_is() -> None:
    reports = [label_report("未见结节。"), label_report("结节可能。"), label_report("建议：随访结节。")]
    k = FINDINGS.index("nodule")
    assert label_matrix(reports)[:, k].tolist() == [False, True, False]
    assert label_matrix(reports, ["recommendation"])[:, k].tolist() == [False, False, True]
    assert label_matrix([]).shape == (0, len(FINDINGS))


def test_chance_is_that_of_dealt_reports() -> None:
    """Half the cases with a nodule, half with an effusion: dealt at random, F1 is about one half."""
    texts = ["右肺结节。", "左侧胸腔积液。"] * 40
    right = scores(texts, texts)
    assert right["macro_f1"].value == 1 and right["macro_f1"].low == 1
    assert right["chance"].value == pytest.approx(0.5, abs=0.03)
    assert right["p_value"] == pytest.approx(1 / 1001)
    blind = scores(texts, ["右肺结节。"] * 80)
    assert blind["macro_f1"].value == pytest.approx((2 / 3) / 2)
    assert blind["chance"].value == pytest.approx(blind["macro_f1"].value) and blind["p_value"] == 1


def test_interval_holds_the_value_and_narrows_with_cases() -> None:
    widths = []
    for times in (10, 160):
        rng = np.random.default_rng(1)
        truth = ["右肺结节。", "左侧胸腔积液。"] * times
        reports = [text if rng.random() < 0.8 else "双肺未见异常。" for text in truth]
        found = scores(truth, reports)["macro_f1"]
        assert found.low < found.value < found.high
        widths.append(found.high - found.low)
    assert widths[1] < widths[0] / 2


def test_no_finding_anywhere_has_no_score() -> None:
    found = scores(["双肺未见异常。"] * 3, ["未见异常。"] * 3)
    assert found["by_finding"] == [] and math.isnan(found["macro_f1"].value) and found["p_value"] == 1


def test_crg_by_hand() -> None:
    # 20 cells, 4 positive: w = 16 / 8 = 2, U = 8. 3 of 4 found, 2 false: s = 2 * 3 - 2 * 1 - 2 = 2, CRG = 8 / 14.
    assert crg(np.array([[3, 4, 5], [4, 4, 4]]), 20).tolist() == [pytest.approx(8 / 14), 1]
    assert math.isnan(crg(np.array([[0, 0, 1]]), 20)[0]), "without a positive there is no score"


@pytest.mark.parametrize("cases", [7, 40])
def test_floors_of_reports_that_state_nothing_or_everything(cases: int) -> None:
    references = [label_report(REFERENCES[case % 4]) for case in range(cases)]
    floors = constant_floors(references)
    for floor in floors.values():
        assert floor["crg"].value == 1 / 3 and set(floor["crg"].resampled[np.isfinite(floor["crg"].resampled)]) == {
            1 / 3
        }
    assert floors["all_negative"]["macro_f1"].value == 0 and floors["all_negative"]["micro_f1"].value == 0
    truth = label_matrix(references)
    known = truth.mean(0)[truth.any(0)]
    assert floors["all_positive"]["macro_f1"].value == pytest.approx((2 * known / (1 + known)).mean())
    assert finding_scores(truth, truth)["crg"].value == 1


def test_crg_of_permuted_reports() -> None:
    texts = ["右肺结节。", "左侧胸腔积液。"] * 40
    right = scores(texts, texts)
    assert right["crg"].value == 1 and 1 / 3 < right["crg_chance"].value < 0.6
