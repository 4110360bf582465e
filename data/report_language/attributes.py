"""Attributes of the findings of a sentence: places, sizes, number and change."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import takewhile

from data.report_language.sentence import Group, Sentence
from data.report_language.terms import LARGEST, MEASURED_ORGANS, Size

COUNT_REACH = 26  # characters between a number word and the finding after it


@dataclass(frozen=True)
class Place:
    """Side: left, right, bilateral; lobe and zone: upper, middle, lower. None where it is not stated."""

    side: str | None = None
    lobe: str | None = None
    zone: str | None = None


@dataclass
class Attributes:
    """What a sentence states of one finding. ``count`` 0 stands for "several"."""

    places: list[Place] = field(default_factory=lambda: [Place()])
    carried: bool = False  # the place is in an earlier clause, or nowhere
    sizes: list[Size] = field(default_factory=list)
    largest: list[Place] = field(default_factory=list)  # of several lesions, the place of the one that has the size
    count: int | None = None
    change: str | None = None


def attributes(sentence: Sentence, polarity: dict[int, str], earlier: list[Place]) -> dict[int, Attributes]:
    """Attributes of every target. An absent finding has no size, and no place from another clause.

    ``earlier``: places of the sentence before, for a sentence that refers to its lesion.
    """
    found = {i: _placed(sentence, i, polarity[i], earlier) for i in sentence.targets}
    for i, token in enumerate(sentence.tokens):
        if token.kind == "size":
            owner = owner_of_size(sentence, i, polarity)
            if owner is not None:
                found[owner].sizes.append(token.value)
                found[owner].largest = _place_of_largest(sentence, owner, i)
        elif token.kind == "count":
            owner = _owner_of_count(sentence, i)
            if owner is not None and polarity[owner] != "absent" and found[owner].count is None:
                found[owner].count = token.value
        elif token.kind == "change":
            for owner in _owners_of_change(sentence, i, polarity):
                found[owner].change = found[owner].change or token.value
    return found


def place_groups(sentence: Sentence) -> list[Group]:
    return sentence.groups(("place",), sentence.language.place_gap, ("organ",))


def read_places(sentence: Sentence, group: Group) -> list[Place]:
    """The places of a list such as 左肺上叶及右肺下叶, or right upper and left lower lobes."""
    places: list[Place] = []
    side = None
    last = group[0]
    for i in range(group[0], group[1] + 1):
        token = sentence.tokens[i]
        if token.kind != "place":
            continue
        gap = sentence.between(last, i, ("organ",)) if i > group[0] else ""
        own, lobes, zones = token.value
        levels = [Place(None, lobe=lobe) for lobe in lobes] + [Place(None, zone=zone) for zone in zones]
        if not levels:
            open_ended = [k for k, p in enumerate(places) if p.side is None]
            if open_ended and re.fullmatch(sentence.language.of, gap):
                places = [replace(p, side=p.side or own) for p in places]
            else:
                places.append(Place(own))
            side = own
        else:
            side = own or side
            places = _with_levels(places, [replace(p, side=side) for p in levels], gap)
        last = i
    # A middle lobe is the right one's.
    places = [replace(p, side="right") if p.lobe == "middle" and p.side is None else p for p in places]
    return list(dict.fromkeys(places))


def _with_levels(places: list[Place], levels: list[Place], gap: str) -> list[Place]:
    """Add lobes or zones: to the bare sides that they follow, or as places of their own."""
    heads = list(takewhile(lambda place: place.lobe is None and place.zone is None, reversed(places)))[::-1]
    if len(heads) > 1 and heads[-1].side == levels[0].side and re.fullmatch(r"\s*", gap):
        # "right and left lower lobes": one level for both; 双侧胸腔及右肺下叶 has an organ of its own.
        return places[: -len(heads)] + [replace(level, side=head.side) for head in heads[-2:] for level in levels]
    if heads and heads[-1].side == levels[0].side:
        return places[:-1] + levels
    if places and len(levels) == 1 and places[-1].side == levels[0].side and re.fullmatch(r"[\s的]*", gap):
        old, new = places[-1], levels[0]
        if (old.lobe is None) != (new.lobe is None):  # 右肺下叶基底部: lobe and zone of one place
            return [*places[:-1], Place(old.side, old.lobe or new.lobe, old.zone or new.zone)]
    return places + levels


def _placed(sentence: Sentence, i: int, polarity: str, earlier: list[Place]) -> Attributes:
    group, carried = sentence.choose(i, place_groups(sentence))
    # A pleural effusion named after a lobe in another clause or sentence is not in that lobe.
    elsewhere = any(
        sentence.tokens[k].kind == "organ" and sentence.tokens[k].value not in ("lung", "bronchus", "airway", "septum")
        for k in sentence.clause_of(i)
    )
    if group is None:
        refers = any(token.kind == "within" for token in sentence.tokens[:i])
        back = earlier and polarity != "absent" and refers and not elsewhere
        return Attributes(list(earlier) if back else [Place()], carried=True)
    if carried and (polarity == "absent" or elsewhere):
        return Attributes(carried=True)
    return Attributes(read_places(sentence, group), carried)


def _place_of_largest(sentence: Sentence, owner: int, size: int) -> list[Place]:
    """Where the largest of several lesions lies, whose size is token ``size``: 多发结节,最大者位于右肺下叶,约15mm."""
    tokens = sentence.tokens
    largest = next((k for k in range(owner + 1, size) if tokens[k].value == LARGEST), None)
    if largest is None or any(k in sentence.names for k in range(largest, size)):
        return []
    first, last = sentence.clause_number(largest), sentence.clause_number(size)
    # In its own clauses, or in the next one where that says nothing else: 约15mm,位于右肺下叶.
    beside = last + 1 < sentence.clause_count and re.fullmatch(
        sentence.language.locates, sentence.clause_text(last + 1, ("place", "link", "size"))
    )
    clauses = range(first, last + 1 + bool(beside))
    groups = [g for g in place_groups(sentence) if g[0] > largest and sentence.clause_number(g[1]) in clauses]
    if not groups or any(k in sentence.names for k in range(largest, groups[0][1])):
        return []
    places = read_places(sentence, groups[0])
    return places if len(places) == 1 else []


def _next_target(sentence: Sentence, i: int) -> int | None:
    return next((k for k in sentence.clause_of(i) if k > i and k in sentence.names), None)


def _tightly_before(sentence: Sentence, i: int, target: int) -> bool:
    """Whether token i is an attribute of the target after it: 12mm结节, a new right upper lobe nodule."""
    gap = sentence.between(i, target, ("place", "organ", "count", "change", "size"))
    return re.fullmatch(sentence.language.size_gap, gap) is not None


def owner_of_size(sentence: Sentence, i: int, polarity: dict[int, str]) -> int | None:
    """The finding that a size belongs to; None for the size of an organ or of a lesion that is no finding."""
    tokens = sentence.tokens
    following = next((k for k in sentence.clause_of(i) if k > i and (k in polarity or tokens[k].kind == "other")), None)
    if following is not None and _tightly_before(sentence, i, following):
        return following if following in polarity else None
    owners = [k for k in range(len(tokens)) if polarity.get(k, "absent") != "absent" or tokens[k].kind == "other"]
    before = [k for k in owners if k < i]
    owner = before[-1] if before else next(iter(owners), None)
    if owner not in polarity:
        return None
    between = range(owner + 1, i) if before else range(i)
    organs = [k for k in between if tokens[k].kind == "organ" and tokens[k].value in MEASURED_ORGANS]
    if any(not before or _is_new_subject(sentence, owner, k) for k in organs):
        return None
    return owner


def _is_new_subject(sentence: Sentence, finding: int, organ: int) -> bool:
    """Whether an organ after a finding is in a later clause or joined by "and"; not: a mass abutting the aorta."""
    later = sentence.clause_number(organ) > sentence.clause_number(finding)
    return later or re.search(sentence.language.joint, sentence.between(finding, organ)) is not None


def _owner_of_count(sentence: Sentence, i: int) -> int | None:
    following = _next_target(sentence, i)
    if following is not None and len(sentence.between(i, following)) <= COUNT_REACH:
        return following
    return next((k for k in reversed(sentence.targets) if k < i), None)


def _owners_of_change(sentence: Sentence, i: int, polarity: dict[int, str]) -> list[int]:
    """The findings of a comparison: the one that it qualifies, else all before it in the clause."""
    known = [k for k in sentence.targets if polarity[k] != "absent"]
    following = _next_target(sentence, i)
    if following is not None and _tightly_before(sentence, i, following):
        return [following] if following in known else []
    clause = sentence.clause_of(i)
    since = max((k for k in clause if k < i and sentence.tokens[k].kind == "change"), default=-1)
    here = [k for k in known if k in clause and since < k < i]
    return here or [k for k in known if k < i][-1:] or ([following] if following in known else [])
