"""How far a stated confidence can be trusted, and what to do with sentences that have little of it.

Confidences are in [0, 1], outcomes are right (True) or wrong. Calibrators are fitted on validation cases,
never on those that are reported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, logit

from config.errors import InputError

TO_CHECK = {"zh": "【待核实】", "en": "[to be verified]"}
_SENTENCE = re.compile(r"[^。；;!！\n.]*(?:\.(?=\d)[^。；;!！\n.]*)*(?:[。；;!！\n.]+|$)")
_EPSILON = 1e-6


@dataclass(frozen=True)
class Reliability:
    """Expected calibration error and its bins.

    Attributes:
        ece: Σ (bin size / n) · |accuracy − confidence| (Naeini et al. 2015).
        edges: [bins + 1].
        confidence, accuracy: mean of each bin, NaN where empty.
        count: of each bin.
    """

    ece: float
    edges: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> Reliability:
    """ECE with bins of equal width; a confidence on an edge belongs to the bin above it, 1 to the last.

    Raises:
        InputError: no pair, lists of different length, or a confidence outside [0, 1].
    """
    c, r = _checked(confidences, right)
    edges = np.linspace(0, 1, bins + 1)
    where = np.clip(np.searchsorted(edges, c, side="right") - 1, 0, bins - 1)
    count = np.bincount(where, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(where, c, bins) / count
        accuracy = np.bincount(where, r, bins) / count
    gaps = np.where(count > 0, np.abs(accuracy - confidence), 0)
    return Reliability(float((gaps * count).sum() / len(c)), edges, confidence, accuracy, count)


def draw_reliability(held: Reliability, path: Path, title: str = "") -> None:
    """Write the reliability diagram as an image; the format is that of the file's name."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    figure = Figure(figsize=(4, 4.6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = np.diff(held.edges)
    top.bar(held.edges[:-1], np.nan_to_num(held.accuracy), width, align="edge", color="#4c78a8", edgecolor="white")
    top.plot([0, 1], [0, 1], "--", color="#555555", linewidth=1)
    top.plot(held.confidence, held.accuracy, "o", color="#f58518", markersize=4)
    top.set(ylabel="share right", ylim=(0, 1), title=f"{title}  ECE {held.ece:.3f}".strip())
    below.bar(held.edges[:-1], held.count, width, align="edge", color="#9d9d9d", edgecolor="white")
    below.set(xlabel="confidence", ylabel="count", xlim=(0, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_risk_coverage(held: RiskCoverage, path: Path, title: str = "") -> None:
    """Write the curve as an image: the error among the statements that are kept, by how many are kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.step(held.coverage, held.risk, where="post", color="#4c78a8")
    axis.set(xlabel="share of statements kept, the surest first", ylabel="share of them wrong", xlim=(0, 1))
    axis.set_ylim(0, max(0.05, 1.15 * float(held.risk.max())))
    axis.set_title(f"{title}  area {held.area:.3f}".strip())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Isotonic:
    """Monotone step calibration; between fitted points linear, beyond them constant."""

    x: np.ndarray
    y: np.ndarray

    def __call__(self, confidences: Sequence[float]) -> np.ndarray:
        return np.interp(np.asarray(confidences, float), self.x, self.y)


@dataclass(frozen=True)
class Platt:
    """Logistic calibration on the confidence's log-odds: σ(slope · logit(c) + offset)."""

    slope: float
    offset: float

    def __call__(self, confidences: Sequence[float]) -> np.ndarray:
        return expit(self.slope * _log_odds(np.asarray(confidences, float)) + self.offset)


def fit_isotonic(confidences: Sequence[float], right: Sequence[bool]) -> Isotonic:
    """Least squares under monotonicity (pool adjacent violators); equal confidences share one value."""
    c, r = _checked(confidences, right)
    x, inverse, weight = np.unique(c, return_inverse=True, return_counts=True)
    return Isotonic(x, isotonic_regression(np.bincount(inverse, r) / weight, weights=weight).x)


def fit_platt(confidences: Sequence[float], right: Sequence[bool]) -> Platt:
    """Maximum likelihood with Platt's smoothed targets (Platt 1999), so that separable data stay finite."""
    c, r = _checked(confidences, right)
    good, bad = r.sum(), len(r) - r.sum()
    target = np.where(r > 0, (good + 1) / (good + 2), 1 / (bad + 2))
    z = _log_odds(c)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a = theta[0] * z + theta[1]
        error = expit(a) - target
        return float((np.logaddexp(0, a) - target * a).sum()), np.array([(error * z).sum(), error.sum()])

    found = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B")
    return Platt(float(found.x[0]), float(found.x[1]))


@dataclass(frozen=True)
class Logistic:
    """Logistic regression on several signs: σ(signs · weights + offset)."""

    weights: tuple[float, ...]
    offset: float

    def __call__(self, signs: np.ndarray) -> np.ndarray:
        """Probabilities (N,) of signs (N, F)."""
        return expit(np.asarray(signs, float) @ np.array(self.weights) + self.offset)


def fit_logistic(signs: np.ndarray, right: Sequence[bool], ridge: float = 1.0) -> Logistic:
    """Maximum likelihood with Platt's smoothed targets and a small penalty on the weights; a sign that does not vary
    has weight 0.

    Args:
        signs: (N, F). right: (N,).
        ridge: half of it times the squared weights of the standardised signs is added to the sum of all losses: few
            statements are held to little, many are free.
    """
    x, r = np.asarray(signs, float), np.asarray(right, float)
    if x.ndim != 2 or len(x) != len(r) or not len(r):
        raise InputError(f"signs of shape {x.shape} and {len(r)} outcomes; give one row per outcome, at least 1")
    good, bad = r.sum(), len(r) - r.sum()
    target = np.where(r > 0, (good + 1) / (good + 2), 1 / (bad + 2))
    middle, spread = x.mean(0), x.std(0)
    z = (x - middle) / np.where(spread > 0, spread, 1)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        a = z @ theta[:-1] + theta[-1]
        error = expit(a) - target
        value = (np.logaddexp(0, a) - target * a).sum() + ridge * (theta[:-1] ** 2).sum() / 2
        return float(value), np.append(z.T @ error + ridge * theta[:-1], error.sum())

    theta = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    weights = np.where(spread > 0, theta[:-1] / np.where(spread > 0, spread, 1), 0)
    return Logistic(tuple(float(w) for w in weights), float(theta[-1] - middle @ weights))


@dataclass(frozen=True)
class RiskCoverage:
    """Error among the most confident share: ``risk[k]`` at ``coverage[k]``; ``area`` is its mean (AURC)."""

    coverage: np.ndarray
    risk: np.ndarray
    threshold: np.ndarray
    area: float


def risk_coverage(confidences: Sequence[float], right: Sequence[bool]) -> RiskCoverage:
    """The curve of selective prediction (Geifman and El-Yaniv 2017); ties are taken together."""
    c, r = _checked(confidences, right)
    order = np.argsort(-c, kind="stable")
    wrong = np.cumsum(1 - r[order])
    taken = np.arange(1, len(c) + 1)
    last = np.append(c[order][1:] != c[order][:-1], True)
    risk = (wrong / taken)[last]
    size = np.diff(np.append(0, taken[last]))
    return RiskCoverage(taken[last] / len(c), risk, c[order][last], float((risk * size).sum() / len(c)))


def split_sentences(text: str) -> list[str]:
    """Pieces of a text, each with its stop and what blank space follows none; joined they are the text."""
    return [piece for piece in _SENTENCE.findall(text) if piece]


def mark_unsure(text: str, confidences: Sequence[float], threshold: float, language: str = "zh") -> str:
    """Put 【待核实】 behind every sentence whose confidence is below the threshold; nothing is taken out.

    Args:
        text: a report.
        confidences: one per piece of :func:`split_sentences`.
        threshold: in [0, 1].
        language: of the mark.

    Raises:
        InputError: another number of confidences than of sentences.
    """
    pieces = split_sentences(text)
    if len(pieces) != len(confidences):
        raise InputError(f"{len(confidences)} confidences for {len(pieces)} sentences; give one per sentence")
    marked = []
    for piece, confidence in zip(pieces, confidences, strict=True):
        body = piece.rstrip()
        unsure = confidence < threshold and body
        marked.append(body + TO_CHECK[language] + piece[len(body) :] if unsure else piece)
    return "".join(marked)


def _log_odds(confidences: np.ndarray) -> np.ndarray:
    return logit(np.clip(confidences, _EPSILON, 1 - _EPSILON))


def _checked(confidences: Sequence[float], right: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    c, r = np.asarray(confidences, float), np.asarray(right, float)
    if c.shape != r.shape or c.ndim != 1 or not len(c):
        raise InputError(f"{c.size} confidences and {r.size} outcomes; give as many of each, at least 1")
    if not ((c >= 0) & (c <= 1)).all():
        raise InputError("a confidence lies outside 0 to 1; give probabilities")
    return c, r
