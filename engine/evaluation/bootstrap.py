"""A score with its 95 % interval over cases.

Percentile bootstrap (Efron 1979): cases are drawn with replacement, as often as there are cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

REPEATS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval over cases.

    Attributes:
        value: on all cases.
        low, high: 2.5 and 97.5 % points over resampled cases; NaN where they are not defined.
        n: number of cases, or of what the score counts.
        what: definition: tokenisation, library and version, scale.
        resampled: values on the resampled cases [REPEATS], where a paired difference needs them.
    """

    value: float
    low: float
    high: float
    n: int
    what: str = ""
    resampled: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def bounds(self) -> list[float]:
        return [self.low, self.high]

    def as_dict(self) -> dict[str, Any]:
        """As the report card holds it."""
        return {"value": self.value, "interval": self.bounds, "n": self.n, "what": self.what}


def case_weights(n: int) -> np.ndarray:
    """How often each case is drawn: int64 [REPEATS, n], each row sums to n; always the same draws."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=REPEATS) if n else np.zeros((REPEATS, 0))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled values [repeats]; NaN among them are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """``above / below``; NaN where ``below`` is 0."""
    return np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)


def ratio_score(above: Sequence[float], below: Sequence[float], what: str = "") -> Score:
    """Σ ``above`` / Σ ``below``, each with one value per case; NaN where Σ ``below`` is 0."""
    parts = np.array([above, below], float)  # [2, cases]
    resampled = ratio(*(case_weights(parts.shape[1]) @ parts.T).T)
    return Score(float(ratio(*parts.sum(1))), *interval(resampled), parts.shape[1], what, resampled)


def difference(one: Score, other: Score, what: str = "") -> Score:
    """``one - other`` of the same cases with the paired interval: both were resampled with the same draws."""
    return Score(one.value - other.value, *interval(one.resampled - other.resampled), one.n, what)


def mean_score(values: Sequence[float], what: str = "") -> Score:
    """Mean of one value per case; NaN without a case."""
    return ratio_score(values, np.ones(len(values)), what)


def hit_score(hits: Sequence[tuple[int, bool]], cases: int, what: str) -> Score:
    """Fraction of hits, which are (case, hit or miss), several or none per case; ``n`` is their number."""
    case, hit = np.array(hits, int).reshape(-1, 2).T
    score = ratio_score(np.bincount(case, hit, cases), np.bincount(case, minlength=cases), what)
    return replace(score, n=len(hits))
