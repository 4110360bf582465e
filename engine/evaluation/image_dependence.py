"""Do the reports depend on the image and follow their findings prompt, and are they better than copied ones? Scores
with other images and with none, of corrected prompts, and a verdict.

A model that has only learnt the language of reports writes fluent reports that fit no patient. Another patient's
image, a blank one or none at all must then make its reports worse, and does not.

A correction changes one point of the findings prompt in side, level, size, finding or presence; the report is written
again, and the labeller reads what it states:

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
from engine.evaluation.baselines import BASELINES
from engine.evaluation.bootstrap import Score, case_weights, hit_score, interval, mean_score, ratio_score
from engine.evaluation.finding_metrics import Mentions, label_matrix, macro_f1, resampled_counts
from engine.evaluation.localisation import described
from engine.findings_prompt import states, unmatched

FEW_CASES = 20
KINDS = ("side", "level", "size", "finding", "presence")
_SAME = 0.95  # fraction of reports equal to the prior's from which the reports do not depend on the image
_MIN_GAP = 0.01  # nats per token; a smaller loss gap does not count, even where its interval excludes 0
VERDICTS = {
    "depends": "the reports depend on the image",
    "partly": "the reports depend on the image only in part",
    "independent": "the reports do not depend on the image",
    "unclear": "too few cases to tell whether the reports depend on the image",
    **{f"below_{name}": f"the reports are below {what}" for name, what in BASELINES.items()},
}


def macro_difference(references: Mentions, one: Mentions, other: Mentions) -> Score:
    """Macro-F1 of ``one`` minus that of ``other`` on the same cases, with the interval of the paired difference."""
    truth, *reports = (label_matrix(mentions) for mentions in (references, one, other))
    n, known = len(truth), truth.any(0)
    weights = np.concatenate([np.ones((1, n), int), case_weights(n)])
    # In a sample that states no known finding macro-F1 counts as 0.
    a, b = (np.nan_to_num(macro_f1(resampled_counts(truth, found, weights), known)) for found in reports)
    difference = a - b if known.any() else np.full(len(weights), np.nan)
    return Score(float(difference[0]), *interval(difference[1:]), n, "difference of macro-F1, same cases")


def loss_gap(own: Sequence[Mapping], other: Sequence[Mapping]) -> Score:
    """By how many nats per token the true report is less likely under ``other`` than under ``own``."""
    gaps = [b["nats"] - a["nats"] for a, b in zip(own, other, strict=True)]
    return ratio_score(gaps, [record["tokens"] for record in own], "nats per token")


def nats_per_token(records: Sequence[Mapping]) -> float:
    """Mean loss of the true reports under one condition."""
    return sum(record["nats"] for record in records) / max(sum(record["tokens"] for record in records), 1)


def false_findings_on_normal(references: Mentions, generated: Mentions) -> Score:
    """Fraction of the cases without a finding in the reference whose report states one."""
    truth, found = label_matrix(references), label_matrix(generated)
    hits = [(case, bool(found[case].any())) for case in np.flatnonzero(~truth.any(1)).tolist()]
    return hit_score(hits, len(truth), "reports of normal cases that state a finding")


def same_fraction(texts: Sequence[str], others: Sequence[str]) -> float:
    """Fraction of reports that equal, but for white space, the report of another condition."""
    return float(np.mean(["".join(a.split()) == "".join(b.split()) for a, b in zip(texts, others, strict=True)]))


def judge(
    cases: int,
    p_value: float,
    shuffled: Score,
    prior: Score,
    gap: Score,
    same: float,
    copied: Mapping[str, Score] | None = None,
) -> tuple[str, list[str]]:
    """The verdict, a key of ``VERDICTS``, from four criteria and the baselines; and the numbers that it rests on.

    The reports depend on the image where all criteria hold. They do not where none holds, or where nearly all reports
    equal those of the prior. Otherwise they depend on it in part. Reports that depend on it and are still below a
    baseline, by an interval that excludes 0, get that as their verdict.

    Args:
        p_value: of macro-F1 against the permutation baseline.
        shuffled, prior: macro-F1 with the own image minus that under the condition.
        gap: loss gap under ``shuffled``.
        same: fraction of reports equal to those of the prior.
        copied: a score of the reports minus that of each baseline.
    """

    def fall(score: Score) -> str:
        return f"{-score.value:+.3f} [{-score.high:+.3f}, {-score.low:+.3f}]"

    criteria = {
        f"macro-F1 is above that of the permutation baseline (p = {p_value:.3g})": p_value < 0.05,
        f"shuffled images change macro-F1 by {fall(shuffled)}": shuffled.low > 0,
        f"without an image macro-F1 changes by {fall(prior)}": prior.low > 0,
        f"shuffled images cost {gap.value:.3f} nats per token [{gap.low:.3f}, {gap.high:.3f}]": gap.low > _MIN_GAP,
    }
    reasons = [f"{'yes' if holds else 'no'}: {criterion}" for criterion, holds in criteria.items()]
    reasons.append(f"{same:.0%} of the reports are word for word those without an image")
    copied = copied or {}
    for name, score in copied.items():
        margin = f"{score.value:+.3f} [{score.low:+.3f}, {score.high:+.3f}]"
        reasons.append(f"{'yes' if score.low > 0 else 'no'}: {score.what} is above {BASELINES[name]} ({margin})")
    below = [f"below_{name}" for name, score in copied.items() if score.high < 0]
    if cases < FEW_CASES:
        code = "unclear"
    elif same >= _SAME or not any(criteria.values()):
        code = "independent"
    elif below:
        code = below[0]
    else:
        code = "depends" if all(criteria.values()) else "partly"
    return code, reasons


# ---------------------------------------------------------------------------- corrected findings prompts


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
    others = [name for name in names if name != point.finding]
    kinds += ["level"] * bool(point.level and inside) + ["finding"] * bool(inside and others)
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
        new = replace(point, finding=str(rng.choice(others)))
    return [*said[:k], new, *said[k + 1 :]], kind, new


def follows(record: Mapping[str, Any], stated: Sequence[FindingRecord]) -> tuple[bool, bool]:
    """Whether the changed point is right in a report, and whether all others are.

    ``record``: "asked", the corrected prompt's points, "kind", "point"; ``stated``: mentions of the report.
    """
    asked, point = [FindingRecord.from_dict(one) for one in record["asked"]], FindingRecord.from_dict(record["point"])
    missing, left = unmatched(described(stated), asked)
    if record["kind"] == "presence" and point not in asked:
        gone = not any(states(mention, point) for mention in left)
        return gone, not missing and (not left or not gone)
    changed = next(one for one in asked if one == point)
    hit = all(one is not changed for one in missing)
    return hit, all(one is changed for one in missing) and len(left) <= (not hit)


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
