"""Reports of phantom findings: round trip, tolerance of the parser, definition of the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import InputError
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.report import finding_keys, parse_report, score_reports, write_report


def _finding(kind: str, side: str, zone: str, size: int) -> Finding:
    return Finding(kind, side, "lower" if kind == "effusion" else zone, size)


findings = st.lists(
    st.builds(
        _finding,
        st.sampled_from(LESION_TYPES),
        st.sampled_from(SIDES),
        st.sampled_from(ZONES),
        st.integers(5, 60),
    ),
    max_size=4,
)
NODULE = Finding("nodule", "right", "upper", 12)
EFFUSION = Finding("effusion", "left", "lower", 25)


@pytest.mark.parametrize("language", ["zh", "en"])
@settings(max_examples=1500, deadline=None)
@given(found=findings, seed=st.integers(0, 2**32))
def test_what_is_written_is_read_back(language: str, found: list[Finding], seed: int) -> None:
    text = write_report(found, np.random.default_rng(seed), language)
    assert parse_report(text, language) == found
    assert parse_report("前文 preface\n" + text + "\nand more, 12mm 结节", language) == found


def test_same_seed_same_words_and_wording_varies() -> None:
    texts = [write_report([NODULE], np.random.default_rng(seed)) for seed in range(60)]
    assert texts == [write_report([NODULE], np.random.default_rng(seed)) for seed in range(60)]
    assert len(set(texts)) > 25


def test_single_finding_report_is_compact_and_has_four_sections() -> None:
    for seed in range(50):
        for kind in LESION_TYPES:
            text = write_report([_finding(kind, "left", "middle", 33)], np.random.default_rng(seed))
            assert 45 <= len(text) <= 110
            places = [text.index(h) for h in ("所见：", "结论：", "建议：", "病理倾向：")]
            assert places == sorted(places)


def test_no_report_denies_an_effusion_that_it_describes() -> None:
    for seed in range(200):
        chinese = write_report([EFFUSION], np.random.default_rng(seed))
        assert "未见胸腔积液" not in chinese and "胸腔未见积液" not in chinese
        assert "No pleural effusion" not in write_report([EFFUSION, NODULE], np.random.default_rng(seed), "en")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("所见：右肺上野见结节影，直径约12mm", [NODULE]),  # cut off before the end
        ("所见：右上肺野可见一1.2cm结节，未见空洞，无钙化。结论：左肺下野空洞。", [NODULE]),
        ("所见：右肺上野见结节影，直径约12 毫米；左侧胸腔积液，深约25mm。", [NODULE, EFFUSION]),
        ("所见：双肺未见异常密度影。未见胸腔积液。结论：正常。", []),
        ("右肺上野见结节影，直径约12mm。", None),  # no section
        ("所见：右肺上野见结节影。结论：结节。", None),  # no size
        ("所见：右肺右肺右肺右肺", None),
        ("", None),
    ],
)
def test_parser_on_texts_that_a_model_may_write(text: str, expected: list[Finding] | None) -> None:
    assert parse_report(text) == expected


def test_keys_are_canonical() -> None:
    assert finding_keys([NODULE, EFFUSION]) == "右肺上野·结节·12mm；左侧·胸腔积液·25mm"
    assert finding_keys([]) == "未见异常"
    with pytest.raises(InputError, match="language 'fr'"):
        finding_keys([], "fr")


def _text(*found: Finding) -> str:
    return write_report(found, np.random.default_rng(0))


def test_scores_of_single_findings() -> None:
    references = [[NODULE]] * 5 + [[]] * 2
    generated = [
        _text(Finding("nodule", "right", "upper", 16)),  # all right, 4 mm off
        _text(Finding("nodule", "right", "upper", 17)),  # size wrong
        _text(Finding("cavity", "right", "upper", 12)),  # type wrong
        _text(Finding("nodule", "left", "upper", 12)),  # side wrong
        _text(NODULE) + "\ufffd",  # garbled
        _text(),  # right
        _text(NODULE),  # a finding in a healthy chest
    ]
    scores = score_reports(references, generated)
    assert scores == {
        "location_acc": pytest.approx(3 / 5),
        "type_acc": pytest.approx(4 / 7),
        "size_within_4mm": pytest.approx(3 / 5),
        "exact_acc": pytest.approx(2 / 7),
        "garbled_rate": pytest.approx(1 / 7),
        "n": 7,
    }


def test_scores_of_several_findings() -> None:
    truth = [[NODULE, EFFUSION]]
    assert score_reports(truth, [_text(EFFUSION, NODULE)])["exact_acc"] == 1.0  # order does not matter
    one_missing = score_reports(truth, [_text(NODULE)])
    assert (one_missing["exact_acc"], one_missing["location_acc"], one_missing["type_acc"]) == (0.0, 0.5, 0.5)
    one_too_many = score_reports([[NODULE]], [_text(NODULE, EFFUSION)])
    assert (one_too_many["exact_acc"], one_too_many["location_acc"]) == (0.0, 1.0)


def test_scores_of_nothing_and_of_unequal_lists() -> None:
    scores = score_reports([[]], [_text()])
    assert scores["exact_acc"] == 1.0 and math.isnan(scores["location_acc"])
    with pytest.raises(ValueError, match="1 references but 0 reports"):
        score_reports([[]], [])
