"""Findings of a chest-CT report, by rules: polarity, place, size, number and change.

``label_report`` reads Chinese and English in five steps: sections (:mod:`data.report_language.sections`), sentences and
tokens (``lexer`` with the tables of ``terms_zh`` and ``terms_en``), findings by organ (``sentence``), scope of negation
and uncertainty (``scope``), attributes (``attributes``). Cue words with a scope are NegEx's (Chapman et al. 2001);
NegBio and CheXpert apply them to chest reports. ``ct_rate_labels`` gives the labels of CT-RATE.

Limits: a sentence is read alone, except for sizes and places of the lesion in the sentence before. A finding named in
two sentences gives two mentions. A statement that all is normal gives none: see :func:`states_normal`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace

from config.errors import InputError
from data.findings import FindingRecord, Source
from data.report_language.attributes import Attributes, Place, attributes, place_groups, read_places
from data.report_language.lexer import Lexer, normal_form, sentences
from data.report_language.scope import polarities
from data.report_language.sections import PREAMBLE, Section, section_text, split_sections
from data.report_language.sentence import Sentence
from data.report_language.terms import (
    CT_RATE,
    FINDINGS,
    LESION,
    MEASURED_ORGANS,
    NODE,
    NODE_SHORT_AXIS_MM,
    NODULE_MAX_MM,
    Language,
    Size,
)
from data.report_language.terms_en import ENGLISH
from data.report_language.terms_zh import CHINESE

LANGUAGES: dict[str, Language] = {"zh": CHINESE, "en": ENGLISH}
_CHINESE_FRACTION = 0.1  # of the letters; a Chinese report contains CT, GGO, mm
POLARITIES = ("present", "uncertain", "absent")


def detect_language(text: str) -> str:
    """ "zh" where at least a tenth of the letters are Chinese, else "en"."""
    chinese = sum("一" <= c <= "鿿" for c in text)
    letters = sum(c.isalpha() for c in text)
    return "zh" if chinese and chinese >= _CHINESE_FRACTION * letters else "en"


def language_of(reports: Sequence[str]) -> str:
    """The language of most reports."""
    chinese = sum(detect_language(text) == "zh" for text in reports)
    return "zh" if 2 * chinese >= len(reports) else "en"


_ENGLISH_WORDS = frozenset(
    ("the", "of", "in", "is", "are", "with", "and", "without", "not", "there", "no", "left", "right")
)
_OTHER_SCRIPTS = re.compile("[\u3040-\u30ff\uac00-\ud7af\u0400-\u04ff\u0600-\u06ff]")  # kana, hangul, Cyrillic, Arabic


def known_language(reports: Sequence[str]) -> str | None:
    """The language of most reports, or None where it is one that the labeller does not know."""
    text = "\n".join(reports)
    letters = sum(character.isalpha() for character in text)
    if len(_OTHER_SCRIPTS.findall(text)) > _CHINESE_FRACTION * letters:
        return None
    words = re.findall(r"[^\W\d_]+", text.lower())
    english = sum(word in _ENGLISH_WORDS for word in words) >= 0.08 * len(words)
    return "zh" if language_of(reports) == "zh" else "en" if english else None


def label_report(text: str, language: str = "auto", source: Source = "report") -> list[FindingRecord]:
    """Every mention of a finding, in the order of the text. A finding at two places gives two.

    Args:
        source: of the records.

    Raises:
        InputError: the language is not "auto", "zh" or "en".
    """
    if language == "auto":
        language = detect_language(text)
    if language not in LANGUAGES:
        raise InputError(f"language {language!r} is unknown; use one of: auto, {', '.join(LANGUAGES)}")
    normal = normal_form(text)
    found = [mention for section in split_sections(text) for mention in _label_section(normal, section, language)]
    return found if source == "report" else [replace(mention, source=source) for mention in found]


def report_labels(mentions: Sequence[FindingRecord], sections: Sequence[str] | None = None) -> dict[str, str]:
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


def ct_rate_labels(report: str | Sequence[FindingRecord]) -> dict[str, bool]:
    """The 18 labels of CT-RATE: whether findings or impression report them as present or possible.

    Args:
        report: its text, or its mentions.
    """
    mentions = label_report(report) if isinstance(report, str) else report
    labels = report_labels(mentions, (PREAMBLE, "findings", "impression"))
    return {name: any(labels.get(f, "absent") != "absent" for f in found) for name, found in CT_RATE.items()}


def states_normal(text: str, language: str) -> bool:
    """Whether the findings section, or a text without one, says that both lungs are normal."""
    body = section_text(text, "findings")
    return re.search(LANGUAGES[language].normal, normal_form(text if body is None else body)) is not None


@functools.cache
def lexer(language: str) -> Lexer:
    return Lexer(LANGUAGES[language].rules)


def _label_section(text: str, section: Section, language: str) -> list[FindingRecord]:
    mentions: list[FindingRecord] = []
    earlier: list[Place] = []
    open_ = outside = False  # the last lesion, or an organ outside the chest, is what the next sentence can refer to
    for begin, stop in sentences(text, section.start, section.end):
        tokens = lexer(language).read(text, begin, stop)
        sentence = Sentence(text[:stop], begin, tokens, LANGUAGES[language], outside)
        found = _label_sentence(sentence, section.name, earlier)
        if not found and open_ and _states_size(sentence):
            mentions[-1] = _sized(mentions[-1], [token.value for token in sentence.tokens if token.kind == "size"])
        mentions += found
        foreign = bool(sentence.organs) or any(token.kind == "other" for token in sentence.tokens)
        open_ = found[-1].polarity != "absent" if found else open_ and not foreign
        outside = sentence.organs == {"outside"}
        groups = place_groups(sentence)
        earlier = read_places(sentence, groups[-1]) if groups else earlier if not found else []
    return [named for mention in mentions if (named := _named_by_size(mention))]


def _states_size(sentence: Sentence) -> bool:
    """Whether a sentence without findings gives the size of the lesion before it: 大小约3.2cm。"""
    for token in sentence.tokens:
        if token.kind == "other" or (token.kind == "organ" and token.value in MEASURED_ORGANS):
            return False
        if token.kind == "size":
            return re.match(sentence.language.refers, sentence.own_text) is not None
    return False


def _named_by_size(mention: FindingRecord) -> FindingRecord | None:
    """The mention of a lymph node or soft-tissue lesion under the name that its size gives; None for a small node."""
    if mention.finding == LESION:
        small = mention.size_mm is not None and mention.size_mm <= NODULE_MAX_MM
        return replace(mention, finding="nodule" if small else "mass")
    if mention.finding != NODE:
        return mention
    large = mention.short_mm is not None and mention.short_mm >= NODE_SHORT_AXIS_MM
    return replace(mention, finding="lymphadenopathy") if large or mention.polarity == "absent" else None


def _label_sentence(sentence: Sentence, section: str, earlier: list[Place]) -> list[FindingRecord]:
    polarity, resolved = polarities(sentence)
    known = attributes(sentence, polarity, earlier)
    mentions: list[FindingRecord] = []
    for i in sentence.targets:
        token, what = sentence.tokens[i], known[i]
        stated = {"count": what.count, "change": "resolved" if i in resolved else what.change}
        largest = replace(what, places=what.largest)  # a lesion of its own, which has the size
        if what.largest:
            what.sizes = []
        for finding in sentence.names[i]:
            base = FindingRecord(finding, polarity[i], section=section, start=token.start, end=token.end, **stated)
            same = [k for k, m in enumerate(mentions) if (m.finding, m.polarity) == (finding, polarity[i])]
            if same and (what.carried or _is_same(mentions[same[-1]], what)):
                mentions[same[-1]] = _completed(mentions[same[-1]], base, what)
            else:
                mentions += _at_places(base, what, sentence)
            if what.largest:
                mentions += _at_places(replace(base, count=None), largest, sentence)
    return mentions


def _is_same(old: FindingRecord, what: Attributes) -> bool:
    """Whether a second word for a finding means the same lesion: denied too, or at one place with one size at most."""
    place = Place(old.side, old.lobe, old.zone)
    one = what.places == [place] or (len(what.places) == 1 and Place() in (place, what.places[0]))
    return old.polarity == "absent" or (one and (old.size_mm is None or not what.sizes))


def _at_places(base: FindingRecord, what: Attributes, sentence: Sentence) -> list[FindingRecord]:
    """The mention at each of its places; sizes are paired with the places where there are as many of each."""
    paired = len(what.sizes) == len(what.places) > 1 and re.search(sentence.language.respectively, sentence.own_text)
    made = []
    for k, place in enumerate(what.places):
        at = replace(base, side=place.side, lobe=place.lobe, zone=place.zone)
        made.append(_sized(at, [what.sizes[k]] if paired else what.sizes))
    return made


def _completed(old: FindingRecord, new: FindingRecord, what: Attributes) -> FindingRecord:
    count = new.count if old.count is None else old.count
    if (old.side, old.lobe, old.zone) == (None, None, None):
        old = replace(old, side=what.places[0].side, lobe=what.places[0].lobe, zone=what.places[0].zone)
    return _sized(replace(old, count=count, change=old.change or new.change), what.sizes)


def _sized(mention: FindingRecord, sizes: Sequence[Size]) -> FindingRecord:
    """The mention with the largest of the sizes, if it has none yet."""
    if not sizes or mention.size_mm is not None:
        return mention
    size = max(sizes, key=lambda size: size.high)
    short = max((size.short for size in sizes if size.short is not None), default=None)
    return replace(mention, size_low_mm=size.low, size_mm=size.high, short_mm=short)
