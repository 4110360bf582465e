"""Reports changed at random, so that a language model learns to copy sizes and places, not texts by heart.

A change is made to every word that states it, in findings, impression and advice alike. The words are those tokens of
the labeller that give a mention its place or size; 左心室 and right heart are none. Whatever the labeller does not read
as intended is not made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from data.findings import FindingRecord
from data.report_language.attributes import owner_of_size, place_groups
from data.report_language.labeller import LANGUAGES, label_report, lexer
from data.report_language.lexer import normal_form, sentences
from data.report_language.scope import polarities
from data.report_language.sections import split_sections
from data.report_language.sentence import Sentence
from data.report_language.terms import CENTIMETRES, NUMBER, UNIT

Span = tuple[int, int]
LEVELS = ("upper", "middle", "lower")
_SIDE_WORDS = {"左": "右", "右": "左", "left": "right", "right": "left"}
_SIDE = re.compile(r"[左右]|\b(?:left|right)\b", re.IGNORECASE)
_LEVEL_WORDS = {"上": "upper", "中": "middle", "下": "lower", "upper": "upper", "mid": "middle", "middle": "middle"}
_LEVEL_WORDS["lower"] = "lower"
_LEVEL = re.compile(r"[上中下]|\b(?:upper|middle|mid|lower)\b", re.IGNORECASE)
_SEGMENT = re.compile(r"段|尖|舌|底|segment|apex|apical|lingul|basal")  # a lobe's part does not move to another lobe
# Only the right lung has this fissure.
_RIGHT_ALONE = re.compile(r"水平裂|(?:minor|horizontal) fissure")
# An earlier size that stays: beside it no other size may be said of the same finding.
_EARLIER = re.compile(
    r"原|前片|前次|上次|既往|先前|旧片|[由从][^,。;]{0,10}\d"
    r"|previous|former|prior|compared|earlier|\bwas\b|\bfrom (?:about )?\d"
)
_COMPARED = ("larger", "smaller", "stable")
_RANGE_MM = {"nodule": (3, 30), "mass": (31, 150)}  # 30 mm is where a nodule becomes a mass
_ANY_MM = (3, 200)


# ---------------------------------------------------------------------- which mentions mean one finding


def grouped(mentions: Sequence[FindingRecord]) -> list[tuple[FindingRecord, list[int]]]:
    """Findings that are present or possible, each with the mentions (their indices) that mean it.

    The finding is the first mention, completed by what the others say. A mention that can mean several findings belongs
    to each. A possible finding that is denied elsewhere is left out.
    """
    groups: list[tuple[FindingRecord, list[int]]] = []
    for index, m in enumerate(mentions):
        denied = any(other.polarity == "absent" and _may_be_same(m, other) for other in mentions)
        if m.polarity == "absent" or (m.polarity == "uncertain" and denied):
            continue
        same = [k for k, (finding, _) in enumerate(groups) if _may_be_same(finding, m)]
        for k in same:
            finding, members = groups[k]
            groups[k] = (_completed(finding, m) if len(same) == 1 else finding), [*members, index]
        if not same:
            groups.append((m, [index]))
    return groups


# Words for one lesion; the one that stands in the impression names it.
_SYNONYMS = (frozenset(("miliary", "tree_in_bud")), frozenset(("opacity", "consolidation", "ground_glass")))


def _may_be_same(a: FindingRecord, b: FindingRecord) -> bool:
    """Whether two mentions contradict each other in nothing; two sizes in one section are two findings'."""
    if a.finding != b.finding:
        pair = {a.finding, b.finding}
        concluded = a.section != b.section and (a.size_mm is None or b.size_mm is None)
        if not concluded or not any(pair <= names for names in _SYNONYMS):
            return False
    if b.side == "bilateral" and a.section != b.section and b.level is None and b.size_mm is None:
        return True  # 结论：双肺结节 after one on each side
    for one, two in ((a.side, b.side), (a.lobe, b.lobe), (a.zone, b.zone), (a.level, b.level)):
        if one and two and one != two:
            return False
    repeated = a.section != b.section and (a.side, a.level) == (b.side, b.level)
    return repeated or a.size_mm is None or b.size_mm is None or a.size_mm == b.size_mm


