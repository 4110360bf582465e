"""Whether generated reports state the findings of their references: per finding, macro and micro, against chance.

Findings are read by :func:`data.report_language.labeller.label_report`. A finding counts as stated where a report
says that it is present or possible. Chance is the permutation baseline: what the same reports reach when they are
assigned to other cases at random; a report that states nothing, and one that states everything, are the other floors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from data.findings import FindingRecord
from data.report_language.labeller import report_labels
from data.report_language.terms import FINDINGS
from engine.evaluation.bootstrap import REPEATS, Score, case_weights, interval, ratio

Mentions = Sequence[Sequence[FindingRecord]]  # of each report
DIAGNOSTIC_SECTIONS = ("", "findings", "impression")  # advice and tendency state no findings
STATED = ("present", "uncertain")


def label_matrix(reports: Mentions, sections: Sequence[str] = DIAGNOSTIC_SECTIONS) -> np.ndarray:
    """Which finding is stated in which report: bool [reports, findings], in the order of ``FINDINGS``."""
    rows = [report_labels(mentions, sections) for mentions in reports]
    return np.array([[row.get(name) in STATED for name in FINDINGS] for row in rows], bool).reshape(-1, len(FINDINGS))


def clinical_scores(
    references: Mentions, generated: Mentions, sections: Sequence[str] = DIAGNOSTIC_SECTIONS
) -> dict[str, Any]:
    """Compare what reports state with what their references state, of at least one case.

    Returns:
        ``macro_f1``: mean F1 over the findings that some reference states.
        ``chance``, ``micro_chance``: mean of macro-F1 and micro-F1 over permutations, and the interval of single
        permutations.
        ``p_value``: fraction of permutations whose macro-F1 reaches the true one, (hits + 1) / (permutations + 1).
        ``micro_f1``, ``micro_precision``, ``micro_recall``: over all case–finding pairs.
        ``crg``, ``crg_chance``: :func:`crg` over all case–finding pairs.
        ``by_finding``: of every finding that some reference or report states: ``finding``, how many ``references`` and
        ``reports`` state it, ``precision``, ``recall`` (NaN: undefined) and ``f1``, a score.
    """
    truth, found = (label_matrix(reports, sections) for reports in (references, generated))
    n, known = len(truth), truth.any(0)
    once = np.ones((1, n), int)
    counts, drawn = (resampled_counts(truth, found, weights) for weights in (once, case_weights(n)))
    rng = np.random.default_rng(0)
    permuted = np.concatenate([resampled_counts(truth, found[rng.permutation(n)], once) for _ in range(REPEATS)])
    micro = {
        f"micro_{name.lower()}": Score(float(value[0]), *interval(resampled), n, f"{name} of all case-finding pairs")
        for name, value, resampled in zip(
            ("precision", "recall"), rates(counts.sum(2))[1:], rates(drawn.sum(2))[1:], strict=True
        )
    }
    by_chance = {name: _chance(values, n) for name, values in _values(permuted, truth).items()}
    scores = finding_scores(truth, found)
    macro = scores["macro_f1"].value
    hits = int((macro_f1(permuted, known) >= macro - 1e-12).sum()) if np.isfinite(macro) else REPEATS
    return {
        **micro,
        **scores,
        "chance": by_chance["macro_f1"],
        "p_value": (hits + 1) / (REPEATS + 1),
        "micro_chance": by_chance["micro_f1"],
        "crg_chance": by_chance["crg"],
        "by_finding": _by_finding(counts, drawn, n),
    }


def finding_scores(truth: np.ndarray, found: np.ndarray) -> dict[str, Score]:
    """``macro_f1``, ``micro_f1`` and ``crg`` of label matrices; they can be compared by paired differences."""
    n, pairs = len(truth), "of all case-finding pairs"
    weights = np.ones((1, n), int), case_weights(n)
    once, drawn = (_values(resampled_counts(truth, found, some), truth) for some in weights)
    what = f"mean F1 of {int(truth.any(0).sum())} findings", f"F1 {pairs}", f"CRG {pairs}"
    return {
        name: Score(float(once[name][0]), *interval(values), n, words, values)
        for (name, values), words in zip(drawn.items(), what, strict=True)
    }


def constant_floors(references: Mentions) -> dict[str, dict[str, Score]]:
    """Scores of reports that state no finding at all, and of reports that state every one."""
    truth = label_matrix(references)
    constant = {"all_negative": np.zeros_like(truth), "all_positive": np.ones_like(truth)}
    return {name: finding_scores(truth, found) for name, found in constant.items()}


def _values(counts: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of counts [repeats, 3, findings]."""
    macro, total = macro_f1(counts, truth.any(0)), counts.sum(2)
    return {"macro_f1": macro, "micro_f1": rates(total)[0], "crg": crg(total, truth.size)}


def _chance(values: np.ndarray, n: int) -> Score:
    mean = float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
    return Score(mean, *interval(values), n, "permutation baseline")


def crg(counts: np.ndarray, cells: int) -> np.ndarray:
    """CRG score [repeats]: 1 for no error, 1/3 for reports that are all negative and for those that are all positive.

    CRG = U / (2U - s) with s = w TP - w FN - FP, w = (X - A) / 2A and U = wA, its maximum: a missed finding costs more
    the rarer findings are. X cells, A of them positive. Hamamci et al., "CRG Score: A Distribution-Aware Clinical
    Metric for Radiology Report Generation", MIDL 2025, arXiv:2505.17167; a ranking metric of the VLM3D challenge.

    Args:
        counts: cells that are positive in both, in the reference, in the report, [repeats, 3].
        cells: number of case-finding pairs.
    """
    both, truth, found = counts.T
    most = (cells - truth) / 2
    s = most * ratio(2 * both - truth, truth) - (found - both)
    return ratio(most, 2 * most - s)


def resampled_counts(truth: np.ndarray, found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Number of cases that have a finding in both, in the reference, in the report: int [repeats, 3, findings].

    Args:
        truth, found: bool [cases, findings].
        weights: how often each case counts, [repeats, cases].
    """
    return np.stack([weights @ part.astype(np.int64) for part in (truth & found, truth, found)], 1)


def rates(counts: np.ndarray) -> np.ndarray:
    """F1, precision and recall, [3, repeats] of counts [repeats, 3], or with a last axis of findings; NaN undefined."""
    both, truth, found = counts[:, 0], counts[:, 1], counts[:, 2]
    return np.stack([ratio(2 * both, truth + found), ratio(both, found), ratio(both, truth)])


def macro_f1(counts: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Mean F1 over the known findings [repeats]; one that a sample lacks altogether is left out of its mean."""
    values = rates(counts)[0][:, known]
    defined = np.isfinite(values)
    return ratio(np.where(defined, values, 0).sum(1), defined.sum(1))


def _by_finding(counts: np.ndarray, drawn: np.ndarray, n: int) -> list[dict[str, Any]]:
    columns = dict(zip(("f1", "precision", "recall"), rates(counts)[:, 0].tolist(), strict=True))
    columns |= {"references": counts[0, 1].tolist(), "reports": counts[0, 2].tolist(), "finding": FINDINGS}
    resampled = rates(drawn)[0]
    rows = []
    for k in np.flatnonzero(counts[0].any(0)):
        row = {name: columns[name][k] for name in ("finding", "references", "reports", "precision", "recall")}
        rows.append(row | {"f1": Score(columns["f1"][k], *interval(resampled[:, k]), n, "F1")})
    return rows
