"""Faults of generated text as measurements: loops, garbled characters, duplicates. No text is changed."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

SHINGLE = 5  # characters
NEAR = 0.9  # Jaccard similarity of shingles from which two reports are near-duplicates
MIN_REPEATS = 3  # of a piece in a row, to be a loop
_LOOP = re.compile(rf"(?s)(?=(\S.{{0,79}}?)\1{{{MIN_REPEATS - 1},}})")
_MOJIBAKE = re.compile(r"锟斤拷|烫烫|屯屯|ï»¿|Ã[\x80-ÿ]|â€|ä¸|å[\x80-¿]|Ġ|Ċ|<0x[0-9A-F]{2}>|\\x[0-9a-f]{2}")
# Greek: β, γ of markers; the micro sign µ is no Greek letter, nor the º of degrees; 々 is no CJK ideograph.
_SCRIPTS = ("LATIN", "CJK", "GREEK", "MICRO SIGN", "ORDINAL INDICATOR", "IDEOGRAPHIC")
_ALLOWED_CONTROLS = "\n\r\t"


@dataclass(frozen=True)
class Repetition:
    """The worst loop of a text: ``piece`` ("" for none) ``times`` in a row, a fraction ``share`` of its characters.

    ``distinct_4grams``: distinct by all 4-grams of characters; 1 where there is none.
    """

    piece: str
    times: int
    share: float
    distinct_4grams: float

    @property
    def looping(self) -> bool:
        """Whether more than a fifth of the text is one loop."""
        return self.share > 0.2


def find_repetition(text: str) -> Repetition:
    """The loop that covers most of a text: a piece of 1 to 80 characters at least three times in a row.

    A loop shorter than 8 characters is none (``3.3.3``, ``......``).
    """
    best, at = ("", 0, 0), 0
    while (match := _LOOP.search(text, at)) is not None:
        piece, start = match.group(1), match.start()
        end = start + len(piece)
        while text.startswith(piece, end):
            end += len(piece)
        if end - start >= 8 and end - start > best[2]:
            best = (piece, (end - start) // len(piece), end - start)
        at = max(start + 1, end - len(piece))
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    distinct = len(set(grams)) / len(grams) if grams else 1.0
    return Repetition(best[0], best[1], best[2] / len(text) if text else 0.0, distinct)


def is_garbled(text: str) -> bool:
    """Whether a text holds what no Chinese or English report does: lost bytes (U+FFFD), control, private or unassigned
    code points, pieces of a wrong encoding or of undecoded tokens, letters of other scripts."""
    return "\ufffd" in text or _MOJIBAKE.search(text) is not None or any(map(_is_foreign, text))


def _is_foreign(char: str) -> bool:
    category = unicodedata.category(char)
    if category[0] == "C":
        return char not in _ALLOWED_CONTROLS and category != "Cf"
    name = unicodedata.name(char, "")
    return category[0] == "L" and not char.isascii() and not any(script in name for script in _SCRIPTS)


def find_duplicates(texts: Sequence[str]) -> dict[str, float]:
    """Duplicates of at least one text, as fractions. Memory grows with the pairs that have a shingle in common.

    Returns:
        ``duplicate_rate``: equal to another one, or at Jaccard similarity 0.9 of 5-character shingles.
        ``exact_duplicate_rate``: equal to another one but for white space.
        ``most_common_report``: the most frequent text.
    """
    plain = ["".join(text.split()) for text in texts]
    counts = Counter(plain)
    distinct = list(counts)
    near = _near(distinct)
    exact = sum(counts[text] for text in distinct if counts[text] > 1)
    alike = sum(counts[text] for text, has in zip(distinct, near, strict=True) if has or counts[text] > 1)
    found = {"duplicate_rate": alike, "exact_duplicate_rate": exact, "most_common_report": max(counts.values())}
    return {name: count / len(texts) for name, count in found.items()}


def _near(texts: Sequence[str]) -> list[bool]:
    """Whether each text has a near-duplicate among the others."""
    shingles = [{text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))} for text in texts]
    number = {gram: k for k, gram in enumerate(dict.fromkeys(gram for held in shingles for gram in held))}
    columns = [number[gram] for held in shingles for gram in held]
    sizes = np.array([len(held) for held in shingles])
    starts = np.concatenate([[0], sizes.cumsum()])
    table = sparse.csr_matrix((np.ones(len(columns), np.int32), columns, starts), (len(texts), len(number)))
    common = (table @ table.T).tocoo()
    union = sizes[common.row] + sizes[common.col] - common.data
    hits = (common.data >= NEAR * union) & (common.row != common.col)
    return np.isin(np.arange(len(texts)), common.row[hits]).tolist()
