"""Whether generated reports state the findings of their references: per finding, macro and micro, against chance.

Findings are read by :func:`data.report_language.labeller.label_report`. A finding counts as stated where a report
says that it is present or possible. Chance is the permutation baseline: what the same reports reach when they are
assigned to other cases at random.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from data.report_language.labeller import FindingMention, report_labels
from data.report_language.terms import FINDINGS
from engine.evaluation.bootstrap import REPEATS, Score, case_weights, interval, ratio

Mentions = Sequence[Sequence[FindingMention]]  # of each report
DIAGNOSTIC_SECTIONS = ("", "findings", "impression")  # advice and tendency state no findings
STATED = ("present", "uncertain")


@dataclass(frozen=True)
class FindingScore:
    """One finding: the number of references and of reports that state it, precision, recall and F1 (NaN: undefined)."""

    finding: str
    references: int
    reports: int
    precision: float
    recall: float
    f1: Score


@dataclass(frozen=True)
class ClinicalScores:
    """All findings together.

    Attributes:
        macro_f1: mean F1 over the findings that some reference states.
        chance, micro_chance: mean of macro-F1 and micro-F1 over permutations, and the interval of single permutations.
        p_value: fraction of permutations whose macro-F1 reaches the true one, (hits + 1) / (permutations + 1).
        micro_f1, micro_precision, micro_recall: over all case–finding pairs.
        by_finding: every finding that some reference or report states.
    """

    macro_f1: Score
    chance: Score
    p_value: float
    micro_f1: Score
    micro_precision: Score
    micro_recall: Score
    micro_chance: Score
    by_finding: list[FindingScore]


def label_matrix(reports: Mentions, sections: Sequence[str] = DIAGNOSTIC_SECTIONS) -> np.ndarray:
    """Which finding is stated in which report: bool [reports, findings], in the order of ``FINDINGS``."""
    rows = [report_labels(mentions, sections) for mentions in reports]
    return np.array([[row.get(name) in STATED for name in FINDINGS] for row in rows], bool).reshape(-1, len(FINDINGS))


def clinical_scores(
    references: Mentions,
    generated: Mentions,
    sections: Sequence[str] = DIAGNOSTIC_SECTIONS,
    repeats: int = REPEATS,
    seed: int = 0,
) -> ClinicalScores:
    """Compare what reports state with what their references state, of at least one case."""
    truth, found = (label_matrix(reports, sections) for reports in (references, generated))
    n, known = len(truth), truth.any(0)
    once = np.ones((1, n), int)
    counts = resampled_counts(truth, found, once)
    drawn = resampled_counts(truth, found, case_weights(n, repeats, seed))
    rng = np.random.default_rng(seed)
    permuted = np.concatenate([resampled_counts(truth, found[rng.permutation(n)], once) for _ in range(repeats)])

    def micro(formula: Callable[[np.ndarray], np.ndarray], what: str) -> Score:
        return Score(float(formula(counts.sum(2))[0]), *interval(formula(drawn.sum(2))), n, what)

    def chance(values: np.ndarray) -> Score:
        mean = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
        return Score(mean, *interval(values), n, "reports dealt to other cases")

    macro, by_chance = float(macro_f1(counts, known)[0]), macro_f1(permuted, known)
    hits = int((by_chance >= macro - 1e-12).sum()) if np.isfinite(macro) else repeats
    return ClinicalScores(
        macro_f1=Score(macro, *interval(macro_f1(drawn, known)), n, f"mean F1 of {int(known.sum())} findings"),
        chance=chance(by_chance),
        p_value=(hits + 1) / (repeats + 1),
        micro_f1=micro(_f1, "F1 of all case-finding pairs"),
        micro_precision=micro(_precision, "precision of all case-finding pairs"),
        micro_recall=micro(_recall, "recall of all case-finding pairs"),
        micro_chance=chance(_f1(permuted.sum(2))),
        by_finding=_by_finding(counts, drawn, n),
    )


def resampled_counts(truth: np.ndarray, found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Number of cases that have a finding in both, in the reference, in the report: int [repeats, 3, findings].

    Args:
        truth, found: bool [cases, findings].
        weights: how often each case counts, [repeats, cases].
    """
    return np.stack([weights @ part.astype(np.int64) for part in (truth & found, truth, found)], 1)


def macro_f1(counts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean F1 over the known findings [repeats]; one that a sample lacks altogether is left out of its mean."""
    values = _f1(counts)[:, known]
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0).sum(1), defined.sum(1))


def _by_finding(counts: np.ndarray, drawn: np.ndarray, n: int) -> list[FindingScore]:
    precision, recall, f1 = (formula(counts)[0] for formula in (_precision, _recall, _f1))
    resampled = _f1(drawn)
    _, references, generated = counts[0]
    return [
        FindingScore(
            FINDINGS[k], int(references[k]), int(generated[k]), float(precision[k]), float(recall[k]),
            Score(float(f1[k]), *interval(resampled[:, k]), n, "F1"),
        )
        for k in np.flatnonzero(references + generated)
    ]  # fmt: skip


# Of counts [repeats, 3] or [repeats, 3, findings]; NaN where the denominator is 0.


def _f1(counts: np.ndarray) -> np.ndarray:
    return ratio(2 * counts[:, 0], counts[:, 1] + counts[:, 2])


def _precision(counts: np.ndarray) -> np.ndarray:
    return ratio(counts[:, 0], counts[:, 2])


def _recall(counts: np.ndarray) -> np.ndarray:
    return ratio(counts[:, 0], counts[:, 1])
