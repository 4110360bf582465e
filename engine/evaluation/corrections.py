"""Whether a report follows a corrected findings prompt: one key point is changed in side, level, size, finding or
presence, the report is written again, and the labeller reads what it states.

    changed   reports that state the changed point as it was changed, or no longer where it was taken out
    others    reports that state all other points of the prompt, and nothing besides
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.finding_targets import LEVELS
from data.findings import FindingRecord
from data.report_language.key_points import OUTSIDE_LUNG
from engine.evaluation.bootstrap import mean_score
from engine.evaluation.localisation import described

KINDS = ("side", "level", "size", "finding", "presence")
_SIZE_MM = 1.0  # a stated size is that of the prompt, rounded


def correct(
    said: Sequence[FindingRecord], names: Sequence[str], rng: np.random.Generator
) -> tuple[list[FindingRecord], str, FindingRecord]:
    """``said`` with one point changed, what was changed, and the changed point; for a point taken out, that point.

    ``names``: findings that a point may be changed to, or a new one may have. Nothing said gets a point.
    """
    names = [name for name in names if name not in OUTSIDE_LUNG]
    said = list(said)
    if not said:
        level, size = str(rng.choice(LEVELS)), float(rng.integers(8, 30))
        new = FindingRecord(str(rng.choice(names)), side=str(rng.choice(("left", "right"))), zone=level, size_mm=size)
        return [new], "presence", new
    k = int(rng.integers(len(said)))
    point = said[k]
    kinds = ["presence"]
    kinds += ["side"] * (point.side in ("left", "right")) + ["size"] * bool(point.size_mm)
    inside = point.finding not in OUTSIDE_LUNG
    kinds += ["level"] * bool(point.level and inside) + ["finding"] * inside
    kind = str(rng.choice(kinds))
    if kind == "presence":
        return said[:k] + said[k + 1 :], kind, point
    if kind == "side":
        new = replace(point, side="left" if point.side == "right" else "right")
    elif kind == "level":
        new = replace(point, lobe=None, zone=str(rng.choice([level for level in LEVELS if level != point.level])))
    elif kind == "size":
        new = replace(point, size_mm=float(round(point.size_mm * rng.choice((0.6, 1.5))) or 1))
    else:
        new = replace(point, finding=str(rng.choice([name for name in names if name != point.finding])))
    return [*said[:k], new, *said[k + 1 :]], kind, new


def follows(record: Mapping[str, Any], stated: Sequence[FindingRecord]) -> tuple[bool, bool]:
    """Whether the changed point is right in a report, and whether all others are.

    ``record``: "asked", the corrected prompt's points, "kind", "point"; ``stated``: mentions of the report.
    """
    asked, point = [FindingRecord.from_dict(one) for one in record["asked"]], FindingRecord.from_dict(record["point"])
    left = list(described(stated))
    there = {}
    for one in asked:
        match = next((m for m in left if _same(one, m)), None)
        there[id(one)] = match is not None
        if match is not None:
            left.remove(match)
    if record["kind"] == "presence" and point not in asked:
        gone = not any(_same(point, m) for m in left)
        return gone, all(there.values()) and (not left or not gone)
    changed = next(one for one in asked if one == point)
    others = all(there[id(one)] for one in asked if one is not changed)
    return there[id(changed)], others and len(left) <= (not there[id(changed)])


def correction_scores(records: Sequence[Mapping[str, Any]], mentions: Sequence[Sequence[FindingRecord]]) -> dict:
    """``changed`` and ``others`` over all corrected reports, and ``changed`` by what was changed."""
    results = [follows(record, stated) for record, stated in zip(records, mentions, strict=True)]
    kinds = [record["kind"] for record in records]
    by_kind = {kind: [hit for (hit, _), k in zip(results, kinds, strict=True) if k == kind] for kind in KINDS}
    return {
        "changed": mean_score([hit for hit, _ in results], "reports that state the changed point as it was changed"),
        "others": mean_score([rest for _, rest in results], "reports that state all other points, and nothing else"),
        "by_kind": {kind: {"n": len(hits), "changed": float(np.mean(hits))} for kind, hits in by_kind.items() if hits},
    }


def _same(point: FindingRecord, stated: FindingRecord) -> bool:
    """A statement says a point: its finding, side, level and size, of what the point has."""
    size = point.size_mm is None or (stated.size_mm is not None and abs(point.size_mm - stated.size_mm) <= _SIZE_MM)
    return (
        point.finding == stated.finding
        and point.side in (None, stated.side)
        and (point.finding in OUTSIDE_LUNG or point.level in (None, stated.level))
        and size
    )
