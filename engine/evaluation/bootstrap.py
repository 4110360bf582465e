"""Intervals over cases: every score of a set of reports is given with what it would be on other cases.

Percentile bootstrap (Efron 1979): cases are drawn with replacement, as often as there are cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

REPEATS = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval over cases.

    Attributes:
        value: on all cases.
        low, high: 2.5 and 97.5 % points over resampled cases; NaN where they are not defined.
        n: number of cases.
        what: definition: tokenisation, library and version, scale.
    """

    value: float
    low: float
    high: float
    n: int
    what: str = ""

    def as_dict(self) -> dict[str, float | int | str]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def case_weights(n: int, repeats: int = REPEATS, seed: int = 0) -> np.ndarray:
    """How often each case is drawn: int64 [repeats, n], each row sums to n."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=repeats) if n else np.zeros((repeats, 0))


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of resampled values [repeats]; NaN among them are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return float("nan"), float("nan")
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(known, [tail, 100 - tail])
    return float(low), float(high)


def mean_score(values: Sequence[float], what: str = "", repeats: int = REPEATS, seed: int = 0) -> Score:
    """Mean of one value per case."""
    held = np.asarray(values, float)
    if not len(held):
        return Score(float("nan"), float("nan"), float("nan"), 0, what)
    low, high = interval(case_weights(len(held), repeats, seed) @ held / len(held))
    return Score(float(held.mean()), low, high, len(held), what)
