"""Findings of a chest-CT report, by rules: polarity, place, size, number and change.

``label_report`` reads Chinese and English in four steps: sections (:mod:`data.report_language.sections`), sentences and
tokens (``lexer`` with the tables of ``terms_zh`` and ``terms_en``), scope of negation and uncertainty (``sentence``),
attributes (``attributes``). Cue words with a scope are NegEx's (Chapman et al. 2001); NegBio and CheXpert apply them to
chest reports.

Limits: a sentence is read alone, except for sizes and places of the lesion in the sentence before. A finding named in
two sentences gives two mentions. A statement that all is normal gives none: see :func:`states_normal`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from config.errors import InputError
from data.report_language.attributes import Attributes, Place, attributes, place_groups, read_places
from data.report_language.lexer import Lexer, normal_form, sentences
from data.report_language.sections import PREAMBLE, section_text, split_sections
from data.report_language.sentence import Sentence
from data.report_language.terms import FINDINGS, Language
from data.report_language.terms_en import ENGLISH
from data.report_language.terms_zh import CHINESE

LANGUAGES: dict[str, Language] = {"zh": CHINESE, "en": ENGLISH}
_CHINESE_FRACTION = 0.1  # of the letters; a Chinese report contains CT, GGO, mm
POLARITIES = ("present", "uncertain", "absent")


@dataclass(frozen=True)
class FindingMention:
    """One finding as a report states it at one place.

    Attributes:
        finding: one of ``FINDINGS``.
        polarity: present, absent or uncertain. A lesion that has become smaller is present.
        side: left, right, bilateral, or None.
        lobe: upper (the lingula too), middle, lower, or None.
        zone: upper, middle, lower, or None: the craniocaudal level, as in 上野, upper zone, apex.
        size_mm: largest stated extent, of a range its upper end; None where no size is stated.
        size_low_mm: lower end of a stated range.
        count: stated number, 0 for "several", None where nothing is said.
        change: smaller, larger, stable, new, resolved (then the polarity is absent), or None.
        section: name in ``data.report_language.sections.SECTIONS``, "" for text before the first heading.
        start, end: span of the finding's word in the text.
    """

    finding: str
    polarity: str
    side: str | None = None
    lobe: str | None = None
    zone: str | None = None
    size_mm: float | None = None
    size_low_mm: float | None = None
    count: int | None = None
    change: str | None = None
    section: str = PREAMBLE
    start: int = 0
    end: int = 0

    @property
    def level(self) -> str | None:
        """Craniocaudal level: the zone or, failing that, the lobe."""
        return self.zone or self.lobe


def detect_language(text: str) -> str:
    """ "zh" where at least a tenth of the letters are Chinese, else "en"."""
    chinese = sum("一" <= c <= "鿿" for c in text)
    letters = sum(c.isalpha() for c in text)
    return "zh" if chinese and chinese >= _CHINESE_FRACTION * letters else "en"


def label_report(text: str, language: str = "auto") -> list[FindingMention]:
    """Every mention of a finding, in the order of the text. A finding at two places gives two.

    Raises:
        InputError: the language is not "auto", "zh" or "en".
    """
    if language == "auto":
        language = detect_language(text)
    if language not in LANGUAGES:
        raise InputError(f"language {language!r} is unknown; use one of: auto, {', '.join(LANGUAGES)}")
    normal = normal_form(text)
    mentions: list[FindingMention] = []
    for section in split_sections(text):
        mentions += _label_section(normal, section.start, section.end, section.name, language)
    return mentions


def report_labels(mentions: Sequence[FindingMention], sections: Sequence[str] | None = None) -> dict[str, str]:
    """One polarity per finding that a report mentions: present before uncertain before absent.

    Args:
        mentions: of one report.
        sections: count only these; None for all.
    """
    labels: dict[str, str] = {}
    for mention in mentions:
        if sections is not None and mention.section not in sections:
            continue
        old = labels.get(mention.finding, "absent")
        labels[mention.finding] = min(old, mention.polarity, key=POLARITIES.index)
    return {name: labels[name] for name in FINDINGS if name in labels}


def states_normal(text: str, language: str) -> bool:
    """Whether the findings section, or a text without one, says that both lungs are normal."""
    body = section_text(text, "findings")
    return re.search(LANGUAGES[language].normal, normal_form(text if body is None else body)) is not None


@functools.cache
def _lexer(language: str) -> Lexer:
    return Lexer(LANGUAGES[language].rules)


def _label_section(text: str, start: int, end: int, section: str, language: str) -> list[FindingMention]:
    mentions: list[FindingMention] = []
    earlier: list[Place] = []
    for begin, stop in sentences(text, start, end):
        sentence = Sentence(text[:stop], _lexer(language).read(text, begin, stop), LANGUAGES[language])
        found = _label_sentence(sentence, section, earlier)
        if not found and mentions:
            _add_size(sentence, mentions)
        mentions += found
        groups = place_groups(sentence)
        earlier = read_places(sentence, groups[-1]) if groups else earlier if not found else []
    return mentions


def _label_sentence(sentence: Sentence, section: str, earlier: list[Place]) -> list[FindingMention]:
    polarity, resolved = sentence.polarities()
    known = attributes(sentence, polarity, earlier)
    mentions: list[FindingMention] = []
    for i in sentence.targets:
        token = sentence.tokens[i]
        what = known[i]
        for finding in sentence.names[i]:
            base = FindingMention(
                finding,
                polarity[i],
                count=what.count,
                change="resolved" if i in resolved else what.change,
                section=section,
                start=token.start,
                end=token.end,
            )
            again = _same_lesion(base, mentions, what)
            if again is None:
                mentions += _at_places(base, what, sentence)
            else:
                mentions[again] = _completed(mentions[again], base, what)
    return mentions


def _at_places(base: FindingMention, what: Attributes, sentence: Sentence) -> list[FindingMention]:
    """The mention at each of its places; sizes are paired with the places where there are as many of each."""
    paired = len(what.sizes) == len(what.places) > 1 and re.search(sentence.language.respectively, sentence.text)
    largest = max(what.sizes, key=lambda size: size[1], default=(None, None))
    made = []
    for k, place in enumerate(what.places):
        low, high = what.sizes[k] if paired else largest
        made.append(replace(base, side=place.side, lobe=place.lobe, zone=place.zone, size_low_mm=low, size_mm=high))
    return made


def _same_lesion(base: FindingMention, mentions: Sequence[FindingMention], what: Attributes) -> int | None:
    """Index of an earlier mention of the same lesion, for a mention without a place of its own."""
    if not what.carried:
        return None
    same = [k for k, m in enumerate(mentions) if m.finding == base.finding and m.polarity == base.polarity]
    return same[-1] if same else None


def _completed(old: FindingMention, new: FindingMention, what: Attributes) -> FindingMention:
    low, high = max(what.sizes, key=lambda size: size[1], default=(None, None))
    if old.size_mm is None:
        old = replace(old, size_low_mm=low, size_mm=high)
    count = new.count if old.count is None else old.count
    return replace(old, count=count, change=old.change or new.change)


def _add_size(sentence: Sentence, mentions: list[FindingMention]) -> None:
    """Give the size of a sentence without findings (大小约3.2cm。) to the lesion before it, if that has none."""
    sizes = [token.value for token in sentence.tokens if token.kind == "size"]
    last = mentions[-1]
    if sizes and last.polarity != "absent" and last.size_mm is None:
        low, high = max(sizes, key=lambda size: size[1])
        mentions[-1] = replace(last, size_low_mm=low, size_mm=high)
