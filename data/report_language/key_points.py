"""Key points: the findings of a report as one line of text, which a language model turns into a report.

    已知：右肺上野结节12mm；左侧胸腔积液25mm。
    Known: right upper zone nodule 12 mm; left pleural effusion 25 mm.

:func:`key_points_of` takes them from a report, :func:`change_together` changes sizes and places in a report wherever
they stand. Both read by :mod:`data.report_language.labeller`; a change that the labeller does not read is not made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from config.errors import InputError
from data.findings import LESION, FindingRecord
from data.report_language.labeller import PREAMBLE, detect_language, label_report

STATED_IN = (PREAMBLE, "findings", "impression")  # advice and tendency state no findings


@dataclass(frozen=True)
class _Words:
    """One language. A name's second part says what a side without a level is the side of."""

    opening: str
    none: str
    stop: str
    joint: str
    sides: dict[str | None, str]
    levels: dict[str, str]
    place: dict[str, str]  # by kind: lung, side, zone, lobe
    size: str
    names: dict[str, str]
    lesion: str  # pattern of LESION
    nodule: str  # a word for it that the labeller knows
    normal: str  # pattern of a part that names none


_ZH = _Words(
    opening="已知：",
    none="未见病灶",
    stop="。",
    joint="；",
    sides={"left": "左", "right": "右", "bilateral": "双", None: ""},
    levels={"upper": "上", "middle": "中", "lower": "下"},
    place={"lung": "{side}肺", "side": "{side}侧", "zone": "{side}肺{level}野", "lobe": "{side}肺{level}叶"},
    size="{mm}mm",
    names={
        "nodule": "结节",
        "mass": "肿块",
        "cavity": "空洞",
        "consolidation": "实变",
        "ground_glass": "磨玻璃影",
        "opacity": "斑片影",
        "tree_in_bud": "树芽征",
        "miliary": "粟粒影",
        "fibrosis": "纤维条索",
        "calcification": "钙化灶",
        "arterial_calcification": "主动脉钙化",
        "coronary_calcification": "冠脉钙化",
        "bronchiectasis": "支气管扩张",
        "peribronchial_thickening": "支气管管壁增厚",
        "mosaic_attenuation": "马赛克征",
        "atelectasis": "肺不张",
        "emphysema": "肺气肿",
        "bulla": "肺大疱",
        "septal_thickening": "小叶间隔增厚",
        "effusion": "胸腔积液",
        "pleural_thickening": "胸膜增厚",
        "pneumothorax": "气胸",
        "pericardial_effusion": "心包积液",
        "cardiomegaly": "心影增大",
        "lymphadenopathy": "淋巴结肿大",
        "hiatal_hernia": "食管裂孔疝",
        "medical_material": "金属植入物",
        LESION: "病灶",
    },
    lesion="病灶|病变",
    nodule="结节",
    normal="(双肺)?(未见|无)(明显|明确)?(病灶|病变|异常)?|(双肺)?正常",
)
_EN = _Words(
    opening="Known: ",
    none="no lesion seen",
    stop=".",
    joint="; ",
    sides={"left": "left ", "right": "right ", "bilateral": "bilateral ", None: ""},
    levels={"upper": "upper", "middle": "middle", "lower": "lower"},
    place={"lung": "{side}lung ", "side": "{side}", "zone": "{side}{level} zone ", "lobe": "{side}{level} lobe "},
    size=" {mm} mm",
    names={
        "nodule": "nodule",
        "mass": "mass",
        "cavity": "cavity",
        "consolidation": "consolidation",
        "ground_glass": "ground-glass opacity",
        "opacity": "opacity",
        "tree_in_bud": "tree-in-bud opacities",
        "miliary": "miliary nodules",
        "fibrosis": "fibrotic strands",
        "calcification": "calcification",
        "arterial_calcification": "aortic calcification",
        "coronary_calcification": "coronary calcification",
        "bronchiectasis": "bronchiectasis",
        "peribronchial_thickening": "bronchial wall thickening",
        "mosaic_attenuation": "mosaic attenuation",
        "atelectasis": "atelectasis",
        "emphysema": "emphysema",
        "bulla": "bulla",
        "septal_thickening": "septal thickening",
        "effusion": "pleural effusion",
        "pleural_thickening": "pleural thickening",
        "pneumothorax": "pneumothorax",
        "pericardial_effusion": "pericardial effusion",
        "cardiomegaly": "cardiomegaly",
        "lymphadenopathy": "lymphadenopathy",
        "hiatal_hernia": "hiatal hernia",
        "medical_material": "medical material",
        LESION: "lesion",
    },
    lesion=r"\blesions?\b",
    nodule="nodule",
    normal="no (lesions?|findings?|abnormality)( (is |are )?seen)?|none|normal",
)
WORDS = {"zh": _ZH, "en": _EN}
_OUTSIDE_LUNG = frozenset(
    ("effusion", "pleural_thickening", "pneumothorax", "pericardial_effusion", "cardiomegaly", "lymphadenopathy")
    + ("hiatal_hernia", "medical_material", "arterial_calcification", "coronary_calcification")
)


def write_key_points(findings: Sequence[FindingRecord], language: str) -> str:
    """One line of text, the findings in their order: side, zone (else lobe), name, size in whole mm.

    Raises InputError: the language is not "zh" or "en".
    """
    w = _words(language)
    return w.opening + (w.joint.join(_point(w, f) for f in findings) or w.none) + w.stop


