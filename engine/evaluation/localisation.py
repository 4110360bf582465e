"""Sides, heights and sizes that reports state: against their references, and against lesions measured on masks.

Only what a report describes counts: its findings section, or where it has no headings the text before them, or
failing both its impression. Statements are those of :mod:`data.report_language.labeller` that are present.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config.errors import InputError
from data.imaging.reader import read_mask, read_volume
from data.lesions import MeasuredLesion, find_lungs, measure_lesions
from data.report_language.labeller import FindingMention, states_normal
from data.report_language.sections import PREAMBLE
from engine.evaluation.bootstrap import REPEATS, Score, case_weights, interval
from engine.evaluation.report_checks import find_garble

SIZE_TOLERANCE_MM = 3.0
WHOLE_REPORT_TOLERANCE_MM = 4.0
_MIN_LESION_MM3 = 20.0  # smaller components are specks of a mask
_DEPTHS = ("effusion", "pleural_thickening")  # their stated size is a depth, not a diameter
Hits = list[tuple[int, bool]]  # case, right or wrong


def described(mentions: Sequence[FindingMention]) -> list[FindingMention]:
    """The findings that a report describes as present, one for each place."""
    present = [m for m in mentions if m.polarity == "present"]
    for section in ("findings", PREAMBLE, "impression"):
        if own := [m for m in present if m.section == section]:
            return own
    return []


def same_place(truth: FindingMention, stated: FindingMention) -> bool:
    """Same side, and same height where the reference says one."""
    return truth.side == stated.side and (truth.level is None or truth.level == stated.level)


def place_scores(
    references: Sequence[Sequence[FindingMention]], generated: Sequence[Sequence[FindingMention]]
) -> dict[str, Score]:
    """Reports against references. True and stated findings of a case are paired one to one, greedily: the pair that
    agrees in most of finding, side and height first, then the smaller difference in size. A true finding without a
    partner is wrong.

    Returns:
        ``location_acc``: true findings with a side whose partner has the same side and height.
        ``location_acc_found``: the same among pairs of the same finding.
        ``size_within_3mm``: true findings with a size whose partner is within 3 mm.
        ``size_within_3mm_found``: the same among pairs of the same finding.
    """
    place, place_found, size, size_found = [], [], [], []
    for case, (truth, stated) in enumerate(zip(references, generated, strict=True)):
        for a, b in pair(described(truth), described(stated), _mention_distance):
            found = b is not None and a.finding == b.finding
            if a.side is not None:
                place.append((case, b is not None and same_place(a, b)))
                place_found += [place[-1]] if found else []
            if a.size_mm is not None:
                size.append((case, b is not None and _within(a.size_mm, b.size_mm)))
                size_found += [size[-1]] if found else []
    n = len(references)
    return {
        "location_acc": share(place, n, "true findings whose statement has their side and height"),
        "location_acc_found": share(place_found, n, "the same, of findings named rightly"),
        "size_within_3mm": share(size, n, "true findings whose statement is within 3 mm of their size"),
        "size_within_3mm_found": share(size_found, n, "the same, of findings named rightly"),
    }


def stated_in_full(mentions: Sequence[FindingMention]) -> list[FindingMention]:
    """The described findings with side, height and size. A free effusion is dependent: its zone is the lower one."""
    found = [replace(m, zone="lower") if m.finding == "effusion" else m for m in described(mentions)]
    return [m for m in found if m.side and m.level and m.size_mm]


def whole_report_scores(
    references: Sequence[Sequence[FindingMention]],
    generated: Sequence[Sequence[FindingMention]],
    texts: Sequence[str],
    language: str,
) -> dict[str, Score]:
    """Whole reports against references that state every finding in full, as synthetic ones do; cases with another
    reference are left out. Findings are paired as in :func:`place_scores`.

    Args:
        generated, texts: mentions and text of each report.

    Returns:
        ``location_acc``: true findings whose partner has the same side and height.
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
        unreadable = find_garble(text).garbled or not (stated or states_normal(text, language))
        garbled.append((case, unreadable))
        right = [
            (False, False, False)
            if b is None or unreadable
            else (same_place(a, b), a.finding == b.finding, abs(a.size_mm - b.size_mm) <= WHOLE_REPORT_TOLERANCE_MM)
            for a, b in pair(truth, stated, _mention_distance)
        ]
        place += [(case, hit) for hit, _, _ in right]
        kind += [(case, hit) for _, hit, _ in right] if truth else [(case, not stated and not unreadable)]
        size += [(case, hit) for _, _, hit in right]
        exact.append((case, not unreadable and len(stated) == len(truth) and all(map(all, right))))
    n = len(references)
    return {
        "location_acc": share(place, n, "true findings whose statement has their side and height"),
        "type_acc": share(kind, n, "true findings named rightly, and normal cases reported as normal"),
        "size_within_4mm": share(size, n, "true findings whose statement is within 4 mm of their size"),
        "exact_acc": share(exact, n, "reports right in number, place, name and size of their findings"),
        "garbled_rate": share(garbled, n, "reports that cannot be read"),
    }


