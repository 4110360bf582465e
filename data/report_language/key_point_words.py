"""The words of key points in both languages: one name for each finding, which the labeller reads back."""

from __future__ import annotations

from dataclasses import dataclass

from data.findings import LESION


@dataclass(frozen=True)
class Words:
    """One language."""

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


_CHINESE = Words(
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
_ENGLISH = Words(
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
WORDS = {"zh": _CHINESE, "en": _ENGLISH}
OUTSIDE_LUNG = frozenset(
    ("effusion", "pleural_thickening", "pneumothorax", "pericardial_effusion", "cardiomegaly", "lymphadenopathy")
    + ("hiatal_hernia", "medical_material", "arterial_calcification", "coronary_calcification")
)
