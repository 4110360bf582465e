"""From report text to tokens: sentences, and in them the words of the tables ``terms_zh`` and ``terms_en``.

A rule is a kind, a value and a regular expression. At each position the longest match wins: ``未见明显变化`` (no
change) is not read as a negation, nor ``磨玻璃结节`` as either of its parts. Rules are matched against a normal form of
equal length (full-width forms and case folded), so positions are those of the original.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

# Full-width ASCII and look-alikes, one character to one.
_NORMAL = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_NORMAL |= str.maketrans("　✕╳∶｡–—−〜‐‑", " ××:。---~--")
_NORMAL |= {code: code + 32 for code in range(ord("A"), ord("Z") + 1)}
_NORMAL |= {code: code - 0xFEE0 + 32 for code in range(ord("Ａ"), ord("Ｚ") + 1)}
_ABBREVIATIONS = ("approx", "ca", "vs", "cf", "dr", "e.g", "i.e", "max", "diam", "st")
_KEEP = "".join(rf"(?<!\b{re.escape(word)})" for word in _ABBREVIATIONS)
_END = re.compile(rf"[。;!\n]|\?+|{_KEEP}\.(?!\d|[eg]\.)")


@dataclass(frozen=True)
class Rule:
    """The meaning of a span of text."""

    kind: str  # see :mod:`data.report_language.terms`
    value: Any  # of the token, or a function of the match that gives it; None from it means no match
    pattern: str  # regular expression over normal text


@dataclass(frozen=True)
class Token:
    """One word of the tables at ``[start, end)`` of the normal text of the whole report."""

    kind: str
    value: Any
    start: int
    end: int


def normal_form(text: str) -> str:
    """The text in the form that rules are written for; as long as the text."""
    return text.translate(_NORMAL)


def sentences(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Spans of the sentences of a normal text in ``[start, end)``; a question mark stays with its sentence."""
    begin = start
    for mark in _END.finditer(text, start, end):
        stop = mark.end() if mark.group().startswith("?") else mark.start()
        if text[begin:stop].strip():
            yield begin, stop
        begin = mark.end()
    if text[begin:end].strip():
        yield begin, end


class Lexer:
    """Reads tokens by a list of rules. Of matches of equal length the earlier rule's counts."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(rule.kind, rule.value, re.compile(rule.pattern)) for rule in rules]
        # One search finds where the next token can begin; the rules are tried one by one only there.
        self._any = re.compile("|".join(f"(?:{re.sub(r'[(][?]P<[a-z]+>', '(?:', rule.pattern)})" for rule in rules))

    def read(self, text: str, start: int, end: int) -> list[Token]:
        """Tokens of one sentence, in order and without overlap."""
        # The text ends here, so that "$" in a rule is the sentence's end; a look-behind sees the text before it.
        text = text[:end]
        tokens = []
        at = start
        while (found := self._any.search(text, at)) is not None:
            best = self._longest(text, found.start())
            tokens += [best] if best else []
            at = best.end if best else found.start() + 1
        return tokens

    def _longest(self, text: str, at: int) -> Token | None:
        best = None
        for kind, value, pattern in self._rules:
            match = pattern.match(text, at)
            if match is None or match.end() == at or (best is not None and match.end() <= best.end):
                continue
            found = value(match) if isinstance(value, Callable) else value
            if found is not None or not isinstance(value, Callable):
                best = Token(kind, found, at, match.end())
        return best
