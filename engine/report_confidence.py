"""How sure a model is of what it states: from the probabilities of the words that carry it.

A report is cut into statements: the clause of a finding (words of finding, place, size, number, negation) in its
sentence. Its raw confidence is the probability of those words' tokens, not of the phrases around them, which may be
put in many ways; where several reports were sampled, also the share of them that state the same. It is calibrated on
cases that are not reported (:mod:`engine.calibration`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from data.report_labeller import LANGUAGES, FindingMention, label_report
from data.report_lexer import Lexer, normal_form, sentences
from engine.calibration import split_sentences
from engine.clinical_metrics import DIAGNOSTIC_SECTIONS
from engine.report_facts import SIZE_TOLERANCE_MM

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
Span = tuple[int, int]


@dataclass(frozen=True)
class Statement:
    """One finding that a report states or denies.

    Attributes:
        mention: as the labeller reads it.
        sentence: number of its piece in ``split_sentences``.
        words: stretches of the text that carry it.
        raw: confidence before calibration, 0 to 1.
    """

    mention: FindingMention
    sentence: int
    words: tuple[Span, ...]
    raw: float


def statements(
    text: str, language: str, spans: Sequence[Span], log_probs: Sequence[float], samples: Sequence[str] = ()
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
    clauses = content_words(text, language)
    others = [label_report(sample, language) for sample in samples]
    made = []
    for mention in label_report(text, language):
        if mention.section not in DIAGNOSTIC_SECTIONS:
            continue
        words = next((c for c in clauses if any(a <= mention.start < b for a, b in c)), ((mention.start, mention.end),))
        raw = probability(words, spans, log_probs)
        if others:
            agree = sum(any(agrees(mention, other, size=False) for other in sample) for sample in others) / len(others)
            raw = (raw + agree) / 2
        sentence = next(k for k, end in enumerate(ends) if mention.start < end)
        made.append(Statement(mention, sentence, words, raw))
    return made


def probability(words: Sequence[Span], spans: Sequence[Span], log_probs: Sequence[float]) -> float:
    """Product of the probabilities of the tokens that touch the words; 0 where there are none."""
    held = [p for (a, b), p in zip(spans, log_probs, strict=True) if any(a < end and b > start for start, end in words)]
    return math.exp(sum(held)) if held else 0.0


def content_words(text: str, language: str) -> list[tuple[Span, ...]]:
    """The words of each clause that states something; a clause without a finding belongs to the one before it, or
    at the start of a sentence to the one after."""
    normal = normal_form(text)
    found: list[tuple[Span, ...]] = []
    for start, end in sentences(normal, 0, len(normal)):
        clauses: list[list] = [[]]
        for token in _lexer(language).read(normal, start, end):
            if token.kind == "comma":
                clauses.append([])
            elif token.kind in _CONTENT:
                clauses[-1].append(token)
        groups: list[list] = []
        waiting: list = []
        for clause in clauses:
            if any(token.kind in ("term", "head") for token in clause):
                groups.append([*waiting, *clause])
                waiting = []
            elif groups:
                groups[-1] += clause
            else:
                waiting += clause
        found += [tuple((token.start, token.end) for token in group) for group in groups]
    return found


def is_right(mention: FindingMention, truth: Sequence[FindingMention]) -> bool:
    """Whether a reference bears a statement out: the finding with its place and size, or for a denial its absence."""
    stated = [m for m in truth if m.polarity in _STATED and m.section in DIAGNOSTIC_SECTIONS]
    if mention.polarity == "absent":
        return all(m.finding != mention.finding for m in stated)
    return any(agrees(mention, m) for m in stated)


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