def _completed(a: FindingRecord, b: FindingRecord) -> FindingRecord:
    size = max((s for s in (a.size_mm, b.size_mm) if s is not None), default=None)
    name = b.finding if b.section == "impression" else a.finding
    return replace(a, finding=name, side=a.side or b.side, lobe=a.lobe or b.lobe, zone=a.zone or b.zone, size_mm=size)


# ---------------------------------------------------------------------- the words that state place and size


@dataclass
class _Anchor:
    """Where the words of a mention stand, and what cannot change since other words of its sentence say it too."""

    places: list[Span] = field(default_factory=list)
    sizes: list[Span] = field(default_factory=list)
    keeps_side: bool = False
    keeps_level: bool = False
    keeps_size: bool = False  # an earlier size stands beside it
    sentence: Span = (0, 0)


def _anchors(report: str, language: str) -> dict[int, _Anchor]:
    """By the start of the mention's word."""
    normal = normal_form(report)
    found: dict[int, _Anchor] = {}
    for section in split_sections(report):
        earlier: list[Span] = []
        last: _Anchor | None = None
        for begin, stop in sentences(normal, section.start, section.end):
            sentence = Sentence(normal[:stop], begin, lexer(language).read(normal, begin, stop), LANGUAGES[language])
            tokens, groups, polarity = sentence.tokens, place_groups(sentence), polarities(sentence)[0]
            spans = {group: _place_spans(sentence, group) for group in groups}
            owned: set[Span] = set()
            for i in sentence.targets:
                group, _ = sentence.choose(i, groups)
                places = spans[group] if group else earlier
                owned.update(places)
                last = found.setdefault(tokens[i].start, _Anchor())
                last.places = places
                last.keeps_level = _SEGMENT.search(normal, *_around(places, stop)) is not None if places else True
            for i, token in enumerate(tokens):
                if token.kind == "size":
                    owner = owner_of_size(sentence, i, polarity)
                    anchor = found[tokens[owner].start] if owner is not None else None if sentence.targets else last
                    if anchor:
                        anchor.sizes.append((token.start, token.end))
            loose = [t for t in tokens if t.kind == "place" and t.value[0] and (t.start, t.end) not in owned]
            for i in sentence.targets:
                found[tokens[i].start].keeps_side = bool(loose or _RIGHT_ALONE.search(normal, begin, stop))
                found[tokens[i].start].keeps_size = _EARLIER.search(normal, begin, stop) is not None
                found[tokens[i].start].sentence = _without_blanks(report, begin, stop)
            earlier = spans[groups[-1]] if groups else earlier if not sentence.targets else []
    return found


def _place_spans(sentence: Sentence, group: tuple[int, int]) -> list[Span]:
    return [(t.start, t.end) for t in sentence.tokens[group[0] : group[1] + 1] if t.kind == "place"]


def _without_blanks(text: str, begin: int, stop: int) -> Span:
    return stop - len(text[begin:stop].lstrip()), begin + len(text[begin:stop].rstrip())


def _around(places: Sequence[Span], stop: int) -> Span:
    return places[0][0], min(places[-1][1] + 4, stop)


# ---------------------------------------------------------------------- changes


@dataclass
class _Change:
    """New words at some spans, and what the labeller must then read of some mentions."""

    spans: list[Span]
    rewrite: Callable[[str], str]
    fields: dict[int, dict[str, object]]


def change_together(report: str, language: str, rng: np.random.Generator) -> str:
    """The report with sizes, sides and levels of its findings changed at random, everywhere they stand.

    Sizes are drawn log-uniformly from half to twice the stated one, within what the finding's name allows. Two
    findings that stand in sentences of their own may change places. A report without findings stays as it is.
    """
    if rng.random() < 0.5:
        report = exchange_findings(report, language, rng)
    return change_attributes(report, language, rng)


def stated_words(report: str, language: str) -> list[Span]:
    """Where a report names its findings, their places and sizes, in every section."""
    mentions, groups, anchors = _parsed(report, language)
    found = {mentions[m] for members in groups for m in members}
    of_each = ([(m.start, m.end), *anchors[m.start].places, *anchors[m.start].sizes] for m in found)
    return sorted({span for spans in of_each for span in spans})


