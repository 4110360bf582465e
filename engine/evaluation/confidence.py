"""Statements of a report with the probability of their words, and the calibration of this confidence.

A statement is the clause of a finding in its sentence: words of finding, place, size, number and negation. Its raw
confidence is the probability of the tokens of these words alone, because the phrases around them can be put in many
ways. A logistic regression on its features, fitted on other cases, gives the calibrated confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from data.findings import FindingRecord
from data.report_language.labeller import label_report, lexer
from data.report_language.lexer import Token, normal_form, sentences
from data.report_language.sections import split_sentences
from data.tables.caption_table import CaptionRow
from engine.evaluation.bootstrap import ratio
from engine.evaluation.finding_metrics import DIAGNOSTIC_SECTIONS, STATED
from engine.evaluation.localisation import sizes_agree

TO_CHECK = {"zh": "【待核实】", "en": "[to be verified]"}
_MAYBE = ("maybe", "maybe_before", "maybe_after")
_CONTENT = ("term", "head", "organ", "place", "size", "count", "negate", "denied", *_MAYBE)
_LEAST = math.log(1e-6)
MIN_STATEMENTS = 30  # to fit six numbers on
FOLDS = 5
FEATURES = 5
EDGES = np.linspace(0, 1, 11)  # of the bins of confidence
RIDGE = 1.0  # half of it times the squared weights of the standardised features is added to the sum of all losses
CURVE_POINTS = 50  # of the card, spread evenly, the first and the last among them
Span = tuple[int, int]
Columns = dict[str, np.ndarray]  # of a table, by name


@dataclass(frozen=True)
class Labeller:
    """The rule labeller in one language. ``merged``: findings that count as another one (miliary as tree_in_bud)."""

    language: str
    merged: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, text: str) -> list[FindingRecord]:
        return self.merge(label_report(text, self.language))

    def merge(self, found: Iterable[FindingRecord]) -> list[FindingRecord]:
        """Findings under the names that they count as."""
        return [replace(one, finding=self.merged.get(one.finding, one.finding)) for one in found]


@dataclass(frozen=True)
class Statement:
    """One finding that a report states or denies.

    Attributes:
        mention: as the labeller reads it.
        sentence: number of its piece in ``split_sentences``.
        words: spans of the text that carry it.
        raw: probability of the words, 0 to 1: the confidence before calibration.
        features: for the calibration: log-probability of the finding's words, of its place and of its size (0 without
            such words), whether there is a size, and the fraction of sampled reports that agree (0 without samples).
    """

    mention: FindingRecord
    sentence: int
    words: tuple[Span, ...]
    raw: float
    features: tuple[float, float, float, float, float]


def statements(
    text: str, label: Labeller, spans: Sequence[Span], log_probs: Sequence[float], samples: Sequence[str] = ()
) -> list[Statement]:
    """Statements of a report's findings and impression, in the order of the text.

    Args:
        spans: characters of each token.
        log_probs: of each token.
        samples: other reports of the same image.
    """
    numbers = [number for number, piece in enumerate(split_sentences(text)) for _ in piece]  # of each character
    clauses = content_words(text, label.language)
    others = [label(sample) for sample in samples]
    made = []
    for mention in label(text):
        if mention.section not in DIAGNOSTIC_SECTIONS:
            continue
        clause = next((c for c in clauses if any(w.start <= mention.start < w.end for w in c)), ())
        words: dict[str, list[Span]] = {"finding": [], "place": [], "size": []}
        for word in clause:
            words[word.kind if word.kind in words else "finding"].append((word.start, word.end))
        words["finding"] = words["finding"] or [(mention.start, mention.end)]
        parts = [log_probability(part, spans, log_probs) if part else 0.0 for part in words.values()]
        agreeing = sum(any(agrees(mention, other) for other in sample) for sample in others) / max(len(others), 1)
        features = (*parts, float(bool(words["size"])), agreeing)
        carrying = tuple(span for part in words.values() for span in part)
        raw = math.exp(log_probability(carrying, spans, log_probs))
        made.append(Statement(mention, numbers[mention.start], carrying, raw, features))
    return made


def touches(span: Span, words: Sequence[Span]) -> bool:
    """Whether a token has a character of some word."""
    return any(span[0] < end and span[1] > start for start, end in words)


def log_probability(words: Sequence[Span], spans: Sequence[Span], log_probs: Sequence[float]) -> float:
    """Sum over the tokens that touch the words; log(1e-6) where there are none (a text that was cut)."""
    touching = [p for span, p in zip(spans, log_probs, strict=True) if touches(span, words)]
    return sum(touching) if touching else _LEAST


def content_words(text: str, language: str) -> list[list[Token]]:
    """The words of each clause with a finding. A clause without one belongs to the clause before it, or at the start of
    a sentence to the clause after it."""
    normal = normal_form(text)
    found: list[list[Token]] = []
    for start, end in sentences(normal, 0, len(normal)):
        clauses: list[list[Token]] = [[]]
        for token in lexer(language).read(normal, start, end):
            if token.kind == "comma":
                clauses.append([])
            elif token.kind in _CONTENT:
                clauses[-1].append(token)
        groups: list[list[Token]] = []
        waiting: list[Token] = []
        for clause in clauses:
            if any(token.kind in ("term", "head") for token in clause):
                groups.append([*waiting, *clause])
                waiting = []
            else:
                (groups[-1] if groups else waiting).extend(clause)
        found += groups
    return found


def is_right(mention: FindingRecord, truth: Sequence[FindingRecord]) -> bool:
    """Whether a reference confirms a statement: the finding with its place and size, or for a denial its absence."""
    stated = [m for m in truth if m.polarity in STATED and m.section in DIAGNOSTIC_SECTIONS]
    if mention.polarity == "absent":
        return all(m.finding != mention.finding for m in stated)
    same = [m for m in stated if agrees(mention, m, size=False)]
    # An impression without sizes does not confirm a size that the findings contradict.
    sized = [m for m in same if m.size_mm is not None]
    return any(agrees(mention, m) for m in sized) if mention.size_mm is not None and sized else bool(same)


def agrees(one: FindingRecord, other: FindingRecord, size: bool = True) -> bool:
    """Same finding, both stated or both denied, and no contradiction in side, level and size."""
    if one.finding != other.finding or (one.polarity in STATED) != (other.polarity in STATED):
        return False
    pairs = ((one.side, other.side), (one.level, other.level))
    if any(a is not None and b is not None and a != b for a, b in pairs):
        return False
    both = size and one.size_mm is not None and other.size_mm is not None
    return not both or sizes_agree(one.size_mm, other.size_mm)


def mark_unsure(
    text: str, stated: Sequence[Statement], calibrated: Sequence[float], threshold: float, language: str = "zh"
) -> str:
    """Put 【待核实】 behind every sentence with a statement whose confidence is below the threshold in [0, 1].

    Nothing is removed. A sentence that states no finding is never marked.
    """
    unsure = {one.sentence for one, confidence in zip(stated, calibrated, strict=True) if confidence < threshold}
    marked = []
    for number, piece in enumerate(split_sentences(text)):
        body = piece.rstrip()
        marked.append(body + TO_CHECK[language] + piece[len(body) :] if body and number in unsure else piece)
    return "".join(marked)


# ---------------------------------------------------------------------------- calibration


def reliability(confidences: np.ndarray, right: np.ndarray) -> tuple[float, Columns]:
    """Expected calibration error: Σ (bin size / n) · |accuracy − confidence| (Naeini et al. 2015).

    Args:
        confidences: N ≥ 1 in [0, 1]; one on an edge belongs to the bin above it.

    Returns:
        The error and its bins of equal width: ``from``, mean ``confidence``, fraction ``right``, NaN where empty, and
        ``count``.
    """
    bins = len(EDGES) - 1
    where = np.clip(np.searchsorted(EDGES, confidences, side="right") - 1, 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    confidence, accuracy = (ratio(np.bincount(where, values, bins), count) for values in (confidences, right))
    gaps = np.where(count > 0, np.abs(accuracy - confidence), 0)
    columns = {"from": EDGES[:-1], "confidence": confidence, "right": accuracy, "count": count}
    return float((gaps * count).sum() / len(where)), columns


def ece_of_perfect(confidences: np.ndarray) -> float:
    """Mean ECE of perfectly calibrated statements with these confidences: what chance alone leaves."""
    rng = np.random.default_rng(0)
    values = [reliability(confidences, rng.random(len(confidences)) < confidences)[0] for _ in range(200)]
    return float(np.mean(values))


def risk_coverage(confidences: np.ndarray, right: np.ndarray) -> tuple[float, Columns]:
    """Selective prediction (Geifman and El-Yaniv 2017): the area under its curve, and the curve.

    The curve has the error ``risk`` among the fraction ``coverage`` of the statements whose confidence reaches
    ``threshold``; equal confidences are one point. The area is its mean over statements.
    """
    threshold, where, size = np.unique(-confidences, return_inverse=True, return_counts=True)
    kept = size.cumsum()
    risk = np.bincount(where, 1 - np.asarray(right, float)).cumsum() / kept
    curve = {"coverage": kept / kept[-1], "risk": risk, "threshold": -threshold}
    return float((risk * size).sum() / kept[-1]), curve


@dataclass(frozen=True)
class Logistic:
    """Logistic regression on several features: σ(features · weights + offset)."""

    weights: tuple[float, ...]
    offset: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Probabilities (N,) of features (N, F)."""
        return expit(np.asarray(features, float) @ np.array(self.weights) + self.offset)