def read_key_points(text: str, language: str) -> list[FindingRecord]:
    """The findings of a line of key points, in its own wording or in a user's.

    Raises InputError: a part of the line names no known finding, or the language is unknown.
    """
    language = detect_language(text) if language == "auto" else language
    w = _words(language)
    body = re.sub(rf"^\s*{w.opening.strip()[:-1]}\s*[:：]?", "", text.strip(), flags=re.IGNORECASE)
    found: list[FindingRecord] = []
    for part in re.split(r"[；;。\n]|\.(?!\d)", body):
        found += _read_part(w, part.strip(" ，,"), language)
    return [replace(f, section="", start=0, end=0) for f in found if f.polarity != "absent"]


def _read_part(w: _Words, part: str, language: str) -> list[FindingRecord]:
    """A clause without a finding says something of the finding before it: place, size, number or change."""
    if not part or re.fullmatch(w.normal, part, re.IGNORECASE):
        return []
    found: list[FindingRecord] = []
    so_far, last = "", []
    for clause in re.split(r"[，,]", part):
        alone = _read_clause(w, clause, language)
        if alone and last:
            found, so_far, last = found + last, "", []
        so_far = f"{so_far}，{clause}" if so_far else clause
        read = _read_clause(w, so_far, language)
        if last and read == last:
            raise InputError(_unknown(w, clause))
        last = read
    if not last:
        raise InputError(_unknown(w, part))
    return found + last


def _read_clause(w: _Words, text: str, language: str) -> list[FindingRecord]:
    """The labeller knows no bare lesion: read as a nodule it gives place and size."""
    found = label_report(text, language)
    as_nodule = re.sub(w.lesion, w.nodule, text, flags=re.IGNORECASE)
    return found or [replace(f, finding=LESION) for f in label_report(as_nodule, language)]


def _unknown(w: _Words, part: str) -> str:
    return f"'{part.strip()}' names no known finding; known are: {', '.join(w.names.values())}"


def key_points_of(report: str, language: str) -> list[FindingRecord]:
    """The findings that a report states as present or possible, each at each place once, in the order of the text.

    A mention without place, level or size is the same finding as one that has them (an impression repeats findings so).
    A possible finding that the report denies elsewhere is left out.
    """
    _words(language)
    mentions = [m for m in label_report(report, language) if m.section in STATED_IN]
    return [group[0] for group in _grouped(mentions)]


def point_key(f: FindingRecord) -> tuple[str, str | None, str | None, str | None, int | None]:
    """What a key point says of a finding: name, side, zone, lobe where there is no zone, size in whole mm."""
    return f.finding, f.side, f.zone, None if f.zone else f.lobe, None if f.size_mm is None else round(f.size_mm)


def _grouped(mentions: Sequence[FindingRecord]) -> list[list[FindingRecord]]:
    """Mentions of one finding together, the first completed by what the others say."""
    groups: list[list[FindingRecord]] = []
    for m in mentions:
        denied = any(_may_be_same(m, other) for other in mentions if other.polarity == "absent")
        if m.polarity == "absent" or (m.polarity == "uncertain" and denied):
            continue
        group = next((g for g in groups if _may_be_same(g[0], m)), None)
        if group is None:
            groups.append([m])
        else:
            group[0] = _completed(group[0], m)
            group.append(m)
    return groups


# Words for one lesion; the one that stands in the impression names it.
_SYNONYMS = (frozenset(("miliary", "tree_in_bud")), frozenset(("opacity", "consolidation", "ground_glass")))


def _may_be_same(a: FindingRecord, b: FindingRecord) -> bool:
    """Whether two mentions contradict each other in nothing; two sizes at one place are one finding's."""
    if a.finding != b.finding:
        pair = {a.finding, b.finding}
        concluded = a.section != b.section and (a.size_mm is None or b.size_mm is None)
        if not concluded or not any(pair <= names for names in _SYNONYMS):
            return False
    if b.side == "bilateral" and a.section != b.section and b.level is None and b.size_mm is None:
        return True  # 结论：双肺结节 after one on each side
    for one, two in ((a.side, b.side), (a.lobe, b.lobe), (a.zone, b.zone), (a.level, b.level)):
        if one and two and one != two:
            return False
    exact = (a.side, a.level) == (b.side, b.level)
    return exact or a.size_mm is None or b.size_mm is None or a.size_mm == b.size_mm


def _completed(a: FindingRecord, b: FindingRecord) -> FindingRecord:
    size = max((s for s in (a.size_mm, b.size_mm) if s is not None), default=None)
    name = b.finding if b.section == "impression" else a.finding
    return replace(a, finding=name, side=a.side or b.side, lobe=a.lobe or b.lobe, zone=a.zone or b.zone, size_mm=size)


def _words(language: str) -> _Words:
    if language not in WORDS:
        raise InputError(f"language {language!r} is unknown; use one of: {', '.join(WORDS)}")
    return WORDS[language]


def _point(w: _Words, f: FindingRecord) -> str:
    kind = "zone" if f.zone else "lobe" if f.lobe else "side" if f.finding in _OUTSIDE_LUNG else "lung"
    place = w.place[kind].format(side=w.sides[f.side], level=w.levels.get(f.level, ""))
    place = place if f.side or f.level else ""
    return place + w.names[f.finding] + (w.size.format(mm=round(f.size_mm)) if f.size_mm is not None else "")