def change_attributes(report: str, language: str, rng: np.random.Generator) -> str:
    """The report with sizes, sides and levels changed; all changes that can be made."""
    mentions, groups, anchors = _parsed(report, language)
    changes = [*_place_changes(mentions, groups, anchors, rng), *_size_changes(mentions, groups, anchors, rng)]
    made = changes
    changed = _apply(report, language, mentions, groups, changes)
    if changed is None:
        made, changed = [], report
        for change in changes:
            if (new := _apply(report, language, mentions, groups, [*made, change])) is not None:
                made, changed = [*made, change], new
    return changed


def exchange_findings(report: str, language: str, rng: np.random.Generator) -> str:
    """The report with two findings in exchanged order, unless they share a sentence or the labeller reads it otherwise.

    Their sentences in the findings section change places, and their names with place in the impression.
    """
    mentions, groups, anchors = _parsed(report, language)
    if len(groups) < 2:
        return report
    parts = []
    for members in (groups[k] for k in rng.choice(len(groups), 2, replace=False)):
        stated = [mentions[m] for m in members if anchors[mentions[m].start].places]
        spans: dict[str, Span] = {}
        for m in stated:
            anchor = anchors[m.start]
            name = min(m.start, anchor.places[0][0]), max(m.end, anchor.places[-1][1])
            spans[m.section] = name if m.section in ("impression", "recommendation", "tendency") else anchor.sentence
        parts.append(spans if len(spans) == len(stated) else {})
    one, other = parts
    if not one or one.keys() != other.keys():
        return report
    if any(max(one[name][0], other[name][0]) < min(one[name][1], other[name][1]) for name in one):
        return report
    words = {}
    for here, there in ((one[name], other[name]) for name in one):
        for span, source in ((here, there), (there, here)):
            text, start = report[slice(*source)], report[span[0]]
            words[span] = (text[0].upper() if start.isupper() else text[0].lower()) + text[1:]
    new = _replaced(report, words)
    before, after = (sorted(str((*_what(m)[2:], m.finding, m.polarity == "absent")) for m in read(text, language))
                     for text in (report, new))  # fmt: skip
    return new if before == after and len(grouped(read(new, language))) == len(groups) else report


def _replaced(text: str, words: dict[Span, str]) -> str:
    for start, end in sorted(words, reverse=True):
        text = text[:start] + words[start, end] + text[end:]
    return text


@lru_cache(maxsize=256)
def read(report: str, language: str) -> tuple[FindingRecord, ...]:
    """:func:`label_report`, remembered: a changed report is read to check it and again for its key points."""
    return tuple(label_report(report, language))


@lru_cache(maxsize=10_000)
def _parsed(report: str, language: str) -> tuple[tuple[FindingRecord, ...], list[list[int]], dict[int, _Anchor]]:
    mentions = read(report, language)
    return mentions, [members for _, members in grouped(mentions)], _anchors(report, language)


def _linked(groups: Sequence[Sequence[int]], spans_of: Callable[[int], Iterable[Span]]) -> list[set[int]]:
    """Mentions that can only change together: of one finding, or of findings that share words."""
    linked: list[tuple[set[int], set[Span]]] = []
    for members in groups:
        mentions, spans = set(members), {span for m in members for span in spans_of(m)}
        for other in [pair for pair in linked if pair[0] & mentions or pair[1] & spans]:
            linked.remove(other)
            mentions, spans = mentions | other[0], spans | other[1]
        linked.append((mentions, spans))
    return [mentions for mentions, _ in linked]


def _place_changes(
    mentions: Sequence[FindingRecord], groups: list[list[int]], anchors: dict[int, _Anchor], rng: np.random.Generator
) -> list[_Change]:
    changes = []
    for members in _linked(groups, lambda m: anchors[mentions[m].start].places):
        of = {m: anchors[mentions[m].start] for m in sorted(members)}
        spans = sorted({span for anchor in of.values() for span in anchor.places})
        swap, new = rng.random() < 0.5, dict(zip(LEVELS, rng.permutation(LEVELS).tolist(), strict=True))
        if swap and not any(anchor.keeps_side for anchor in of.values()):
            fields = {m: {"side": _SIDE_WORDS.get(mentions[m].side, mentions[m].side)} for m in of}
            changes.append(_Change(spans, _swap_sides, fields))
        if not any(anchor.keeps_level and anchor.places for anchor in of.values()):
            fields = {m: {k: new.get(getattr(mentions[m], k)) for k in ("lobe", "zone")} for m in of}
            changes.append(_Change(spans, lambda word, new=new: _move_levels(word, new), fields))
    return changes


