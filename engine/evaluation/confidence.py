"""Statements of a report, each with the probability that the model gives its words.

A statement is the clause of a finding in its sentence: words of finding, place, size, number and negation. Its raw
confidence is the probability of the tokens of these words alone, because the phrases around them can be put in many
ways. :mod:`engine.evaluation.calibration` turns its features into a calibrated confidence.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from config.errors import InputError
from data.report_language.labeller import LANGUAGES, FindingMention, label_report
from data.report_language.lexer import Lexer, Token, normal_form, sentences
from data.report_language.terms import FINDINGS
from engine.evaluation.finding_metrics import DIAGNOSTIC_SECTIONS, STATED
from engine.evaluation.localisation import sizes_agree

TO_CHECK = {"zh": "【待核实】", "en": "[to be verified]"}
_SENTENCE = re.compile(r"[^。；;!！\n.]*(?:\.(?=\d)[^。；;!！\n.]*)*(?:[。；;!！\n.]+|$)")
_MAYBE = ("maybe", "maybe_before", "maybe_after")
_CONTENT = ("term", "head", "organ", "place", "size", "count", "negate", "denied", *_MAYBE)
_LEAST = math.log(1e-6)
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
        words: spans of the text that carry it.
        raw: probability of the words, 0 to 1: the confidence before calibration.
        features: for the calibration: log-probability of the finding's words, of its place and of its size (0 without
            such words), whether there is a size, and the fraction of sampled reports that agree (0 without samples).
    """

    mention: FindingMention
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
            else:
                (groups[-1] if groups else waiting).extend(clause)
        found += groups
    return found


def is_right(mention: FindingMention, truth: Sequence[FindingMention]) -> bool:
    """Whether a reference confirms a statement: the finding with its place and size, or for a denial its absence."""
    stated = [m for m in truth if m.polarity in STATED and m.section in DIAGNOSTIC_SECTIONS]
    if mention.polarity == "absent":
        return all(m.finding != mention.finding for m in stated)
    same = [m for m in stated if agrees(mention, m, size=False)]
    # An impression without sizes does not confirm a size that the findings contradict.
    sized = [m for m in same if m.size_mm is not None]
    return any(agrees(mention, m) for m in sized) if mention.size_mm is not None and sized else bool(same)


def agrees(one: FindingMention, other: FindingMention, size: bool = True) -> bool:
    """Same finding, both stated or both denied, and no contradiction in side, level and size."""
    if one.finding != other.finding or (one.polarity in STATED) != (other.polarity in STATED):
        return False
    pairs = ((one.side, other.side), (one.level, other.level))
    if any(a is not None and b is not None and a != b for a, b in pairs):
        return False
    both = size and one.size_mm is not None and other.size_mm is not None
    return not both or sizes_agree(one.size_mm, other.size_mm)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, each with its stop and the line ends behind it; joined they are the text."""
    return [piece for piece in _SENTENCE.findall(text) if piece]


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


@functools.cache
def _lexer(language: str) -> Lexer:
    return Lexer(LANGUAGES[language].rules)
