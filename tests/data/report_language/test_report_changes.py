"""Reports changed at random: the same change everywhere, nothing else touched, nothing that contradicts itself."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from data.report_language.key_points import key_points_of, point_key
from data.report_language.labeller import label_report
from data.report_language.report_changes import change_attributes, change_together, exchange_findings
from tests.data.report_language.test_key_points import LANGUAGES, drawn, write_report

CHINESE = (
    "所见：右肺上叶尖段见一结节，大小约12×8mm，边缘毛糙，牵拉右侧胸膜。左肺下叶见片状实变影，范围约3.2cm。"
    "左侧胸腔积液。左心室增大，上腔静脉通畅，右心不大。结论：1.右肺上叶结节（12mm）。2.左肺下叶实变。建议：左肺下叶实变治疗后复查。"
)
ENGLISH = (
    "Findings: A 12 x 8 mm nodule in the right upper lobe. The left lower lobe shows consolidation, 3.2 cm. The right "
    "heart is enlarged. Impression: Right upper lobe nodule, 12 mm. Left lower lobe consolidation."
)


def changed(report: str, language: str, count: int = 60) -> list[str]:
    rng = np.random.default_rng(0)
    return [change_together(report, language, rng) for _ in range(count)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_phantom_reports_change_in_side_zone_and_size(language: str) -> None:
    rng = np.random.default_rng(1)
    moved, points = Counter(), 0
    for _ in range(150):
        report = write_report(drawn(rng), rng, language)
        new = change_attributes(report, language, rng)
        pairs = list(zip(key_points_of(report, language), key_points_of(new, language), strict=True))
        assert [a.finding for a, _ in pairs] == [b.finding for _, b in pairs]
        assert len(label_report(new, language)) == len(label_report(report, language))
        for a, b in pairs:
            points += 1
            moved.update(name for name in ("side", "zone", "size_mm") if getattr(a, name) != getattr(b, name))
            assert 0.45 * a.size_mm <= b.size_mm <= 2.1 * a.size_mm
    assert moved["side"] > 0.35 * points and moved["zone"] > 0.4 * points and moved["size_mm"] > 0.8 * points


@pytest.mark.parametrize("language", LANGUAGES)
def test_findings_change_places_in_every_section(language: str) -> None:
    rng, changes = np.random.default_rng(2), 0
    for _ in range(100):
        report = write_report(drawn(rng), rng, language)
        new = exchange_findings(report, language, rng)
        before, after = ([point_key(f) for f in key_points_of(text, language)] for text in (report, new))
        assert sorted(map(str, before)) == sorted(map(str, after)) and len(new) == len(report)
        changes += before != after
    assert changes > 30
    text = "所见：右肺上野见12mm结节。左侧胸腔积液。结论：考虑右肺上野结节，左侧胸腔积液。"
    new = "所见：左侧胸腔积液。右肺上野见12mm结节。结论：考虑左侧胸腔积液，右肺上野结节。"
    assert exchange_findings(text, "zh", rng) == new


@pytest.mark.parametrize(
    "text", ["右肺上叶见12mm结节及左侧胸腔积液。", "右肺上叶见12mm结节。其内见空洞。左肺下叶实变。"]
)
def test_findings_that_depend_on_each_other_keep_their_order(text: str) -> None:
    found = {exchange_findings(text, "zh", np.random.default_rng(seed)) for seed in range(6)}
    assert all("结节。其内见空洞" in new or new == text for new in found)


def test_every_section_changes_with_the_findings() -> None:
    seen = set()
    for text in changed(CHINESE, "zh"):
        sizes = re.search(r"大小约(\d+)×(\d+)mm.*结节（(\d+)mm）", text)
        assert sizes[1] == sizes[3] and abs(int(sizes[2]) - int(sizes[1]) * 8 / 12) < 1
        places = re.findall("([左右]肺[上中下]叶)(?:见片状)?实变", text)
        assert len(places) == 3 and len(set(places)) == 1, text
        assert "左肺中叶" not in text, "there is none"
        seen.add(places[0])
    assert len(seen) > 2


def test_words_that_state_no_place_of_a_finding_stay() -> None:
    for text in changed(CHINESE, "zh"):
        assert "左心室增大，上腔静脉通畅，右心不大" in text
        assert "右肺上叶尖段" in text and "右侧胸膜" in text, "a segment and a second side in the sentence"
    assert all("The right heart is enlarged" in text for text in changed(ENGLISH, "en"))


def test_english_words_keep_their_case() -> None:
    texts = changed(ENGLISH, "en")
    assert any("Impression: Left upper lobe nodule" in text for text in texts)
    assert not any("left middle" in text.lower() for text in texts)


def test_a_nodule_stays_as_small_as_its_name() -> None:
    assert all(key_points_of(text, "zh")[0].size_mm <= 30 for text in changed("右肺见28mm结节。", "zh"))


COMPARED = ["右肺上叶结节由5mm增至8mm。", "右肺上叶结节较前增大，现约10mm，原约8mm。"]


@pytest.mark.parametrize("text", [*COMPARED, "A right upper lobe nodule measures 6 mm, previously 4 mm."])
def test_a_size_beside_an_earlier_one_stays(text: str) -> None:
    size = key_points_of(text, "en" if text.isascii() else "zh")[0].size_mm
    for new in changed(text, "en" if text.isascii() else "zh", 20):
        assert key_points_of(new, "en" if text.isascii() else "zh")[0].size_mm == size


def test_a_fissure_of_the_right_lung_stays_on_the_right() -> None:
    assert all("右肺水平裂" in text for text in changed("右肺水平裂见5mm结节。", "zh", 20))


@pytest.mark.parametrize("text", ["", "双肺未见异常。", "右侧胸腔积液，左侧胸腔未见积液。"])
def test_what_cannot_change_stays(text: str) -> None:
    assert set(changed(text, "zh", 10)) == {text}


def test_findings_that_share_their_place_move_together() -> None:
    for text in changed("右肺上叶见12mm结节及空洞。", "zh", 20):
        a, b = map(point_key, key_points_of(text, "zh"))
        assert a[1:4] == b[1:4]
