"""From the findings that reports state to what the findings head learns and what a findings prompt says in training.

stated (report) ↔ measured (segmentation)   paired one to one: which finding each lesion is
stated ↔ believed (held-out cases)          how prompts err: missed, false, another finding, side or zone
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from data.findings import DESCRIPTORS, LESION, FindingRecord

MOST_LESIONS = 8  # of a case that the head and a prompt are given, the largest first
LEAST_POSITIVE = 10  # training reports that must state a finding for the head to learn it
DEPTHS = ("effusion", "pleural_thickening")  # their stated size is a thickness, not a diameter
LEVELS, SIDES = ("upper", "middle", "lower"), ("left", "right", "bilateral")
UNKNOWN, TYPICAL_MM = -100, 15.0  # as models/findings_head.py has them
_SIZE_RATIO = 2.5  # two sizes of one lesion differ by less
_ENOUGH = 5  # pairs of one finding whose sizes say how its size is mistaken
_SYSTEMATIC = 0.2  # least logarithm of the ratio of two sizes that are no estimates of one another
_LEAST_ERROR = 0.03  # of each kind in training, whatever few held-out cases say


def learnable(reports: Sequence[Sequence[FindingRecord] | None]) -> tuple[list[str], dict[str, int]]:
    """Findings that at least :data:`LEAST_POSITIVE` reports state, most frequent first, and the others with their
    number of reports."""
    counts = Counter(name for stated in reports for name in {f.finding for f in stated or []} if name != LESION)
    known = [name for name, count in counts.most_common() if count >= LEAST_POSITIVE]
    return known, {name: count for name, count in counts.most_common() if count < LEAST_POSITIVE}


def measured_size(finding: str, lesion: FindingRecord) -> float | None:
    """Size in mm of a measured lesion as a report of this finding would state it."""
    return lesion.measured.thick_mm if finding in DEPTHS and lesion.measured else lesion.size_mm


def pair_findings(
    one: Sequence[FindingRecord], other: Sequence[FindingRecord]
) -> list[tuple[FindingRecord | None, FindingRecord | None]]:
    """The records of both, paired one to one where they can be the same lesion, and alone where they have no partner.

    The same lesion: one side, levels at most one step apart, sizes that differ by less than a factor of 2.5, of what
    both say. The pairs agree in as much as possible: side, level, finding and size.
    """
    worth = np.array([[_agreement(a, b) for b in other] for a in one]).reshape(len(one), len(other))
    rows, columns = linear_sum_assignment(worth, maximize=True)
    taken = [(r, c) for r, c in zip(rows.tolist(), columns.tolist(), strict=True) if worth[r, c] > 0]
    alone = [(one[r], None) for r in range(len(one)) if r not in {r for r, _ in taken}]
    spare = [(None, other[c]) for c in range(len(other)) if c not in {c for _, c in taken}]
    return [*((one[r], other[c]) for r, c in taken), *alone, *spare]


def one_of_several(lesion: FindingRecord, stated: Sequence[FindingRecord]) -> FindingRecord | None:
    """What a report says once of several lesions, where this can be one of them: multiple nodules, effusions on both
    sides. Their sizes need not agree, the largest is stated."""
    several = (replace(f, size_mm=None) for f in stated if f.count == 0 or (f.count or 1) > 1 or f.side == "bilateral")
    likely = [(_agreement(f, lesion), k, f) for k, f in enumerate(several)]
    worth, _, best = max(likely, default=(0.0, 0, None), key=lambda one: one[:2])
    return best if worth > 0 else None


def _agreement(a: FindingRecord, b: FindingRecord) -> float:
    """0: cannot be the same lesion."""
    if a.side and b.side and "bilateral" not in (a.side, b.side) and a.side != b.side:
        return 0.0
    step = 0 if not (a.level and b.level) else abs(LEVELS.index(a.level) - LEVELS.index(b.level))
    sizes = [measured_size(one.finding if one.finding != LESION else two.finding, one) for one, two in ((a, b), (b, a))]
    ratio = math.exp(abs(math.log(sizes[0] / sizes[1]))) if all(sizes) else 1.5
    if step > 1 or ratio > _SIZE_RATIO:
        return 0.0
    return 1 + (a.side == b.side) + (1 - step) + (a.finding == b.finding) + 1 / ratio


class Targets(NamedTuple):
    """Of one case, for :class:`models.findings_head.FindingsHead`: lists over F findings and M lesions."""

    presence: list[int]
    side: list[int]
    zone: list[int]
    size: list[float]
    lesion: list[int]


def targets(names: Sequence[str], stated: Sequence[FindingRecord] | None, measured: Sequence[FindingRecord]) -> Targets:
    """``stated`` None: nothing is known of the case. Of a finding at several places, the largest is the target."""
    n, unknown = len(names), [UNKNOWN] * len(names)
    found = Targets([*unknown], [*unknown], [*unknown], [math.nan] * n, [UNKNOWN] * MOST_LESIONS)
    if stated is None:
        return found
    found.presence[:] = [int(any(f.finding == name for f in stated)) for name in names]
    for f in sorted(stated, key=lambda f: f.size_mm or 0.0):
        if f.finding in names:
            k = names.index(f.finding)
            found.side[k] = SIDES.index(f.side) if f.side else UNKNOWN
            found.zone[k] = LEVELS.index(f.level) if f.level else UNKNOWN
            found.size[k] = math.log(f.size_mm / TYPICAL_MM) if f.size_mm else math.nan
    place = {id(m): k for k, m in enumerate(measured[:MOST_LESIONS])}
    for a, b in pair_findings(stated, measured[:MOST_LESIONS]):
        if b is not None:
            # A rare finding is none of the head's, and no false lesion either.
            a = a or one_of_several(b, stated)
            known = n if a is None else names.index(a.finding) if a.finding in names else UNKNOWN
            found.lesion[place[id(b)]] = known
    return found


def descriptors(measured: Sequence[FindingRecord]) -> list[list[float]]:
    """(M, P) numbers of the largest lesions; rows of zeros where there are fewer."""
    rows = [lesion.descriptors() for lesion in measured[:MOST_LESIONS]]
    return rows + [[0.0] * DESCRIPTORS] * (MOST_LESIONS - len(rows))


@dataclass
class PromptErrors:
    """How prompts err on held-out cases, drawn again for training: a model that is shown the truth alone would repeat a
    wrong prompt word for word, and one that is shown none would ignore it. Sizes err by their systematic part alone:
    visual tokens know no better than what was measured, and a report is to state that.

    ``pairs``: (stated, believed) of held-out cases, from :func:`pair_findings`; ``cases``: their number.
    """

    pairs: list[tuple[FindingRecord | None, FindingRecord | None]] = field(default_factory=list)
    cases: int = 0

    @classmethod
    def of(cls, stated: Sequence[Sequence[FindingRecord]], believed: Sequence[Sequence[FindingRecord]]) -> PromptErrors:
        """From what reports state and what prompts say of the same cases."""
        pairs = [
            (a, b)
            for one, other in zip(stated, believed, strict=True)
            for a, b in pair_findings(one, other)
            if a is not None or one_of_several(b, one) is None
        ]
        return cls(pairs, len(stated))

    def rates(self) -> dict[str, float]:
        """Of stated findings: missed, and of those said the fraction with another finding, side or zone; false findings
        a case."""
        both = [(a, b) for a, b in self.pairs if a is not None and b is not None]
        known = [a for a, _ in self.pairs if a is not None]
        wrong = {
            name: sum(getattr(a, name) is not None and getattr(a, name) != getattr(b, name) for a, b in both)
            for name in ("finding", "side", "level")
        }
        return {
            "missed": (len(known) - len(both)) / max(len(known), 1),
            **{name: count / max(len(both), 1) for name, count in wrong.items()},
            "false": sum(a is None for a, _ in self.pairs) / max(self.cases, 1),
        }

    def draw(self, stated: Sequence[FindingRecord], rng: np.random.Generator) -> list[FindingRecord]:
        """``stated`` as a prompt of a held-out case might say it."""
        rates = {name: max(rate, _LEAST_ERROR) for name, rate in self.rates().items()}
        said = []
        for f in stated:
            if rng.random() < rates["missed"]:
                continue
            changes: dict[str, Any] = {}
            if rng.random() < rates["finding"]:
                changes["finding"] = _one(self._mistaken_finding(f.finding, stated), rng)
            if f.side and rng.random() < rates["side"]:
                other = [{"left": "right", "right": "left"}.get(f.side, f.side)]
                changes["side"] = _one(self._mistaken("side", f.side) or other, rng)
            if f.level and rng.random() < rates["level"]:
                near = [level for level in LEVELS if abs(LEVELS.index(level) - LEVELS.index(f.level)) == 1]
                level = _one(self._mistaken("level", f.level) or near, rng)
                changes |= {"zone": level, "lobe": None} if f.zone else {"lobe": level}
            if f.size_mm and (ratio := self._size_ratio(f.finding)):
                changes["size_mm"] = float(round(f.size_mm * ratio) or 1)
            said.append(replace(f, **changes))
        false = [b for a, b in self.pairs if a is None] or [b for _, b in self.pairs if b is not None]
        return said + [_one(false, rng) for _ in range(rng.poisson(rates["false"]) if false else 0)]

    def _mistaken(self, name: str, value: str) -> list[str | None]:
        """What held-out prompts say where the report says ``value``, and they differ."""
        return [getattr(b, name) for a, b in self.pairs if a and b and getattr(a, name) == value != getattr(b, name)]

    def _mistaken_finding(self, finding: str, stated: Sequence[FindingRecord]) -> list[str]:
        """Of a finding that no held-out prompt mistakes: what others are mistaken for, else any other finding."""
        wrong = [b.finding for a, b in self.pairs if a and b and a.finding != b.finding]
        names = {f.finding for pair in self.pairs for f in pair if f} | {f.finding for f in stated}
        return self._mistaken("finding", finding) or wrong or sorted(names - {finding}) or [finding]

    def _size_ratio(self, finding: str) -> float | None:
        """Median of said over stated sizes where it is far from 1: of an effusion the depth is stated, and prompts of
        measured lesions say its diameter."""
        both = [(a, b) for a, b in self.pairs if a and b and a.size_mm and b.size_mm and a.finding == finding]
        ratio = float(np.median([b.size_mm / a.size_mm for a, b in both])) if len(both) >= _ENOUGH else 1.0
        return ratio if abs(math.log(ratio)) > _SYSTEMATIC else None


def _one(values: Sequence[Any], rng: np.random.Generator) -> Any:
    return values[rng.integers(len(values))]
