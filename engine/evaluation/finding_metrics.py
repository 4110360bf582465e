"""Whether generated reports state the findings of their references: per finding, macro and micro, against chance.

Findings are read by :func:`data.report_language.labeller.label_report`. A finding counts as stated where a report says
that it is present, and by choice where it says that it may be. Chance is what the same reports reach when they
are dealt to other patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from config.errors import InputError
from data.report_language.labeller import FindingMention, report_labels
from data.report_language.terms import FINDINGS
from engine.evaluation.bootstrap import REPEATS, Score, case_weights, interval

Mentions = Sequence[FindingMention]
DIAGNOSTIC_SECTIONS = ("", "findings", "impression")  # advice and tendency state no findings


@dataclass(frozen=True)
class FindingScore:
    """One finding: in how many references and reports, precision, recall, F1 (NaN where it is in neither)."""

    finding: str
    references: int
    generated: int
    both: int
    precision: float
    recall: float
    f1: Score


@dataclass(frozen=True)
class ClinicalScores:
    """All findings together.

    Attributes:
        findings: every finding that some reference or report states.
        macro_f1: mean F1 over the findings that some reference states.
        micro_f1, micro_precision, micro_recall: over all case–finding pairs.
        chance_macro_f1, chance_micro_f1: mean over permuted reports, and the interval of single permutations.
        p_value: share of permutations whose macro-F1 reaches the true one, (hits + 1) / (permutations + 1).
    """

    findings: list[FindingScore]
    macro_f1: Score
    micro_f1: Score
    micro_precision: Score
    micro_recall: Score
    chance_macro_f1: Score
    chance_micro_f1: Score
    p_value: float


def label_matrix(
    reports: Sequence[Mentions], sections: Sequence[str] | None = DIAGNOSTIC_SECTIONS, uncertain: bool = True
) -> np.ndarray:
    """Which finding is stated in which report: bool [reports, findings], in the order of ``FINDINGS``.

    Args:
        reports: mentions of each.
        sections: that count; None for all.
        uncertain: whether "may be" counts as stated.
    """
    stated = {"present", "uncertain"} if uncertain else {"present"}
    rows = [report_labels(mentions, sections) for mentions in reports]
    return np.array([[row.get(name) in stated for name in FINDINGS] for row in rows], bool).reshape(-1, len(FINDINGS))


def clinical_scores(
    references: Sequence[Mentions],
    generated: Sequence[Mentions],
    sections: Sequence[str] | None = DIAGNOSTIC_SECTIONS,
    uncertain: bool = True,
    repeats: int = REPEATS,
    seed: int = 0,
) -> ClinicalScores:
    """Compare what reports state with what their references state.

    Raises:
        InputError: no case, or lists of different length.
    """
    if len(references) != len(generated) or not references:
        raise InputError(f"{len(references)} references and {len(generated)} reports; give as many of each, at least 1")
    truth, found = (label_matrix(r, sections, uncertain) for r in (references, generated))
    n, known = len(truth), truth.any(0)
    parts = np.stack([truth & found, truth, found]).astype(np.int64)  # [3, n, findings]
    weights = case_weights(n, repeats, seed)
    sums = parts.sum(1)[None]  # [1, 3, findings]
    drawn = np.stack([weights @ part for part in parts], 1)  # [repeats, 3, findings]
    rng = np.random.default_rng(seed)
    dealt = np.stack([_counts(truth, found[rng.permutation(n)]) for _ in range(repeats)])

    rows = []
    each = _f1(drawn)
    for k in np.flatnonzero(truth.any(0) | found.any(0)):
        both, positive, stated = (int(v) for v in sums[0, :, k])
        f1 = Score(float(_f1(sums)[0, k]), *interval(each[:, k]), n, "F1")
        rows.append(FindingScore(FINDINGS[k], positive, stated, both, _share(both, stated), _share(both, positive), f1))
    macro = _macro(sums, known)[0]
    by_chance = _macro(dealt, known)
    hits = int((by_chance >= macro - 1e-12).sum()) if np.isfinite(macro) else repeats
    return ClinicalScores(
        findings=rows,
        macro_f1=Score(float(macro), *interval(_macro(drawn, known)), n, f"mean F1 of {int(known.sum())} findings"),
        micro_f1=_micro(sums, drawn, _f1, n, "F1 of all case-finding pairs"),
        micro_precision=_micro(sums, drawn, _precision, n, "precision of all case-finding pairs"),
        micro_recall=_micro(sums, drawn, _recall, n, "recall of all case-finding pairs"),
        chance_macro_f1=Score(_mean(by_chance), *interval(by_chance), n, "reports dealt to other cases"),
        chance_micro_f1=Score(
            _mean(_f1(dealt.sum(2))), *interval(_f1(dealt.sum(2))), n, "reports dealt to other cases"
        ),
        p_value=(hits + 1) / (repeats + 1),
    )


def _counts(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Both, reference, report: int [3, findings]."""
    return np.stack([(truth & found).sum(0), truth.sum(0), found.sum(0)])


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)


def _f1(counts: np.ndarray) -> np.ndarray:
    """Of counts [..., 3] or [..., 3, findings] along their axis of three; NaN where a finding is in neither."""
    both, positive, stated = np.moveaxis(counts, 1, 0).astype(float)
    return _ratio(2 * both, positive + stated)


def _precision(counts: np.ndarray) -> np.ndarray:
    both, _, stated = np.moveaxis(counts, 1, 0).astype(float)
    return _ratio(both, stated)


def _recall(counts: np.ndarray) -> np.ndarray:
    both, positive, _ = np.moveaxis(counts, 1, 0).astype(float)
    return _ratio(both, positive)


def _macro(counts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean F1 over the known findings [repeats]; one that a sample lacks altogether is left out of its mean."""
    values = _f1(counts)[:, known]
    held = np.isfinite(values)
    return _ratio(np.where(held, values, 0).sum(1), held.sum(1))


def _micro(sums: np.ndarray, drawn: np.ndarray, formula, n: int, what: str) -> Score:
    return Score(float(formula(sums.sum(2))[0]), *interval(formula(drawn.sum(2))), n, what)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
