"""Sides, craniocaudal levels and sizes that reports state: against their references, and against the lesions of masks.

Only what a report describes counts: its findings section, or where it has no headings the text before them, or
failing both its impression. Statements are those of :mod:`data.report_language.labeller` that are present.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.errors import InputError
from data.finding_targets import DEPTHS
from data.findings import LESION, FindingRecord
from data.imaging.reader import read_mask, read_volume
from data.lesions import find_lungs, measure_lesions
from data.report_language.labeller import states_normal
from data.report_language.sections import PREAMBLE
from engine.evaluation.bootstrap import Score, hit_score
from engine.evaluation.finding_metrics import Mentions
from engine.evaluation.report_checks import is_garbled

SIZE_TOLERANCE_MM = 3.0
WHOLE_REPORT_TOLERANCE_MM = 4.0
PLACES = {
    "location_acc": "true findings whose statement has their side and craniocaudal level",
    "location_acc_found": "the same, of findings named rightly",
    "size_within_3mm": "true findings whose statement is within 3 mm of their size",
    "size_within_3mm_found": "the same, of findings named rightly",
}
WHOLE_REPORTS = {
    "location_acc": "true findings whose statement has their side and craniocaudal level",
    "type_acc": "true findings named rightly, and normal cases reported as normal",
    "size_within_4mm": "true findings whose statement is within 4 mm of their size",
    "exact_acc": "reports right in number, place, name and size of their findings",
    "garbled_rate": "reports that cannot be read",
    "missed_lesion_rate": "cases with a finding whose report states none",
}
MASKS = {
    "side_acc": "statements with the side of a lesion of the mask",
    "zone_acc": "statements with the zone of that lesion",
    "size_within_3mm": "statements within 3 mm of that lesion's longest axial diameter",
}
_MIN_LESION_MM3 = 20.0  # smaller components are specks of a mask
Hits = defaultdict[str, list[tuple[int, bool]]]  # (case, right or wrong) by name of the score


def described(mentions: Sequence[FindingRecord]) -> list[FindingRecord]:
    """The findings that a report describes as present, one for each place."""
    present = [m for m in mentions if m.polarity == "present"]
    sections = ([m for m in present if m.section == name] for name in ("findings", PREAMBLE, "impression"))
    return next(filter(None, sections), [])


def same_place(truth: FindingRecord, stated: FindingRecord) -> bool:
    """Same side, and the same level where the reference has one."""
    return truth.side == stated.side and truth.level in (None, stated.level)


def place_scores(references: Mentions, generated: Mentions) -> dict[str, Score]:
    """Reports against references: the scores of ``PLACES``.

    True and stated findings of a case are paired one to one, greedily: the pair that agrees in most of finding, side
    and level first, then the smaller difference in size. A true finding without a partner is wrong. Its place counts
    where the reference has a side, its size where the reference has one.
    """
    hits: Hits = defaultdict(list)
    for case, (truth, stated) in enumerate(zip(references, generated, strict=True)):
        for a, b in pair(described(truth), described(stated)):
            right = {}
            if a.side is not None:
                right["location_acc"] = b is not None and same_place(a, b)
            if a.size_mm is not None:
                right["size_within_3mm"] = b is not None and sizes_agree(a.size_mm, b.size_mm)
            for name, hit in right.items():
                hits[name].append((case, hit))
                if b is not None and a.finding == b.finding:
                    hits[f"{name}_found"].append((case, hit))
    return _scored(hits, PLACES, len(references))


def stated_in_full(mentions: Sequence[FindingRecord]) -> list[FindingRecord]:
    """The described findings with side, level and size. A free effusion is dependent: its zone is the lower one."""
    found = [replace(m, zone="lower") if m.finding == "effusion" else m for m in described(mentions)]
    return [m for m in found if m.side and m.level and m.size_mm]


def whole_report_scores(
    references: Mentions, generated: Mentions, texts: Sequence[str], language: str
) -> dict[str, Score]:
    """Whole reports against references that state every finding in full, as synthetic ones do: ``WHOLE_REPORTS``.

    Cases with another reference are left out. Findings are paired as in :func:`place_scores`. A report is garbled
    that has characters that no report holds, or states neither a finding in full nor that both lungs are normal; it
    is wrong in everything.

    Args:
        generated, texts: mentions and text of each report.
    """
    hits: Hits = defaultdict(list)
    for case, (reference, mentions, text) in enumerate(zip(references, generated, texts, strict=True)):
        truth, stated = stated_in_full(reference), stated_in_full(mentions)
        if len(truth) < len(described(reference)):
            continue
        garbled = is_garbled(text) or not (stated or states_normal(text, language))
        exact = not garbled and len(stated) == len(truth)
        for a, b in pair(truth, stated):
            known = b is not None and not garbled
            right = {
                "location_acc": known and same_place(a, b),
                "type_acc": known and a.finding == b.finding,
                "size_within_4mm": known and abs(a.size_mm - b.size_mm) <= WHOLE_REPORT_TOLERANCE_MM,
            }
            for name, hit in right.items():
                hits[name].append((case, hit))
            exact = exact and all(right.values())
        if truth:
            hits["missed_lesion_rate"].append((case, not described(mentions)))
        else:
            hits["type_acc"].append((case, not stated and not garbled))
        hits["exact_acc"].append((case, exact))
        hits["garbled_rate"].append((case, garbled))
    return _scored(hits, WHOLE_REPORTS, len(references))


@dataclass(frozen=True)
class MaskedCase:
    """Lesions of one case. ``problem``: why they could not be measured, or empty."""

    lesions: list[FindingRecord]
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"lesions": [lesion.to_dict() for lesion in self.lesions], "problem": self.problem}


def measure_case(image: Path, mask: Path, names: Mapping[int, str] | None) -> MaskedCase:
    """Lesions of a mask by side, zone and diameter. A scan whose lungs are not found has a problem and no lesion."""
    volume = read_volume(image)
    labels = read_mask(mask, volume)
    if not labels.any():
        return MaskedCase([])
    try:
        lungs = find_lungs(volume.array, volume.spacing)
    except InputError as error:
        return MaskedCase([], f"{image.name}: {error}")
    return MaskedCase(measure_lesions(labels, volume.spacing, lungs, names, _MIN_LESION_MM3))


def mask_scores(cases: Sequence[MaskedCase | None], reports: Mentions) -> dict[str, Score]:
    """What reports describe against their masks: the scores of ``MASKS``. Cases without a mask count for nothing.

    A statement is compared with the lesion that agrees best in finding (where the mask's labels have names), side
    and zone, then size. Several statements may mean the same lesion. The size of a lesion is its longest axial
    diameter. Effusions and pleural thickening, whose stated size is a depth, have none.
    """
    hits: Hits = defaultdict(list)
    for case, (masked, mentions) in enumerate(zip(cases, reports, strict=True)):
        if masked is None or masked.problem:
            continue
        for stated in described(mentions):
            lesion = min(masked.lesions, key=lambda x: _lesion_distance(stated, x), default=None)
            same = agreement(stated, lesion) if lesion else {"side": False, "zone": False}
            for name in ("side", "zone"):
                if getattr(stated, name) is not None:
                    hits[f"{name}_acc"].append((case, same[name]))
            if stated.size_mm is not None and stated.finding not in DEPTHS:
                close = lesion is not None and sizes_agree(lesion.size_mm, stated.size_mm)
                hits["size_within_3mm"].append((case, close))
    return _scored(hits, MASKS, len(reports))


def _scored(hits: Hits, definitions: Mapping[str, str], cases: int) -> dict[str, Score]:
    return {name: hit_score(hits[name], cases, what) for name, what in definitions.items()}


def pair(
    truth: Sequence[FindingRecord], stated: Sequence[FindingRecord]
) -> list[tuple[FindingRecord, FindingRecord | None]]:
    """Each true finding with its partner, or None; the nearest pair first."""
    order = sorted((_mention_distance(a, b), i, j) for i, a in enumerate(truth) for j, b in enumerate(stated))
    partner: dict[int, int] = {}
    for _, i, j in order:
        if i not in partner and j not in partner.values():
            partner[i] = j
    return [(a, stated[partner[i]] if i in partner else None) for i, a in enumerate(truth)]


def agreement(stated: FindingRecord, lesion: FindingRecord) -> dict[str, bool]:
    """Whether a statement has the name, side and zone of a lesion, or one of the two has none."""
    return {
        "finding": lesion.finding in (stated.finding, LESION),
        "side": stated.side in (None, lesion.side, "bilateral"),
        "zone": stated.zone in (None, lesion.zone),
    }


def sizes_agree(a: float, b: float | None) -> bool:
    """Whether two sizes in mm differ by at most 3 mm."""
    return b is not None and abs(a - b) <= SIZE_TOLERANCE_MM + 1e-9


def _mention_distance(a: FindingRecord, b: FindingRecord) -> tuple[float, ...]:
    differing = (a.finding != b.finding) + (a.side != b.side) + (a.level != b.level)
    return differing, abs((a.size_mm or 0) - (b.size_mm or 0))


def _lesion_distance(stated: FindingRecord, lesion: FindingRecord) -> tuple[float, ...]:
    same = agreement(stated, lesion)
    agreeing = 2 * same["finding"] + same["side"] + same["zone"]
    return -agreeing, abs((stated.size_mm or lesion.size_mm) - lesion.size_mm), -lesion.measured.volume_mm3
