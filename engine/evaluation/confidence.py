"""How sure a model is of what it states: from the probabilities of the words that carry it.

A report is cut into statements: the clause of a finding (words of finding, place, size, number, negation) in its
sentence. Its raw confidence is the probability of those words' tokens, not of the phrases around them, which may be
put in many ways. What it is worth is learnt on cases that are not reported (``confidence_scores``), from
the probabilities of the finding's words, of its place and of its size, and, where several reports were sampled, the
share of them that state the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from config.errors import InputError
from data.report_language.labeller import LANGUAGES, FindingMention, label_report
from data.report_language.lexer import Lexer, Token, normal_form, sentences
from data.report_language.terms import FINDINGS
from engine.evaluation.calibration import split_sentences
from engine.evaluation.finding_metrics import DIAGNOSTIC_SECTIONS
from engine.evaluation.localisation import SIZE_TOLERANCE_MM

_CONTENT = (
    "term",
    "head",
    "organ",
    "place",
    "size",
    "count",
    "negate",
    "denied",
    "maybe",
    "maybe_before",
    "maybe_after",
)
_STATED = ("present", "uncertain")
_LEAST = math.log(1e-6)
SIGNS = 5
Span = tuple[int, int]


@dataclass(frozen=True)
class Labeller:
    """The rule labeller in one language. ``merged``: findings that count as another one (miliary as tree_in_bud)."""

    language: str
    merged: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in [*self.merged, *self.merged.values()]:
            if name not in FINDINGS:
                raise InputError(f"'{name}' is no finding; expected one of {', '.join(FINDINGS)}")

    def __call__(self, text: str) -> list[FindingMention]:
        return [replace(m, finding=self.merged.get(m.finding, m.finding)) for m in label_report(text, self.language)]


@dataclass(frozen=True)
class Statement:
    """One finding that a report states or denies.

    Attributes:
        mention: as the labeller reads it.
        sentence: number of its piece in ``split_sentences``.
        words: stretches of the text that carry it.
        raw: probability of the words, 0 to 1: the confidence before calibration.
        signs: what the calibration learns from: log-probability of the finding's words, of its place and of its size
            (0 without such words), whether there is a size, and the share of sampled reports that agree (0 without
            samples).
    """

    mention: FindingMention
    sentence: int
    words: tuple[Span, ...]
    raw: float
    signs: tuple[float, float, float, float, float]


def statements(
    text: str, label: Labeller, spans: Sequence[Span], log_probs: Sequence[float], samples: Sequence[str] = ()
) -> list[Statement]:
    """Statements of a report's findings and impression, in the order of the text.

    Args:
        spans: characters of each token.
        log_probs: of each token.
        samples: other reports of the same image.
    """
    ends, at = [], 0
    for piece in split_sentences(text):
        at += len(piece)
        ends.append(at)
    clauses = content_words(text, label.language)
    others = [label(sample) for sample in samples]
    made = []
    for mention in label(text):
        if mention.section not in DIAGNOSTIC_SECTIONS:
            continue
        words = next((c for c in clauses if any(w.start <= mention.start < w.end for w in c)), ())
        plain = [(w.start, w.end) for w in words if w.kind != "size"] or [(mention.start, mention.end)]
        sizes = [(w.start, w.end) for w in words if w.kind == "size"]
        places = [(w.start, w.end) for w in words if w.kind == "place"]
        finding = [span for span in plain if span not in places] or [(mention.start, mention.end)]
        of_finding = log_probability(finding, spans, log_probs)
        of_place, of_size = (log_probability(w, spans, log_probs) if w else 0.0 for w in (places, sizes))
        agree = sum(any(agrees(mention, other) for other in sample) for sample in others) / max(len(others), 1)
        sentence = next(k for k, end in enumerate(ends) if mention.start < end)
        raw = math.exp(log_probability([*plain, *sizes], spans, log_probs))
        signs = (of_finding, of_place, of_size, float(bool(sizes)), agree)
        made.append(Statement(mention, sentence, tuple([*plain, *sizes]), raw, signs))
    return made


def log_probability(words: Sequence[Span], spans: Sequence[Span], log_probs: Sequence[float]) -> float:
    """Sum over the tokens that touch the words; a very small one where there are none (a text that was cut)."""
    held = [p for (a, b), p in zip(spans, log_probs, strict=True) if any(a < end and b > start for start, end in words)]
    return sum(held) if held else _LEAST


def content_words(text: str, language: str) -> list[list[Token]]:
    """The words of each clause that states something; a clause without a finding belongs to the one before it, or
    at the start of a sentence to the one after."""
    normal = normal_form(text)
    found: list[list[Token]] = []
    for start, end in sentences(normal, 0, len(normal)):
        clauses: list[list[Token]] = [[]]
        for token in _lexer(language).read(normal, start, end):
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
            elif groups:
                groups[-1] += clause
            else:
                waiting += clause
        found += groups
    return found


def is_right(mention: FindingMention, truth: Sequence[FindingMention]) -> bool:
    """Whether a reference bears a statement out: the finding with its place and size, or for a denial its absence."""
    stated = [m for m in truth if m.polarity in _STATED and m.section in DIAGNOSTIC_SECTIONS]
    if mention.polarity == "absent":
        return all(m.finding != mention.finding for m in stated)
    same = [m for m in stated if agrees(mention, m, size=False)]
    # An impression without sizes does not bear a size out that the findings contradict.
    sized = [m for m in same if m.size_mm is not None]
    return any(agrees(mention, m) for m in sized) if mention.size_mm is not None and sized else bool(same)


def agrees(one: FindingMention, other: FindingMention, size: bool = True) -> bool:
    """Same finding, both stated or both denied, and no contradiction in side, height and size."""
    if one.finding != other.finding or (one.polarity in _STATED) != (other.polarity in _STATED):
        return False
    pairs = ((one.side, other.side), (one.level, other.level))
    if any(a is not None and b is not None and a != b for a, b in pairs):
        return False
    both = size and one.size_mm is not None and other.size_mm is not None
    return not both or abs(one.size_mm - other.size_mm) <= SIZE_TOLERANCE_MM + 1e-9


def sentence_confidences(text: str, said: Sequence[Statement], calibrated: Sequence[float]) -> list[float]:
    """One per sentence, that of its least sure statement; 1 for a sentence that states no finding."""
    values = [1.0] * len(split_sentences(text))
    for statement, value in zip(said, calibrated, strict=True):
        values[statement.sentence] = min(values[statement.sentence], float(value))
    return values


@functools.cache
def _lexer(language: str) -> Lexer:
    return Lexer(LANGUAGES[language].rules)
