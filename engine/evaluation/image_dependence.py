"""Do the reports depend on the image? Scores with other images and with none, and a verdict in words.

A model that has learnt how reports sound writes fluent reports of nobody. It is found out by what should hurt and
does not: another patient's image, an empty one, none at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.report_language.labeller import FindingMention
from engine.evaluation.bootstrap import Score, case_weights, interval
from engine.evaluation.finding_metrics import label_matrix
from engine.evaluation.localisation import share

FEW_CASES = 20
_SAME = 0.95  # share of reports that are word for word those of the prior, from which the image changes nothing
_MIN_GAP = 0.01  # nats per token; a smaller loss gap is nothing, however certain
VERDICTS = {
    "depends": "the reports depend on the image",
    "partly": "the reports depend on the image only in part",
    "independent": "the reports do not depend on the image",
    "unclear": "too few cases to tell whether the reports depend on the image",
}
Mentions = Sequence[Sequence[FindingMention]]


@dataclass(frozen=True)
class Verdict:
    """``code``: a key of ``VERDICTS``; ``text``: in words; ``reasons``: the numbers it rests on."""

    code: str
    text: str
    reasons: list[str]


def macro_difference(references: Mentions, one: Mentions, other: Mentions, repeats: int = 1000, seed: int = 0) -> Score:
    """Macro-F1 of ``one`` minus that of ``other`` on the same cases, with the interval of the paired difference."""
    truth, a, b = (label_matrix(reports) for reports in (references, one, other))
    known = truth.any(0)
    truth, a, b = truth[:, known].astype(float), a[:, known].astype(float), b[:, known].astype(float)
    weights = np.concatenate([np.ones((1, len(truth))), case_weights(len(truth), repeats, seed)])

    def macro(found: np.ndarray) -> np.ndarray:
        below = weights @ (truth + found)
        f1 = np.divide(2 * (weights @ (truth * found)), below, out=np.full(below.shape, np.nan), where=below > 0)
        held = np.isfinite(f1)
        return np.where(held, f1, 0).sum(1) / np.maximum(held.sum(1), 1)

    difference = macro(a) - macro(b) if known.any() else np.full(repeats + 1, np.nan)
    return Score(float(difference[0]), *interval(difference[1:]), len(truth), "difference of macro-F1, same cases")


def loss_gap(own: Sequence[Mapping], other: Sequence[Mapping], repeats: int = 1000, seed: int = 0) -> Score:
    """By how many nats per token the true report is less likely under ``other`` than under ``own``."""
    tokens = np.array([record["tokens"] for record in own], float)
    gaps = np.array([b["nats"] - a["nats"] for a, b in zip(own, other, strict=True)])
    weights = case_weights(len(tokens), repeats, seed)
    drawn = (weights @ gaps) / np.maximum(weights @ tokens, 1)
    return Score(float(gaps.sum() / max(tokens.sum(), 1)), *interval(drawn), len(tokens), "nats per token")


def nats_per_token(records: Sequence[Mapping]) -> float:
    return sum(record["nats"] for record in records) / max(sum(record["tokens"] for record in records), 1)


def false_findings_on_normal(references: Mentions, generated: Mentions) -> Score:
    """Of the cases whose reference states no finding, the share whose report states one."""
    truth, found = label_matrix(references), label_matrix(generated)
    hits = [(case, bool(found[case].any())) for case in np.flatnonzero(~truth.any(1)).tolist()]
    return share(hits, len(truth), "reports of normal cases that state a finding")


def same_share(texts: Sequence[str], others: Sequence[str]) -> float:
    """Share of reports that are, word for word, what is written without this image."""
    equal = ["".join(a.split()) == "".join(b.split()) for a, b in zip(texts, others, strict=True)]
    return sum(equal) / len(equal)


def judge(
    cases: int,
    p_value: float,
    differences: Mapping[str, Score],
    gaps: Mapping[str, Score],
    same_as_prior: float,
) -> Verdict:
    """The verdict, from four signs that do not rest on one another's assumptions.

    Args:
        cases: number of cases.
        p_value: of macro-F1 against reports dealt to other cases.
        differences: macro-F1 with the own image minus that under ``shuffled``, ``blank`` and ``prior``.
        gaps: loss gaps of the same conditions.
        same_as_prior: share of reports equal to those of the prior.

    The reports depend on the image where all signs say so, and do not where none does, or where nearly all reports
    are those of the prior; in between they do in part.
    """
    signs = {f"macro-F1 is above that of dealt reports (p = {p_value:.3g})": p_value < 0.05}
    shuffled, gap = differences["shuffled"], gaps["shuffled"]
    signs[
        f"shuffled images change macro-F1 by {-shuffled.value:+.3f} [{-shuffled.high:+.3f}, {-shuffled.low:+.3f}]"
    ] = shuffled.low > 0
    prior = differences["prior"]
    signs[f"without an image macro-F1 changes by {-prior.value:+.3f} [{-prior.high:+.3f}, {-prior.low:+.3f}]"] = (
        prior.low > 0
    )
    signs[f"shuffled images cost {gap.value:.3f} nats per token [{gap.low:.3f}, {gap.high:.3f}]"] = gap.low > _MIN_GAP
    reasons = [f"{'yes' if holds else 'no'}: {sign}" for sign, holds in signs.items()]
    reasons.append(f"{same_as_prior:.0%} of the reports are word for word those without an image")
    if cases < FEW_CASES:
        code = "unclear"
    elif same_as_prior >= _SAME or not any(signs.values()):
        code = "independent"
    else:
        code = "depends" if all(signs.values()) else "partly"
    return Verdict(code, VERDICTS[code], reasons)