@dataclass(frozen=True)
class MaskedCase:
    """Lesions of one case. ``problem``: why they could not be measured, or empty."""

    lesions: list[MeasuredLesion]
    problem: str = ""


def measure_case(image: Path, mask: Path, names: Mapping[int, str] | None) -> MaskedCase:
    """Lesions of a mask by side, height and diameter; a scan whose lungs cannot be found is a problem, not an end."""
    volume = read_volume(image)
    labels = read_mask(mask, volume)
    if not labels.any():
        return MaskedCase([])
    try:
        lungs = find_lungs(volume.array, volume.spacing)
    except InputError as error:
        return MaskedCase([], f"{image.name}: {error}")
    return MaskedCase(measure_lesions(labels, volume.spacing, lungs, names, _MIN_LESION_MM3))


def mask_scores(cases: Sequence[MaskedCase | None], reports: Sequence[Sequence[FindingMention]]) -> dict[str, Score]:
    """What reports describe against their masks; cases without a mask count for nothing.

    A statement is compared with the lesion that agrees best in finding (where the mask's labels have names), side
    and height, then size. Several statements may mean the same lesion.

    Returns:
        ``side_acc``, ``zone_acc``: statements with a side (a zone) that their lesion has.
        ``size_within_3mm``: statements with a size within 3 mm of their lesion's longest axial diameter. Effusions
        and pleural thickening, whose size is a depth, are left out.
    """
    side, zone, size = [], [], []
    for case, (held, mentions) in enumerate(zip(cases, reports, strict=True)):
        if held is None or held.problem:
            continue
        for stated in described(mentions):
            lesion = min(held.lesions, key=lambda x: _lesion_distance(stated, x), default=None)
            if stated.side is not None:
                side.append((case, lesion is not None and stated.side in (lesion.side, "bilateral")))
            if stated.zone is not None:
                zone.append((case, lesion is not None and stated.zone == lesion.zone))
            if stated.size_mm is not None and stated.finding not in _DEPTHS:
                size.append((case, lesion is not None and _within(lesion.diameter_mm, stated.size_mm)))
    n = len(reports)
    return {
        "side_acc": share(side, n, "statements with the side of a lesion of the mask"),
        "zone_acc": share(zone, n, "statements with the zone of that lesion"),
        "size_within_3mm": share(size, n, "statements within 3 mm of that lesion's longest axial diameter"),
    }


def pair(
    truth: Sequence[FindingMention],
    stated: Sequence[FindingMention],
    distance: Callable[[FindingMention, FindingMention], tuple[float, ...]],
) -> list[tuple[FindingMention, FindingMention | None]]:
    """Each true finding with its partner, or None; the nearest pair first."""
    order = sorted((distance(a, b), i, j) for i, a in enumerate(truth) for j, b in enumerate(stated))
    partner: dict[int, int] = {}
    for _, i, j in order:
        if i not in partner and j not in partner.values():
            partner[i] = j
    return [(a, stated[partner[i]] if i in partner else None) for i, a in enumerate(truth)]


def share(hits: Hits, cases: int, what: str, repeats: int = REPEATS, seed: int = 0) -> Score:
    """Share of right ones with its interval over cases; NaN where there are none. ``n`` counts the hits' cases."""
    if not hits:
        return Score(float("nan"), float("nan"), float("nan"), 0, what)
    right, total = np.zeros(cases), np.zeros(cases)
    for case, hit in hits:
        right[case] += hit
        total[case] += 1
    weights = case_weights(cases, repeats, seed)
    below = weights @ total
    drawn = np.divide(weights @ right, below, out=np.full(repeats, np.nan), where=below > 0)
    return Score(float(right.sum() / total.sum()), *interval(drawn), len(hits), what)


def _mention_distance(a: FindingMention, b: FindingMention) -> tuple[float, ...]:
    differing = (a.finding != b.finding) + (a.side != b.side) + (a.level != b.level)
    return differing, abs((a.size_mm or 0) - (b.size_mm or 0))


def _lesion_distance(stated: FindingMention, lesion: MeasuredLesion) -> tuple[float, ...]:
    named = not lesion.name.startswith("label ")
    differing = 2 * (named and lesion.name != stated.finding)
    differing += (stated.side is not None and stated.side not in (lesion.side, "bilateral")) + (
        stated.zone is not None and stated.zone != lesion.zone
    )
    return differing, abs((stated.size_mm or lesion.diameter_mm) - lesion.diameter_mm), -lesion.volume_mm3


def _within(a: float, b: float | None) -> bool:
    return b is not None and abs(a - b) <= SIZE_TOLERANCE_MM + 1e-9
