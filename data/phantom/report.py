"""Reports of phantom findings, Chinese and English.

A report has four sections, ``所见：…。结论：…。建议：…。病理倾向：…。`` (English: Findings, Impression,
Recommendation, Pathology tendency). Templates are chosen at random; every sentence is true of every phantom with that
finding. The labeller (:mod:`data.report_language.labeller`) reads every finding back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from config.errors import InputError
from data.phantom.finding import Finding
from data.report_language.sections import HEADINGS

# Which of several findings governs advice and tendency: what must be acted on first.
_URGENCY = ("cavity", "tree_in_bud", "consolidation", "effusion", "nodule", "fibrosis", "calcification")


@dataclass(frozen=True)
class Wording:
    """One language. ``{loc}`` is the place of a finding, ``{side}`` its side, ``{n}`` its size in mm."""

    headings: tuple[str, str, str, str]
    section: str  # format of one section: {heading}, {text}
    stop: str  # ends a sentence of the findings section
    joint: str  # between the parts of an impression
    space: str  # between sections and sentences
    sides: dict[str, str]
    zones: dict[str, str]
    names: tuple[str, ...]  # in the order of FINDING_TYPES, for keys and impressions
    locations: tuple[str, ...]
    key_location: str
    effusion_location: str
    sentences: dict[str, tuple[str, ...]]
    negatives: dict[str, tuple[str, ...]]  # by the type that they deny; "" denies none
    impression: tuple[str, ...]
    normal_impression: tuple[str, ...]
    advice: dict[str, tuple[str, ...]]
    tendency: dict[str, tuple[str, ...]]
    key_gap: str
    key_joint: str
    questions: tuple[str, ...]


_CHINESE = Wording(
    headings=HEADINGS["zh"],
    section="{heading}：{text}",
    stop="。",
    joint="，",
    space="",
    sides={"right": "右", "left": "左"},
    zones={"upper": "上", "middle": "中", "lower": "下"},
    names=("未见异常", "结节", "空洞", "实变", "树芽征", "纤维条索", "胸腔积液", "钙化灶"),
    locations=("{side}肺{zone}野", "{side}{zone}肺野", "{side}侧{zone}肺野"),
    key_location="{side}肺{zone}野",
    effusion_location="{side}侧",
    sentences={
        "nodule": (
            "{loc}见结节影，直径约{n}mm，边界清楚",
            "{loc}可见一{n}mm软组织结节，边缘较光滑",
            "直径约{n}mm结节位于{loc}，密度均匀",
        ),
        "cavity": (
            "{loc}见厚壁空洞，最大径约{n}mm",
            "{loc}可见{n}mm空洞，壁厚，未见液平",
            "最大径约{n}mm的厚壁空洞位于{loc}",
        ),
        "consolidation": (
            "{loc}见片状实变，范围约{n}mm，内见支气管充气征",
            "{loc}可见{n}mm实变影，边缘模糊",
            "范围约{n}mm的斑片状实变位于{loc}，密度不均",
        ),
        "tree_in_bud": (
            "{loc}见簇状树芽征，范围约{n}mm",
            "{loc}可见{n}mm范围树芽征，呈多发小点状",
            "范围约{n}mm的粟粒样微小结节位于{loc}",
        ),
        "fibrosis": (
            "{loc}见纤维条索影，长约{n}mm",
            "{loc}可见{n}mm纤维条索，走行较直",
            "长约{n}mm的条索状影位于{loc}",
        ),
        "effusion": (
            "{side}侧胸腔积液，最大深度约{n}mm",
            "{side}侧胸腔见弧形积液影，深约{n}mm",
            "{side}侧可见深约{n}mm胸腔积液",
        ),
        "calcification": (
            "{loc}见钙化灶，直径约{n}mm",
            "{loc}可见{n}mm致密钙化灶，边界锐利",
            "直径约{n}mm的钙化灶位于{loc}",
        ),
        "normal": ("双肺未见异常密度影", "双肺野清晰，双肺未见实质性病变", "双肺未见明显异常"),
    },
    negatives={
        "": ("纵隔淋巴结未见肿大", "气管支气管通畅", "纵隔居中"),
        "effusion": ("未见胸腔积液", "双侧胸腔未见积液"),
    },
    impression=("{all}", "考虑{all}", "{all}可能性大"),
    normal_impression=("胸部CT未见异常", "双肺未见明显病变", "双肺正常"),
    advice={
        "nodule": ("三个月后复查CT", "定期随访结节变化"),
        "cavity": ("痰抗酸染色及培养", "结核专科就诊，查痰菌"),
        "consolidation": ("抗感染治疗后复查", "结合痰检，治疗后复查"),
        "tree_in_bud": ("查痰抗酸杆菌", "结合结核相关检查"),
        "fibrosis": ("每年复查一次", "对比旧片，随访"),
        "effusion": ("超声定位下胸穿检查", "胸水化验"),
        "calcification": ("无需特殊处理", "年度体检随访"),
        "normal": ("定期体检", "无需特殊处理"),
    },
    tendency={
        "nodule": ("肉芽肿性结节可能", "倾向良性结节"),
        "cavity": ("倾向活动性肺结核", "结核性空洞可能"),
        "consolidation": ("倾向感染性病变", "干酪性肺炎待排"),
        "tree_in_bud": ("倾向支气管播散性结核", "活动性结核可能"),
        "fibrosis": ("倾向陈旧性结核", "陈旧性纤维灶"),
        "effusion": ("倾向结核性胸膜炎", "渗出性积液可能"),
        "calcification": ("倾向陈旧性肉芽肿", "陈旧性钙化"),
        "normal": ("无特殊倾向", "未见病理改变"),
    },
    key_gap="·",
    key_joint="；",
    questions=(
        "请描述这份胸部CT的影像表现。",
        "请根据CT图像书写诊断报告。",
        "这份CT有哪些异常？请给出报告。",
        "请写出所见、结论、建议和病理倾向。",
        "请为该患者生成胸部CT报告。",
        "请分析图像并给出影像学诊断。",
        "肺部有无病变？请完整报告。",
        "请阅片并出具报告。",
    ),
)

_ENGLISH = Wording(
    headings=HEADINGS["en"],
    section="{heading}: {text}",
    stop=".",
    joint=", ",
    space=" ",
    sides={"right": "right", "left": "left"},
    zones={"upper": "upper", "middle": "middle", "lower": "lower"},
    names=(
        "no abnormality",
        "nodule",
        "cavity",
        "consolidation",
        "tree-in-bud opacities",
        "fibrous strands",
        "pleural effusion",
        "calcified granuloma",
    ),
    locations=("{side} {zone} lung zone", "{zone} zone of the {side} lung"),
    key_location="{side} {zone}",
    effusion_location="{side}",
    sentences={
        "nodule": (
            "A {n} mm nodule in the {loc}, well defined",
            "In the {loc} there is a soft-tissue nodule of {n} mm",
        ),
        "cavity": (
            "A thick-walled cavity of {n} mm in the {loc}",
            "In the {loc} there is a {n} mm cavity, without a fluid level",
        ),
        "consolidation": (
            "Patchy consolidation of {n} mm in the {loc}, with air bronchograms",
            "In the {loc} there is an ill-defined consolidation over {n} mm",
        ),
        "tree_in_bud": (
            "Tree-in-bud opacities over {n} mm in the {loc}",
            "In the {loc} there are clustered miliary dots over {n} mm",
        ),
        "fibrosis": ("Fibrous strands of {n} mm in the {loc}", "In the {loc} there are fibrous strands, {n} mm long"),
        "effusion": (
            "A {side} pleural effusion, {n} mm deep",
            "Dependent {side} pleural effusion with a depth of {n} mm",
        ),
        "calcification": (
            "A calcified granuloma of {n} mm in the {loc}",
            "In the {loc} there is a dense {n} mm calcified granuloma",
        ),
        "normal": ("Both lungs are clear", "Both lungs are normal, without focal opacity"),
    },
    negatives={
        "": ("No enlarged mediastinal lymph nodes", "The central airways are patent"),
        "effusion": ("No pleural effusion", "Both pleural spaces are free of fluid"),
    },
    impression=("{all}", "Consistent with {all}"),
    normal_impression=("Normal chest CT", "No abnormality of the lungs"),
    advice={
        "nodule": ("CT follow-up in three months", "Follow the nodule over time"),
        "cavity": ("Sputum smear and culture", "Refer to a tuberculosis clinic"),
        "consolidation": ("Repeat CT after treatment", "Sputum tests and follow-up after treatment"),
        "tree_in_bud": ("Sputum test for acid-fast bacilli", "Further tests for tuberculosis"),
        "fibrosis": ("Yearly follow-up", "Compare with earlier images"),
        "effusion": ("Ultrasound-guided thoracentesis", "Analysis of the pleural fluid"),
        "calcification": ("No treatment needed", "Routine check-up"),
        "normal": ("Routine check-up", "No further imaging needed"),
    },
    tendency={
        "nodule": ("granulomatous nodule is likely", "benign nodule is favoured"),
        "cavity": ("active pulmonary tuberculosis", "tuberculous cavity is likely"),
        "consolidation": ("infection is favoured", "caseous pneumonia to be excluded"),
        "tree_in_bud": ("endobronchial spread of tuberculosis", "active tuberculosis is likely"),
        "fibrosis": ("old tuberculosis", "old fibrous scar"),
        "effusion": ("tuberculous pleurisy", "exudate is likely"),
        "calcification": ("old granuloma", "healed calcified focus"),
        "normal": ("none", "no pathological change"),
    },
    key_gap=" · ",
    key_joint="; ",
    questions=(
        "Describe the findings of this chest CT.",
        "Write the report of this chest CT.",
        "What is abnormal in this CT? Give a full report.",
        "Give findings, impression, recommendation and pathology tendency.",
        "Please read this chest CT and report.",
        "Is there a lesion in the lungs? Write a complete report.",
        "Generate the radiology report for this patient.",
        "Report this examination.",
    ),
)

WORDINGS = {"zh": _CHINESE, "en": _ENGLISH}


def wording(language: str) -> Wording:
    """The tables of a language.

    Raises:
        InputError: neither "zh" nor "en".
    """
    if language not in WORDINGS:
        raise InputError(f"language {language!r} is unknown; use one of: {', '.join(WORDINGS)}")
    return WORDINGS[language]


def finding_keys(findings: Sequence[Finding], language: str = "zh") -> str:
    """Key points in a fixed order and wording, e.g. ``右肺上野·结节·12mm；左侧·胸腔积液·25mm``."""
    w = wording(language)
    keys = [w.key_gap.join((_place(w, f, w.key_location), w.names[f.mask_value], f"{f.size_mm}mm")) for f in findings]
    return w.key_joint.join(keys) or w.names[0]


def write_report(findings: Sequence[Finding], rng: np.random.Generator, language: str = "zh") -> str:
    """Write a four-section report that is true of the findings, in their order; ``rng`` draws the wording."""
    w = wording(language)

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    statements = []
    for f in findings:
        place = _place(w, f, pick(w.locations))
        statements.append(pick(w.sentences[f.type]).format(loc=place, side=w.sides[f.side], n=f.size_mm))
    if not findings:
        statements.append(pick(w.sentences["normal"]))
    present = {f.type for f in findings}
    negatives = [text for kind, texts in w.negatives.items() if kind not in present for text in texts]
    if rng.random() < 0.5:
        statements.append(pick(negatives))
    lead = next((kind for kind in _URGENCY if kind in present), "normal")
    named = w.joint.join(_place(w, f, w.key_location) + w.space + w.names[f.mask_value] for f in findings)
    impression = pick(w.impression if findings else w.normal_impression).format(all=named)
    stop = w.stop + w.space
    texts = (stop.join(statements), impression, pick(w.advice[lead]), pick(w.tendency[lead]))
    sections = [
        w.section.format(heading=heading, text=text[0].upper() + text[1:]) + w.stop
        for heading, text in zip(w.headings, texts, strict=True)
    ]
    return w.space.join(sections)


def _place(w: Wording, f: Finding, template: str) -> str:
    """Where a finding lies; an effusion has a side only."""
    template = w.effusion_location if f.type == "effusion" else template
    return template.format(side=w.sides[f.side], zone=w.zones[f.zone])
