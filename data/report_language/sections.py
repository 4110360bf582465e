"""The four sections of a report, found by their headings.

Chinese 所见 / 结论 / 建议 / 病理倾向 with common synonyms, English Findings / Impression / Recommendation /
Pathology tendency. A heading stands at the start of the text, of a line or of a sentence, and is followed by
a colon, numbered or not (``一、所见：``); one in brackets (``【所见】``) stands anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

SECTIONS = ("findings", "impression", "recommendation", "tendency")
HEADINGS = {
    "zh": ("所见", "结论", "建议", "病理倾向"),
    "en": ("Findings", "Impression", "Recommendation", "Pathology tendency"),
}  # of written reports, in the order of SECTIONS
PREAMBLE = ""  # name of the text before the first heading
HISTORY = "history"  # of what was known, asked and done before the scan was read: it states no findings

# Longer headings before those that they contain.
_HEADINGS = {
    "findings": (
        "影像学所见", "影像所见", "检查所见", "影像学表现", "影像表现", "影像描述",
        "CT检查所见", "CT所见", "CT表现", "放射学所见", "放射学表现", "检查描述", "所见", "表现", "描述",
        "imaging findings", "CT findings", "findings",
    ),
    "impression": (
        "影像学诊断", "影像诊断", "诊断意见", "诊断结论", "诊断提示", "诊断印象",
        "检查结论", "CT诊断", "放射学诊断", "诊断", "结论", "印象",
        "impression", "conclusions", "conclusion", "diagnosis", "opinion",
    ),
    "recommendation": (
        "处理建议", "随访建议", "检查建议", "建议", "recommendations", "recommendation", "advice", "follow-up",
    ),
    "tendency": (
        "病理倾向性", "病理倾向", "病理提示", "倾向性诊断", "pathology tendency", "pathological tendency",
        "pathologic tendency", "pathology",
    ),
    HISTORY: (
        "临床病史", "现病史", "既往史", "病史摘要", "病史", "主诉", "临床诊断", "临床信息", "临床资料", "检查目的",
        "检查项目", "检查部位", "检查方法", "检查技术", "扫描方法", "扫描技术", "成像技术",
        "clinical indication", "indications", "indication", "clinical history", "clinical information",
        "relevant history", "history", "reason for examination", "reason for exam", "reason for study", "technique",
        "comparisons", "comparison", "procedure", "examination", "exam",
    ),
}  # fmt: skip
_NAME_OF = {word.lower(): name for name, words in _HEADINGS.items() for word in words}
_WORDS = "|".join(re.escape(word) for word in sorted(_NAME_OF, key=len, reverse=True))
_SENTENCE = re.compile(r"[^。；;!！\n.]*(?:\.(?=\d)[^。；;!！\n.]*)*(?:[。；;!！\n.]+|$)")
_HEADING = re.compile(
    rf"[【\[]\s*(?P<a>{_WORDS})\s*[】\]]\s*[:：]?"
    rf"|(?:(?<=[。；;.!！?？\n\s])|^)[ \t　]*(?:[一二三四五\d]+[、.．]\s*)?(?P<b>{_WORDS})\s*[:：]",
    re.IGNORECASE,
)

# A line that goes on in the next one, and one that cannot be its continuation.
_STOPS = "。；;!！?？.:："
_OPEN = re.compile(
    r"(?:[,，、及和或与的为约见在于径]|大小|伴有?|[未无]见?明显|未见|显示|考虑"
    r"|\b(?:no|or|and|of|the|an?|with|without|in|for|to|is|are|at|by|on|from|measuring|evidence|than))$",
    re.IGNORECASE,
)
_ITEM = re.compile(
    r"[-*•·●○◆■【\[①-⑳]|[（(]?\d{1,2}(?:[)）、．]|\.(?!\d))|[一二三四五六七八九十]{1,2}[、.．]"
    r"|[^\s,，。]{1,12}[:：]|[A-Z][A-Za-z ,/&-]{0,40}:"
)
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*(?:[x×*]|mm|cm|毫米|厘米)", re.IGNORECASE)
_LEAST_WIDTH = 16  # characters of a line that was cut at the width of a page


@dataclass(frozen=True)
class Section:
    """``text[start:end]`` is the body of a section, without its heading and outer blanks."""

    name: str
    start: int
    end: int

    def of(self, text: str) -> str:
        return text[self.start : self.end]


def unwrapped(text: str) -> str:
    """The text with lines joined that an export broke inside a sentence; a list keeps its lines.

    A line goes on where it ends in a word that asks for more, or, in a text with stops, without one: at the width of
    the text, or before a small letter or a size.
    """
    lines = re.split(r"\r\n|\r|\n", text)
    width = max(map(len, lines))
    punctuated = re.search(r"[。；;]|\.(?!\d)", text) is not None
    joined = lines[0]
    for before, line in zip(lines, lines[1:], strict=False):
        end, start = before.rstrip(), line.lstrip()
        inside = end and start and end[-1] not in _STOPS and not _ITEM.match(start)
        full = len(end) >= max(_LEAST_WIDTH, width - 2)
        cut = punctuated and (full or start[:1].islower() or _SIZE.match(start) is not None)
        if inside and (_OPEN.search(end) or cut):
            space = "" if re.search("[\u4e00-\u9fff]", end + start) else " "
            joined = joined.rstrip() + space + start
        else:
            joined += "\n" + line
    return joined


def split_sections(text: str) -> list[Section]:
    """Sections in the order of the text; a heading that stands twice gives two.

    Text before the first heading is a section named ``PREAMBLE``; a text without headings is one preamble.
    Empty sections are kept when they have a heading.
    """
    marks = list(_HEADING.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)]
    found = [_trimmed(text, PREAMBLE, 0, ends[0])] if text[: ends[0]].strip() else []
    for mark, end in zip(marks, ends[1:], strict=True):
        found.append(_trimmed(text, _NAME_OF[(mark["a"] or mark["b"]).lower()], mark.end(), end))
    return found


def section_text(text: str, name: str) -> str | None:
    """Body of a section, several of one name joined by a line break; None where its heading is missing."""
    bodies = [section.of(text) for section in split_sections(text) if section.name == name]
    return "\n".join(bodies) if bodies else None


def section_fractions(texts: Sequence[str]) -> dict[str, float]:
    """Fraction of reports that have each section with at least one character; NaN for no reports."""
    filled = [{section.name for section in split_sections(text) if section.of(text)} for text in texts]
    return {name: sum(name in f for f in filled) / len(texts) if texts else float("nan") for name in SECTIONS}


def _trimmed(text: str, name: str, start: int, end: int) -> Section:
    body = text[start:end]
    return Section(name, start + len(body) - len(body.lstrip()), max(start, start + len(body.rstrip())))


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, each with its stop and the line ends behind it; joined they are the text."""
    return [piece for piece in _SENTENCE.findall(text) if piece]
