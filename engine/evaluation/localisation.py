"""Sides, craniocaudal levels and sizes that reports state: against their references, and against the lesions of masks.

Only what a report describes counts: its findings section, or where it has no headings the text before them, or
failing both its impression. Statements are those of :mod:`data.report_language.labeller` that are present.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from config.errors import InputError
from data.imaging.reader import read_mask, read_volume
from data.lesions import MeasuredLesion, find_lungs, measure_lesions
from data.report_language.labeller import FindingMention, states_normal
from data.report_language.sections import PREAMBLE
from engine.evaluation.bootstrap import Score, hit_score
from engine.evaluation.finding_metrics import Mentions
from engine.evaluation.report_checks import is_garbled

SIZE_TOLERANCE_MM = 3.0
WHOLE_REPORT_TOLERANCE_MM = 4.0
_MIN_LESION_MM3 = 20.0  # smaller components are specks of a mask
_DEPTHS = ("effusion", "pleural_thickening")  # their stated size is a depth, not a diameter


def described(mentions: Sequence[FindingMention]) -> list[FindingMention]:
    """The findings that a report describes as present, one for each place."""
    present = [m for m in mentions if m.polarity == "present"]
    sections = ([m for m in present if m.section == name] for name in ("findings", PREAMBLE, "impression"))
    return next(filter(None, sections), [])


def same_place(truth: FindingMention, stated: FindingMention) -> bool:
    """Same side, and the same level where the reference has one."""
    return truth.side == stated.side and truth.level in (None, stated.level)


def place_scores(references: Mentions, generated: Mentions) -> dict[str, Score]:
    """Reports against references. True and stated findings of a case are paired one to one, greedily: the pair that
    agrees in most of finding, side and level first, then the smaller difference in size. A true finding without a
    partner is wrong.

    Returns:
        ``location_acc``: true findings with a side whose partner has the same side, and the same level where the
        reference has one.
        ``size_within_3mm``: true findings with a size whose partner is within 3 mm.
        ``location_acc_found``, ``size_within_3mm_found``: the same among pairs of the same finding.
    """
    place, size, place_found, size_found = [], [], [], []
    for case, (truth, stated) in enumerate(zip(references, generated, strict=True)):
        for a, b in pair(described(truth), described(stated)):
            found = b is not None and a.finding == b.finding
            if a.side is not None:
                same = b is not None and same_place(a, b)
                place.append((case, same))
                place_found += [(case, same)] if found else []
            if a.size_mm is not None:
                same = b is not None and sizes_agree(a.size_mm, b.size_mm)
                size.append((case, same))
                size_found += [(case, same)] if found else []
    n = len(references)
    return {
        "location_acc": hit_score(place, n, "true findings whose statement has their side and height"),
        "location_acc_found": hit_score(place_found, n, "the same, of findings named rightly"),
        "size_within_3mm": hit_score(size, n, "true findings whose statement is within 3 mm of their size"),
        "size_within_3mm_found": hit_score(size_found, n, "the same, of findings named rightly"),
    }


def stated_in_full(mentions: Sequence[FindingMention]) -> list[FindingMention]:
    """The described findings with side, level and size. A free effusion is dependent: its zone is the lower one."""
    found = [replace(m, zone="lower") if m.finding == "effusion" else m for m in described(mentions)]
    return [m for m in found if m.side and m.level and m.size_mm]


def whole_report_scores(
    references: Mentions, generated: Mentions, texts: Sequence[str], language: str
) -> dict[str, Score]:
    """Whole reports against references that state every finding in full, as synthetic ones do; cases with another
    reference are left out. Findings are paired as in :func:`place_scores`.

    Args:
        generated, texts: mentions and text of each report.

    Returns:
        ``location_acc``: true findings whose partner has the same side and level.
        ``type_acc``: true findings whose partner is the same finding, and normal cases whose report states none.
        ``size_within_4mm``: true findings whose partner's size is within 4 mm.
        ``exact_acc``: cases with as many findings as true ones and every pair right in all of this.
        ``garbled_rate``: cases whose report has characters that no report holds, or states neither a finding in
        full nor that both lungs are normal. Such a report is wrong in everything.
    """
    place, kind, size, exact, garbled = [], [], [], [], []
    for case, (reference, mentions, text) in enumerate(zip(references, generated, texts, strict=True)):
        truth, stated = stated_in_full(reference), stated_in_full(mentions)
        if len(truth) < len(described(reference)):
            continue
        unreadable = is_garbled(text) or not (stated or states_normal(text, language))
        garbled.append((case, unreadable))
        right = [
            (False, False, False)
            if b is None or unreadable
            else (same_place(a, b), a.finding == b.finding, abs(a.size_mm - b.size_mm) <= WHOLE_REPORT_TOLERANCE_MM)
            for a, b in pair(truth, stated)
        ]
        place += [(case, hit) for hit, _, _ in right]
        kind += [(case, hit) for _, hit, _ in right] if truth else [(case, not stated and not unreadable)]
        size += [(case, hit) for _, _, hit in right]
        exact.append((case, not unreadable and len(stated) == len(truth) and all(map(all, right))))
    n = len(references)
    return {
        "location_acc": hit_score(place, n, "true findings whose statement has their side and height"),
        "type_acc": hit_score(kind, n, "true findings named rightly, and normal cases reported as normal"),
        "size_within_4mm": hit_score(size, n, "true findings whose statement is within 4 mm of their size"),
        "exact_acc": hit_score(exact, n, "reports right in number, place, name and size of their findings"),
        "garbled_rate": hit_score(garbled, n, "reports that cannot be read"),
    }


@dataclass(frozen=True)
class MaskedCase:
    """Lesions of one case. ``problem``: why they could not be measured, or empty."""

    lesions: list[MeasuredLesion]
    problem: str = ""


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
    """What reports describe against their masks; cases without a mask count for nothing.

    A statement is compared with the lesion that agrees best in finding (where the mask's labels have names), side
    and zone, then size. Several statements may mean the same lesion.

    Returns:
        ``side_acc``, ``zone_acc``: statements with a side (a zone) that their lesion has.
        ``size_within_3mm``: statements with a size within 3 mm of their lesion's longest axial diameter. Effusions
        and pleural thickening, whose size is a depth, are left out.
    """
    side, zone, size = [], [], []
    for case, (masked, mentions) in enumerate(zip(cases, reports, strict=True)):
        if masked is None or masked.problem:
            continue
        for stated in described(mentions):
            lesion = min(masked.lesions, key=lambda x: _lesion_distance(stated, x), default=None)
            if stated.side is not None:
                side.append((case, lesion is not None and side_agrees(stated, lesion)))
            if stated.zone is not None:
                zone.append((case, lesion is not None and zone_agrees(stated, lesion)))
            if stated.size_mm is not None and stated.finding not in _DEPTHS:
                size.append((case, lesion is not None and sizes_agree(lesion.diameter_mm, stated.size_mm)))
    n = len(reports)
    return {
        "side_acc": hit_score(side, n, "statements with the side of a lesion of the mask"),
        "zone_acc": hit_score(zone, n, "statements with the zone of that lesion"),
        "size_within_3mm": hit_score(size, n, "statements within 3 mm of that lesion's longest axial diameter"),
    }


def pair(
    truth: Sequence[FindingMention], stated: Sequence[FindingMention]
) -> list[tuple[FindingMention, FindingMention | None]]:
    """Each true finding with its partner, or None; the nearest pair first."""
    order = sorted((_mention_distance(a, b), i, j) for i, a in enumerate(truth) for j, b in enumerate(stated))
    partner: dict[int, int] = {}
    for _, i, j in order:
        if i not in partner and j not in partner.values():
            partner[i] = j
    return [(a, stated[partner[i]] if i in partner else None) for i, a in enumerate(truth)]


def finding_agrees(stated: FindingMention, lesion: MeasuredLesion) -> bool:
    """Whether a lesion has no name, or that of the finding."""
    return lesion.name == stated.finding or lesion.name.startswith("label ")


def side_agrees(stated: FindingMention, lesion: MeasuredLesion) -> bool:
    """Whether a statement has no side, or one that its lesion lies in."""
    return stated.side in (None, lesion.side, "bilateral")


def zone_agrees(stated: FindingMention, lesion: MeasuredLesion) -> bool:
    """Whether a statement has no zone, or that of its lesion."""
    return stated.zone in (None, lesion.zone)


def sizes_agree(a: float, b: float | None) -> bool:
    """Whether two sizes in mm differ by at most 3 mm."""
    return b is not None and abs(a - b) <= SIZE_TOLERANCE_MM + 1e-9


def _mention_distance(a: FindingMention, b: FindingMention) -> tuple[float, ...]:
    differing = (a.finding != b.finding) + (a.side != b.side) + (a.level != b.level)
    return differing, abs((a.size_mm or 0) - (b.size_mm or 0))


def _lesion_distance(stated: FindingMention, lesion: MeasuredLesion) -> tuple[float, ...]:
    agreeing = 2 * finding_agrees(stated, lesion) + side_agrees(stated, lesion) + zone_agrees(stated, lesion)
    return -agreeing, abs((stated.size_mm or lesion.diameter_mm) - lesion.diameter_mm), -lesion.volume_mm3
