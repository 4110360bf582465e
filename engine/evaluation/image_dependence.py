"""Do the reports depend on the image, and are they better than copied ones? Scores with other images and with none,
and a verdict.

A model that has only learnt the language of reports writes fluent reports that fit no patient. Another patient's
image, a blank one or none at all must then make its reports worse, and does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.evaluation.baselines import BASELINES
from engine.evaluation.bootstrap import Score, case_weights, hit_score, interval, ratio_score
from engine.evaluation.finding_metrics import Mentions, label_matrix, macro_f1, resampled_counts

FEW_CASES = 20
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
