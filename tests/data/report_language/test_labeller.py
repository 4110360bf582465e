"""The report labeller: hand-checked sentences in both languages, phantom reports, and single rules.

The rules were written beside ``report_sentences_a.tsv`` and ``_c.tsv``; ``_b.tsv`` and ``_d.tsv`` were written after
them. ``_c.tsv`` and ``_d.tsv`` have the wording of translated reports and of Chinese routine reports.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from config.errors import InputError
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.report import write_report
from data.report_language.labeller import (
    FindingRecord,
    ct_rate_labels,
    detect_language,
    known_language,
    label_report,
    report_labels,
    states_normal,
)
from data.report_language.sections import split_sections
from data.report_language.terms import CT_RATE, FINDINGS

SIGNS = {"+": "present", "-": "absent", "?": "uncertain"}
CHANGES = ("smaller", "larger", "stable", "new", "resolved")
Key = tuple[object, ...]
FILES = {"a": 0.97, "b": 0.97, "c": 0.95, "d": 0.95}  # and the least macro-F1 of each language


def read_sentences(path: Path) -> list[tuple[str, str, list[FindingRecord]]]:
    lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        (language, text, [parse_label(s) for s in said.split(";") if s != "none"]) for language, text, said in lines
    ]


def parse_label(label: str) -> FindingRecord:
    """``nodule + left lobe=upper 5-8mm n=2 smaller``."""
    finding, sign, *rest = label.split()
    assert finding in FINDINGS, label
    values: dict[str, object] = {}
    for word in rest:
        if word in ("left", "right", "bilateral"):
            values["side"] = word
        elif word in CHANGES:
            values["change"] = word
        elif word.startswith("n="):
            values["count"] = int(word[2:])
        elif size := re.fullmatch(r"(?:([\d.]+)-)?([\d.]+)mm", word):
            values["size_mm"] = float(size[2])
            values["size_low_mm"] = float(size[1]) if size[1] else None
        else:
            name, value = word.split("=")
            assert (name, value) in {(n, v) for n in ("lobe", "zone") for v in ZONES}, label
            values[name] = value
    return FindingRecord(finding, SIGNS[sign], **values)


def short_key(m: FindingRecord) -> Key:
    return m.finding, m.polarity


def full_key(m: FindingRecord) -> Key:
    """All that is stated; of an absent finding only that it is absent."""
    if m.polarity == "absent":
        return short_key(m)
    return (*short_key(m), m.side, m.lobe, m.zone, m.size_low_mm, m.size_mm, m.count, m.change)


def agreement(key, truth: list[list[FindingRecord]], found: list[list[FindingRecord]]) -> float:
    """F1 over mentions, matched within their sentence."""
    hits = total = 0
    for a, b in zip(truth, found, strict=True):
        one, two = Counter(map(key, a)), Counter(map(key, b))
        hits += sum((one & two).values())
        total += sum(one.values()) + sum(two.values())
    return 2 * hits / total


def macro_f1(truth: list[list[FindingRecord]], found: list[list[FindingRecord]]) -> float:
    """Mean over the findings that the sentences state of the F1 of finding and polarity."""

    def only(name: str, mentions: list[list[FindingRecord]]) -> list[list[FindingRecord]]:
        return [[m for m in own if m.finding == name] for own in mentions]

    names = {m.finding for own in truth for m in own}
    return sum(agreement(short_key, only(name, truth), only(name, found)) for name in names) / len(names)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("language", ["zh", "en"])
def test_hand_checked_sentences(assets: Path, name: str, language: str) -> None:
    rows = [row for row in read_sentences(assets / f"report_sentences_{name}.tsv") if row[0] == language]
    truth = [row[2] for row in rows]
    found = [label_report(text) for _, text, _ in rows]
    wrong = [
        f"{text}\n   stated {sorted(map(str, map(full_key, a)))}\n   found  {sorted(map(str, map(full_key, b)))}"
        for (_, text, a), b in zip(rows, found, strict=True)
        if Counter(map(full_key, a)) != Counter(map(full_key, b))
    ]
    what, everything = agreement(short_key, truth, found), agreement(full_key, truth, found)
    message = f"{len(rows)} sentences, F1 {what:.4f}, with all attributes {everything:.4f}\n" + "\n".join(wrong)
    assert macro_f1(truth, found) >= FILES[name], message
    assert what >= FILES[name] and everything >= 0.95, message


def test_there_are_enough_sentences_and_every_finding_is_among_them(assets: Path) -> None:
    rows = [row for name in FILES for row in read_sentences(assets / f"report_sentences_{name}.tsv")]
    assert len({text for _, text, _ in rows}) == len(rows) >= 550
    for language in ("zh", "en"):
        present = {m.finding for own, _, stated in rows if own == language for m in stated}
        assert present == set(FINDINGS)
    assert all(detect_language(text) == language for language, text, _ in rows)


def as_phantom(mention: FindingRecord) -> Finding:
    """A mention in the vocabulary of the phantom, whose tree-in-bud reports also say "miliary dots"."""
    kind = {"miliary": "tree_in_bud"}.get(mention.finding, mention.finding)
    zone = "lower" if kind == "effusion" else mention.zone
    assert mention.size_mm is not None and mention.side is not None and zone is not None, mention
    return Finding(kind, mention.side, zone, round(mention.size_mm))


@pytest.mark.parametrize("language", ["zh", "en"])
def test_labels_of_phantom_reports_are_the_true_findings(language: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(700):
        kinds = [str(kind) for kind in rng.choice(LESION_TYPES, size=rng.integers(0, 5))]
        zones = ["lower" if kind == "effusion" else str(rng.choice(ZONES)) for kind in kinds]
        rest = [(str(rng.choice(SIDES)), zone, int(rng.integers(5, 60))) for zone in zones]
        truth = [Finding(kind, *where) for kind, where in zip(kinds, rest, strict=True)]
        text = write_report(truth, rng, language)
        mentions = [m for m in label_report(text) if m.section == "findings"]
        assert [as_phantom(m) for m in mentions if m.polarity == "present"] == truth, text
        denied = {m.finding for m in mentions if m.polarity == "absent"}
        assert denied <= {"effusion", "lymphadenopathy", "opacity"} and not denied & set(kinds), text
        assert not [m for m in mentions if m.polarity == "uncertain"], text


def test_spans_point_at_the_words_of_the_original() -> None:
    text = "所见：　右肺上叶见结节影，直径约８ＭＭ；未见胸腔积液。\n结论：ＧＧＯ可能。"
    mentions = label_report(text)
    assert [text[m.start : m.end] for m in mentions] == ["结节影", "积液", "ＧＧＯ"]
    assert [m.section for m in mentions] == ["findings", "findings", "impression"]
    assert mentions[0].size_mm == 8 and mentions[2].polarity == "uncertain"


def test_one_label_per_finding() -> None:
    mentions = label_report("所见：右肺上叶结节，左肺未见结节，未见空洞。结论：实变可能。建议：随访肿块。")
    present = {"nodule": "present", "mass": "present"}
    assert report_labels(mentions) == {**present, "cavity": "absent", "consolidation": "uncertain"}
    assert list(report_labels(mentions, ("impression",))) == ["consolidation"]
    assert report_labels(label_report("")) == {}


@pytest.mark.parametrize("text", ["", "\ufffd", "mm cm 12", "未见", "?" * 50, "，，，。。", "右肺" * 500, "a" * 5000])
def test_any_text_can_be_read(text: str) -> None:
    assert label_report(text) == []
    label_report(text, "zh"), label_report(text, "en")


def test_unknown_language() -> None:
    with pytest.raises(InputError, match="language 'fr'"):
        label_report("nodule", "fr")


LISTS = (
    "No {}, {} or {}.",
    "No significant {}, {} and {} were detected in both lungs.",
    "No {}, {}, {} was observed.",
    "No {}-{} or {} is seen.",
    "Neither {}, {} nor {} is present.",
    "{}, {} or {} was not detected.",
    "未见{}、{}及{}。",
    "未见{}，未见{}，无{}。",
)
ITEMS = {
    "en": "nodule|suspicious mass|pneumonic infiltration|pleural effusion|enlarged lymph nodes|coronary calcification|"
    "interlobular septal thickening|peribronchial thickening|hiatal hernia|sequela change|mosaic attenuation|catheter",
    "zh": "结节|肿块|斑片影|胸腔积液|肿大淋巴结|冠状动脉钙化|小叶间隔增厚|支气管壁增厚|食管裂孔疝|"
    "纤维灶|马赛克征|引流管",
}
NAMES = ["nodule", "mass", "opacity", "effusion", "lymphadenopathy", "coronary_calcification", "septal_thickening"]
NAMES += ["peribronchial_thickening", "hiatal_hernia", "fibrosis", "mosaic_attenuation", "medical_material"]


@pytest.mark.parametrize("pattern", LISTS)
def test_a_denial_reaches_every_member_of_its_list_and_no_later_statement(pattern: str) -> None:
    words = ITEMS[detect_language(pattern)].split("|")
    more = {"en": " There is consolidation.", "zh": "可见实变。"}[detect_language(pattern)]
    for k in range(len(words)):
        chosen = [(k + step) % len(words) for step in (0, 1, 5)]
        labels = report_labels(label_report(pattern.format(*(words[j] for j in chosen)) + more))
        assert labels == {**{NAMES[j]: "absent" for j in chosen}, "consolidation": "present"}, (pattern, words[k])


def test_sentences_that_do_not_refer_back_are_read_alone(assets: Path) -> None:
    rows = [row for name in "cd" for row in read_sentences(assets / f"report_sentences_{name}.tsv")]
    for (language, one, _), (_, two, _) in zip(rows, [*rows[7:], *rows[:7]], strict=True):
        if detect_language(two) == language:
            apart = [*map(full_key, label_report(one, language)), *map(full_key, label_report(two, language))]
            assert [*map(full_key, label_report(f"{one} {two}", language))] == apart, (one, two)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("A nodule in the lingula. A cyst of 31 mm in the left kidney.", [None]),
        ("Pleural thickening on the left. The right adrenal gland is 14 mm thick. The liver measures 180 mm.", [None]),
        ("A 6 mm nodule in the right upper lobe, the ascending aorta is 43 mm wide.", [6.0]),
        ("The heart is enlarged and the pulmonary artery measures 32 mm.", [None]),
        ("A mass abutting the aorta and measuring 45 mm.", [45.0]),
        ("A mass in the left hilum. Its margins are irregular. It measures 38 mm.", [38.0]),
        ("A mass in the left hilum. No free air. Hypodense liver lesion. It measures 38 mm.", [None]),
        ("右侧胸膜增厚。肝内见囊肿，大小约2.5cm。", [None]),
        ("右侧胸腔积液，肝右叶见低密度灶，大小约2.5cm。", [None]),
        ("左肺上叶结节。边界清楚，大小约12mm。右肾见囊肿，约30mm。", [12.0]),
        ("左肺上叶结节，大小约2.0CM×1.5CM。", [20.0]),
        ("左肺上叶结节，大小约2.0cmx1.5cm。", [20.0]),
    ],
)
def test_a_size_goes_to_its_own_lesion(text: str, sizes: list[float | None]) -> None:
    assert [mention.size_mm for mention in label_report(text)] == sizes


@pytest.mark.parametrize(
    ("size", "stated"),
    [
        ("with a short axis of 12 mm", True),
        ("measuring 14x11 mm", True),
        ("measuring 14x8 mm", False),
        ("with a long axis of 14 mm", False),
        ("smaller than 10 mm", False),
        ("of pathological size", True),
        ("that do not reach pathological size", False),
    ],
)
def test_lymph_nodes_are_a_finding_from_a_short_axis_of_10_mm(size: str, stated: bool) -> None:
    assert ct_rate_labels(f"Lymph nodes {size} are seen in the mediastinum.")["Lymphadenopathy"] is stated


@pytest.mark.parametrize(
    "organ", ["liver", "left kidney", "thyroid gland", "right adrenal gland", "breast", "T8 vertebra"]
)
def test_organs_outside_the_chest_have_no_findings(organ: str) -> None:
    for lesion in ("A nodule", "A 12 mm mass", "Calcification", "A cavitary lesion", "Increased density"):
        assert label_report(f"{lesion} is observed in the {organ}.") == []


def test_labels_of_ct_rate() -> None:
    named = {name for names in CT_RATE.values() for name in names}
    assert len(CT_RATE) == 18 and named | {
        "cavity",
        "calcification",
        "bulla",
        "pleural_thickening",
        "pneumothorax",
    } == {*FINDINGS}
    text = (
        "Findings: Calcific plaques in the aorta; possible consolidation; no effusion. Recommendation: rule out mass."
    )
    assert [k for k, v in ct_rate_labels(text).items() if v] == [
        "Arterial wall calcification",
        "Lung opacity",
        "Consolidation",
    ]
    assert ct_rate_labels(label_report(text)) == ct_rate_labels(text)
    assert not any(ct_rate_labels("").values())


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("所见：右肺上叶见12mm GGO。", "zh"),
        ("There is a nodule in the right lung. No pleural effusion.", "en"),
        ("Befund: Rundherd im rechten Oberlappen, 12 mm, glatt begrenzt.", None),
        ("Nodule de 12 mm du lobe supérieur droit. Pas d'épanchement pleural.", None),
        ("右肺上葉に12mmの結節を認めます。胸水はありません。", None),
        ("В правом лёгком определяется очаг 12 мм.", None),
    ],
)
def test_languages_that_are_not_known(text: str, language: str | None) -> None:
    assert known_language([text] * 3) == language


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("右肺上叶结节，大小约12㎜×8㎜。", ["right, upper lobe, nodule 12 mm"]),
        ("右肺上叶结节，12mm×8。", ["right, upper lobe, nodule 12 mm"]),
        ("右肺上叶结节，1.2厘米乘0.8厘米。", ["right, upper lobe, nodule 12 mm"]),
        ("右肺上叶见肿物，约35mm。", ["right, upper lobe, mass 35 mm"]),
        ("未见肿物及新生物。", ["mass, absent"]),
        ("右肺下叶见斑片状、条索状密度增高影。", ["right, lower lobe, opacity", "right, lower lobe, fibrosis"]),
        ("双肺未见斑片、条索影。", ["bilateral, opacity, absent", "bilateral, fibrosis, absent"]),
        ("双肺斑片状及片状磨玻璃影。", ["bilateral, ground_glass"]),
        ("右乳见肿物，20mm。", []),
        ("右肺上叶结节约6mm-12个月后复查。", ["right, upper lobe, nodule"]),
        ("右肺上叶结节较前无明显增大或缩小。", ["right, upper lobe, nodule, stable"]),
        ("右肺上叶结节较前无明显增大。", ["right, upper lobe, nodule, stable"]),
        ("右肺上叶结节较前增大。", ["right, upper lobe, nodule, larger"]),
    ],
)
def test_common_chinese_wordings(text: str, findings: list[str]) -> None:
    assert [mention.describe() for mention in label_report(text)] == findings


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        (
            "双肺多发结节，最大者位于右肺下叶，约15mm。",
            ["bilateral, nodule, several", "right, lower lobe, nodule 15 mm"],
        ),
        (
            "双肺多发结节，较大者约15mm，位于右肺下叶。",
            ["bilateral, nodule, several", "right, lower lobe, nodule 15 mm"],
        ),
        ("双肺多发结节，最大者约15mm。", ["bilateral, nodule 15 mm, several"]),
        ("右肺见数枚结节，大者约8mm，左肺清晰。", ["right, nodule 8 mm, several"]),
        ("右肺上叶多发结节，较大者约15mm，左肺未见异常。", ["right, upper lobe, nodule 15 mm, several"]),
        ("双肺多发结节，大者约15mm，右侧胸腔少量积液。", ["bilateral, nodule 15 mm, several", "right, effusion"]),
        ("The largest of the nodules measures 12 mm in the right upper lobe.", ["right, upper lobe, nodule 12 mm"]),
        (
            "Multiple nodules in both lungs, the largest measuring 15 mm in the right lower lobe.",
            ["bilateral, nodule, several", "right, lower lobe, nodule 15 mm"],
        ),
        (
            "Multiple nodules in both lungs, the largest in the right lower lobe measuring 15 mm.",
            ["bilateral, nodule, several", "right, lower lobe, nodule 15 mm"],
        ),
    ],
)
def test_the_largest_of_several_lesions_has_its_own_place(text: str, findings: list[str]) -> None:
    assert [mention.describe() for mention in label_report(text)] == findings


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("双肺纹理清晰，未见异常。", True),
        ("双肺野未见明显实质性病变。", True),
        ("胸部CT平扫未见明显异常。", True),
        ("右肺上叶见结节，左肺未见异常。", False),
        ("右肺上叶见结节。", False),
    ],
)
def test_a_normal_chest_in_common_wordings(text: str, normal: bool) -> None:
    assert states_normal(text, "zh") is normal


def test_headings_in_brackets_stand_anywhere_and_others_may_be_numbered() -> None:
    text = "【所见】右肺上叶结节，约8mm【结论】右肺上叶结节【建议】如有胸腔积液请复查"
    assert [(s.name, s.of(text)) for s in split_sections(text)] == [
        ("findings", "右肺上叶结节，约8mm"), ("impression", "右肺上叶结节"), ("recommendation", "如有胸腔积液请复查"),
    ]  # fmt: skip
    text = "一、影像所见：双肺清晰。 二、影像诊断：未见异常。"
    assert [(s.name, s.of(text)) for s in split_sections(text)] == [
        ("findings", "双肺清晰。"),
        ("impression", "未见异常。"),
    ]


def test_what_was_taken_out_is_no_finding() -> None:
    assert label_report("右肺结节术后改变。右肺上叶结节切除术后，术区未见异常。") == []
    assert [m.finding for m in label_report("左肺癌术后复查，右肺上叶见结节。")] == ["nodule"]
