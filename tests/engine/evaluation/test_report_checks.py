"""Loops, garble and duplicates are found where they are, and in no clean report."""

from __future__ import annotations

import numpy as np
import pytest

from data.phantom.dataset import _DECK
from data.phantom.finding import Finding
from data.phantom.report import write_report
from engine.evaluation.report_checks import find_duplicates, find_repetition, is_garbled

CLEAN = (
    "所见：右肺上叶见12×8mm结节，CT值约35HU，边缘光滑；余肺野清晰。\n结论：右肺上叶结节。建议：3个月后复查。",
    "Findings: a 3.3 mm nodule, α1-antitrypsin deficiency, 5 µm slices, naïve T cells – stable…\nImpression: nodule.",
)


@pytest.mark.parametrize(
    ("text", "piece", "times"),
    [
        ("右肺结节。" * 4, "右肺结节。", 4),
        ("所见：右肺结节" + "，左肺结节" * 10, "，左肺结节", 10),
        ("the the the the the", "the ", 4),
        ("啊" * 30, "啊", 30),
        ("结论：\n" * 5, "结论：\n", 5),
    ],
)
def test_loops_are_found(text: str, piece: str, times: int) -> None:
    found = find_repetition(text)
    assert found.looping and found.times == times and len(found.piece) == len(piece)


@pytest.mark.parametrize("text", [*CLEAN, "", "......", "3.3.3.3", "右肺结节。左肺结节。右肺结节。"])
def test_clean_text_does_not_loop(text: str) -> None:
    assert not find_repetition(text).looping


def test_share_and_distinct_4grams() -> None:
    loop = find_repetition("a" * 8 + "bcdefghi")
    assert loop.share == 0.5 and loop.distinct_4grams == pytest.approx(9 / 13)
    assert find_repetition("abc").distinct_4grams == 1
    assert find_repetition("x" * 5000).times == 5000


@pytest.mark.parametrize(
    "text",
    ["右肺\ufffd结节", "右肺\x07结节", "锟斤拷结节", "å³è结节 Ã¥", "ĠnoduleĠin", "右肺結節ですよ", "узелок"],
    ids=["lost byte", "control", "GBK as UTF-8", "UTF-8 as Latin-1", "token", "kana", "Cyrillic"],
)
def test_garble_is_found(text: str) -> None:
    assert is_garbled(text)


@pytest.mark.parametrize("text", [*CLEAN, "", "肺野…“清晰”℃±①Ⅱ"])
def test_clean_text_is_not_garbled(text: str) -> None:
    assert not is_garbled(text)


def test_reports_of_phantoms_are_clean() -> None:
    rng = np.random.default_rng(0)
    for language in ("zh", "en"):
        for kind, side, zone in _DECK * 2:
            others = [Finding("nodule", "left", "upper", 9), Finding("cavity", "right", "middle", 31)]
            text = write_report([Finding(kind, side, zone, 20), *others][: rng.integers(0, 4)], rng, language)
            assert not is_garbled(text) and not find_repetition(text).looping, text


def test_duplicates_by_hand() -> None:
    found = find_duplicates(["右肺上叶结节。", " 右肺上叶 结节。", "双肺未见异常。", "左肺空洞。"])
    assert found == {"duplicate_rate": 0.5, "exact_duplicate_rate": 0.5, "most_common_report": 0.5}
    assert find_duplicates(["甲", "乙"])["duplicate_rate"] == 0


def _jaccard(a: str, b: str) -> float:
    one, two = ({t[i : i + 5] for i in range(len(t) - 4)} for t in (a, b))
    return len(one & two) / len(one | two)


def test_near_duplicates_are_the_pairs_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    base = "".join(rng.choice(list("右左肺上下叶见结节空洞实变未及异常"), 300))
    texts = [base]
    for k in (1, 3, 6, 12, 40):
        changed = list(base)
        for at in rng.choice(300, k, replace=False):
            changed[at] = "X"
        texts.append("".join(changed))
    expected = [any(_jaccard(a, b) >= 0.9 for b in texts if b != a) for a in texts]
    assert 0 < sum(expected) < len(texts)
    assert find_duplicates(texts)["duplicate_rate"] == pytest.approx(sum(expected) / len(texts))