def fit_logistic(features: np.ndarray, right: np.ndarray) -> Logistic:
    """Maximum likelihood with Platt's smoothed targets (Platt 1999) and a ridge penalty.

    ``features``: (N, F) with N ≥ 1; one that does not vary gets weight 0. ``right``: (N,).
    """
    right = np.asarray(right, float)
    good, bad = right.sum(), len(right) - right.sum()
    target = np.where(right > 0, (good + 1) / (good + 2), 1 / (bad + 2))
    mean, std = features.mean(0), features.std(0)
    scale = np.where(std > 0, std, np.inf)
    z = (features - mean) / scale

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a = z @ theta[:-1] + theta[-1]
        error = expit(a) - target
        value = (np.logaddexp(0, a) - target * a).sum() + RIDGE * (theta[:-1] ** 2).sum() / 2
        return float(value), np.append(z.T @ error + RIDGE * theta[:-1], error.sum())

    theta = minimize(loss, np.zeros(features.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weights = theta[:-1] / scale
    return Logistic(tuple(weights.tolist()), float(theta[-1] - mean @ weights))


@dataclass(frozen=True)
class Outcomes:
    """N statements of one table with their outcome.

    ``case`` (N,); ``raw`` (N,) and ``features`` (N, 5) as of ``Statement``; ``right`` (N,): whether the reference of
    the case confirms the statement.
    """

    case: np.ndarray
    raw: np.ndarray
    features: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, stated: Sequence[Sequence[Statement]], table: Sequence[CaptionRow], label: Labeller) -> Outcomes:
        """Of the statements of each row's report."""
        truths = [label(row.answer) for row in table]
        rows = [
            (case, statement.raw, statement.features, is_right(statement.mention, truth))
            for case, (statements, truth) in enumerate(zip(stated, truths, strict=True))
            for statement in statements
        ]
        case, raw, features, right = zip(*rows, strict=True) if rows else ((), (), (), ())
        features = np.array(features, float).reshape(-1, FEATURES)
        return cls(np.array(case, int), np.array(raw, float), features, np.array(right, bool))


@dataclass(frozen=True)
class ConfidenceScores:
    """``calibrated``: confidence of each statement, in the order of ``Outcomes``; ``card``: JSON values; ``bins`` and
    ``curve``: of :func:`reliability` and :func:`risk_coverage`, empty without statements."""

    calibrated: np.ndarray
    card: dict[str, Any]
    bins: Columns = field(default_factory=dict)
    curve: Columns = field(default_factory=dict)


def confidence_scores(outcomes: Outcomes, other: Outcomes | None, other_name: str) -> ConfidenceScores:
    """Calibrate on ``other``, or where there is none by cross-fitting: each fifth of the cases on the rest.

    With fewer than 30 statements to fit on, the raw confidence is kept, and ``calibrated_on`` has the reason.
    """
    fitted = None
    if other is not None and len(other.raw) >= MIN_STATEMENTS:
        fitted = fit_logistic(other.features, other.right)
        calibrated, on = fitted(outcomes.features), f"{other_name} ({len(other.raw)} statements)"
    elif other is None and len(outcomes.raw) >= MIN_STATEMENTS * FOLDS / (FOLDS - 1):
        calibrated, on = _cross_fitted(outcomes), f"the same table, cross-fitted over {FOLDS} folds of cases"
        fitted = fit_logistic(outcomes.features, outcomes.right)
    else:
        calibrated, on = outcomes.raw, f"nothing: fewer than {MIN_STATEMENTS} statements to fit on"
    card: dict[str, Any] = {"ece": None, "ece_before": None, "statements": len(calibrated), "calibrated_on": on}
    card["calibrator"] = fitted and asdict(fitted)
    if not len(calibrated):
        return ConfidenceScores(calibrated, card)
    (ece, bins), (area, curve) = (rate(calibrated, outcomes.right) for rate in (reliability, risk_coverage))
    size = len(curve["risk"])
    shown = np.unique(np.linspace(0, size - 1, min(CURVE_POINTS, size)).round().astype(int))
    card |= {
        "ece": ece,
        "ece_before": reliability(outcomes.raw, outcomes.right)[0],
        "area_under_risk_coverage": area,
        "ece_of_perfect": ece_of_perfect(calibrated),
        "reliability": _rows(bins),
        "risk_coverage": _rows({name: values[shown] for name, values in curve.items()}),
    }
    return ConfidenceScores(calibrated, card, bins, curve)


def _rows(columns: Columns) -> list[dict[str, float]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _cross_fitted(outcomes: Outcomes) -> np.ndarray:
    calibrated, fold = outcomes.raw.copy(), outcomes.case % FOLDS
    for tested in (fold == number for number in np.unique(fold) if (fold != number).any()):
        fitted = fit_logistic(outcomes.features[~tested], outcomes.right[~tested])
        calibrated[tested] = fitted(outcomes.features[tested])
    return calibrated