def _size_changes(
    mentions: Sequence[FindingRecord], groups: list[list[int]], anchors: dict[int, _Anchor], rng: np.random.Generator
) -> list[_Change]:
    changes = []
    for members in _linked(groups, lambda m: anchors[mentions[m].start].sizes):
        sized = [m for m in sorted(members) if mentions[m].size_mm]
        if not sized or any(anchors[mentions[m].start].keeps_size or mentions[m].change in _COMPARED for m in sized):
            continue
        size = max(mentions[m].size_mm for m in sized)
        limits = [_RANGE_MM.get(mentions[m].finding, _ANY_MM) for m in sized]
        low, high = max(size / 2, *(low for low, _ in limits)), min(size * 2, *(high for _, high in limits))
        if low >= high:
            continue
        factor = math.exp(rng.uniform(math.log(low), math.log(high))) / size
        spans = sorted({span for m in sized for span in anchors[mentions[m].start].sizes})
        fields = {m: {"size_mm": float(_scaled(mentions[m].size_mm, factor))} for m in sized}
        changes.append(_Change(spans, lambda word, factor=factor: _scale_numbers(word, factor), fields))
    return changes


def _apply(
    report: str,
    language: str,
    mentions: Sequence[FindingRecord],
    groups: list[list[int]],
    changes: Sequence[_Change],
) -> str | None:
    """The changed report; None where the labeller does not read what is intended."""
    words: dict[Span, str] = {}
    wanted = list(mentions)
    for change in changes:
        for span in change.spans:
            words[span] = change.rewrite(words.get(span, report[slice(*span)]))
        for index, values in change.fields.items():
            wanted[index] = replace(wanted[index], **values)
    text = _replaced(report, words)
    found = read(text, language)
    if list(map(_what, found)) != list(map(_what, wanted)) or [members for _, members in grouped(found)] != groups:
        return None
    return None if _contradictions(found) > _contradictions(mentions) else text


def _what(m: FindingRecord) -> tuple[object, ...]:
    return m.finding, m.polarity, m.section, m.side, m.lobe, m.zone, m.size_mm


def _contradictions(mentions: Sequence[FindingRecord]) -> int:
    """Findings denied where they are stated, and those in a left middle lobe."""
    denied = [m for m in mentions if m.polarity == "absent" and m.side]
    stated = [m for m in mentions if m.polarity != "absent"]
    nowhere = sum((m.side, m.lobe) == ("left", "middle") for m in mentions)
    return nowhere + sum(m.side == d.side and _may_be_same(m, d) for m in stated for d in denied)


# ---------------------------------------------------------------------- words


def _like(word: str, new: str) -> str:
    return new.capitalize() if word[0].isupper() else new


def _swap_sides(text: str) -> str:
    return _SIDE.sub(lambda match: _like(match.group(), _SIDE_WORDS[match.group().lower()]), text)


def _move_levels(text: str, new: dict[str, str]) -> str:
    def moved(match: re.Match[str]) -> str:
        word = match.group()
        level = new[_LEVEL_WORDS[word.lower()]]
        return "上中下"[LEVELS.index(level)] if word in "上中下" else _like(word, level)

    return _LEVEL.sub(moved, text)


def _scaled(mm: float, factor: float) -> int:
    return max(1, round(mm * factor))


def _scale_numbers(text: str, factor: float) -> str:
    """Every number of a size times the factor, in whole mm; one without a unit has the next one's."""
    parts: list[str] = []
    end, unit = len(text), None
    for match in reversed(list(re.finditer(rf"({NUMBER})(?:\s*-?({UNIT}))?", text, re.IGNORECASE))):
        unit = match[2] or unit
        if unit is None:
            continue
        large = unit[0].lower() in CENTIMETRES
        mm = _scaled(float(match[1]) * (10 if large else 1), factor)
        parts = [f"{mm / 10:g}" if large else str(mm), text[match.end(1) : end], *parts]
        end = match.start(1)
    return text[:end] + "".join(parts)
