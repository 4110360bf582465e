"""The vocabulary of the report labeller for both languages: findings, kinds of words, sizes.

The words themselves are in ``terms_zh`` and ``terms_en``. Kinds of tokens:

=================  ====================================================================================
term               findings, a tuple of names; dropped where the organ is outside the chest
head               a change whose name depends on the organ: key of ``HEADS`` (积液 of pleura, pericardium)
other              a lesion that is no finding, or one of an organ outside the chest; sizes next to it are its own
organ              a class of organ, key of the tables in ``HEADS``
place              (side or None, lobes, zones)
negate             denies the findings after it, up to a stop or the end of the enumeration
denied             denies the findings before it (``…未见。``, ``… is not seen``); value "resolved" or None
maybe_before       makes uncertain what follows in its clause
maybe_after        makes uncertain the nearest finding before it and those coordinated with it
maybe              maybe_before where something follows that it can mean, else maybe_after
disease            a cause or nature: an uncertainty may be about it; it is no finding
stop               ends the scope of negation and uncertainty (但, 可见, but, there is)
link               joins a finding to a place after it (位于)
size, count        a ``Size``;  number, 0 for "several"
change             smaller, larger, stable, new
within             refers to the lesion of the sentence before (其内, it)
comma              ends a clause
skip               would be mistaken for a word of another kind (无名动脉, slice thickness 5 mm)
=================  ====================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from data.findings import LESION
from data.report_language.lexer import Rule

FINDINGS = (
    "nodule",
    "mass",
    "cavity",
    "consolidation",
    "ground_glass",
    "opacity",
    "tree_in_bud",
    "miliary",
    "fibrosis",
    "calcification",
    "arterial_calcification",
    "coronary_calcification",
    "bronchiectasis",
    "peribronchial_thickening",
    "mosaic_attenuation",
    "atelectasis",
    "emphysema",
    "bulla",
    "septal_thickening",
    "effusion",
    "pleural_thickening",
    "pneumothorax",
    "pericardial_effusion",
    "cardiomegaly",
    "lymphadenopathy",
    "hiatal_hernia",
    "medical_material",
)

# The labels of CT-RATE (Hamamci et al. 2024) and the findings that count as each; docs/evaluation.md gives the reasons.
CT_RATE: dict[str, tuple[str, ...]] = {
    "Medical material": ("medical_material",),
    "Arterial wall calcification": ("arterial_calcification",),
    "Cardiomegaly": ("cardiomegaly",),
    "Pericardial effusion": ("pericardial_effusion",),
    "Coronary artery wall calcification": ("coronary_calcification",),
    "Hiatal hernia": ("hiatal_hernia",),
    "Lymphadenopathy": ("lymphadenopathy",),
    "Emphysema": ("emphysema",),
    "Atelectasis": ("atelectasis",),
    "Lung nodule": ("nodule", "mass", "miliary"),
    "Lung opacity": ("opacity", "ground_glass", "consolidation", "tree_in_bud"),
    "Pulmonary fibrotic sequela": ("fibrosis",),
    "Pleural effusion": ("effusion",),
    "Mosaic attenuation pattern": ("mosaic_attenuation",),
    "Peribronchial thickening": ("peribronchial_thickening",),
    "Consolidation": ("consolidation",),
    "Bronchiectasis": ("bronchiectasis",),
    "Interlobular septal thickening": ("septal_thickening",),
}

# Named by their size: a lymph node is a finding from this short axis on; a soft-tissue lesion is a nodule up to 30 mm.
NODE = "node"
NODE_SHORT_AXIS_MM = 10.0
LARGEST = "largest"  # one of several lesions: 最大者位于右肺下叶
NODULE_MAX_MM = 30.0

# Findings of a head by its organ; "*" for any other organ or none, None for no finding.
HEADS: dict[str, dict[str, str | None]] = {
    "effusion": {"pleura": "effusion", "pericardium": "pericardial_effusion", "outside": None, "*": "effusion"},
    "fluid": {"pleura": "effusion", "pericardium": "pericardial_effusion", "*": None},
    "thickening": {
        "pleura": "pleural_thickening",
        "septum": "septal_thickening",
        "airway": "peribronchial_thickening",
        "bronchus": "peribronchial_thickening",
        "*": None,
    },
    "enlargement": {
        "node": "lymphadenopathy",
        "heart": "cardiomegaly",
        "bronchus": "bronchiectasis",
        "*": None,
    },
    # Without a lymph node or the heart it is a change: 结节增大.
    "growth": {"node": "lymphadenopathy", "heart": "cardiomegaly", "*": None},
    "pathological": {"node": "lymphadenopathy", "*": None},
    "prominence": {"septum": "septal_thickening", "*": None},
    "dilatation": {"bronchus": "bronchiectasis", "airway": "bronchiectasis", "heart": "cardiomegaly", "*": None},
    "calcification": {
        "vessel": "arterial_calcification",
        "coronary": "coronary_calcification",
        "outside": None,
        "*": "calcification",
    },
    "plaque": {"vessel": "arterial_calcification", "coronary": "coronary_calcification", "*": None},
    "atheroma": {
        "coronary": "coronary_calcification",
        "vessel": "arterial_calcification",
        "*": "arterial_calcification",
    },
    "material": {"*": "medical_material"},
}
# Findings that organs outside the chest have too; in a sentence on such organs alone they are no findings.
AMBIGUOUS = frozenset(("nodule", "mass", "cavity", "opacity", "fibrosis", "calcification", LESION))
# Organs whose own size is stated, not that of a finding in an earlier clause.
MEASURED_ORGANS = frozenset(("outside", "vessel", "coronary", "heart", "valve", "wall"))

NUMBER = r"\d+(?:\.\d+)?"
UNIT = r"(?:mm|cm|㎜|㎝|毫米|厘米|公分|millimet(?:er|re)s?|centimet(?:er|re)s?)(?!(?!x\s*\d)[a-z0-9²³])"
CENTIMETRES = "c厘公㎝"  # first letters of such a unit
_TIMES = r"(?:×|x|\*|乘|by)"
_TO = r"(?:-|~|至|到|to)"
SIZE = rf"{NUMBER}(?:\s*-?{UNIT})?(?:\s*(?:{_TIMES}|{_TO})\s*{NUMBER}(?:\s*-?{UNIT})?){{0,2}}"
ONE_SIZE = rf"{NUMBER}\s*-?{UNIT}"


class Size(NamedTuple):
    """A stated size in mm."""

    low: float | None  # lower end of a range
    high: float  # largest extent, of a range its upper end
    short: float | None  # smallest extent; None where only the long axis or an upper bound is stated


@dataclass(frozen=True)
class Language:
    """The words of one language, and its patterns for the text that the words leave over."""

    rules: tuple[Rule, ...]
    fillers: str  # what may stand beside findings in a bare member of an enumeration
    connector: str  # between coordinated findings
    organ_gap: str  # between coordinated organs and places
    continues: str  # a clause that begins so goes on with the enumeration before it
    joint: str  # joins the last member of an enumeration, in the clause of the member before it
    breaks: str  # a clause says something new
    verb: str  # the verb of a denied enumeration, after its last member: "no A, B was seen"
    not_tight: str  # between a place and a finding that are not one noun phrase
    place_gap: str  # between places that belong to one list
    apart: str  # between a finding and a place after it that belongs to something else
    link: str  # between a finding and the place after it, where the two belong together
    size_gap: str  # between a size and the finding after it
    of: str  # between a lobe and the side after it ("upper lobe of the left lung")
    locates: str  # a clause that says where a lesion lies, without its places and sizes
    respectively: str  # sizes and places are paired in order
    refers: str  # a sentence that begins so gives the size of the lesion of the sentence before
    normal: str  # both lungs are normal


def size_of(match: re.Match[str]) -> Size | None:
    """The size that the text states, or None for numbers without a unit.

    A number without a unit takes the next one's (``3.2×2.1cm``), or else the one before (``12mm×8``).
    """
    text = match.group()
    parts = re.findall(rf"({NUMBER})\s*-?({UNIT})?", text)
    unit, values = parts[-1][1] or None, []
    if unit is None and re.search(rf"{_TIMES}\s*{NUMBER}$", text):
        unit = next((own for _, own in reversed(parts) if own), None)
    if unit is None:
        return None
    for number, own in reversed(parts):
        unit = own or unit
        values.insert(0, float(number) * (10.0 if unit[0] in CENTIMETRES else 1.0))
    ranged = len(values) == 2 and re.search(_TIMES, re.sub("[cm]m", "", text)) is None
    if ranged and values[0] <= values[1]:
        return Size(values[0], values[1], values[1])
    return Size(None, max(values), min(values))


def long_size_of(match: re.Match[str]) -> Size | None:
    """The size of a long axis, or an upper bound of one."""
    size = size_of(match)
    return size and size._replace(short=None)


SIZE_RULE = Rule("size", size_of, SIZE)
