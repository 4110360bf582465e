"""Reports of phantom findings: writing them, reading them back, and scoring generated ones.

A report has four sections, ``所见：…。结论：…。建议：…。病理倾向：…。`` (English: Findings, Impression,
Recommendation, Pathology tendency). Writing chooses among templates at random and says only what is true;
reading takes side, zone, type and size from the first section. ``parse_report(write_report(f)) == f``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from config.errors import InputError
from data.phantom.finding import Finding
from data.phantom.wording import WORDINGS, Wording

SIZE_TOLERANCE_MM = 4
# Which of several findings governs advice and tendency: what must be acted on first.
_URGENCY = ("cavity", "tree_in_bud", "consolidation", "effusion", "nodule", "fibrosis", "calcification")


def wording(language: str) -> Wording:
    """The tables of a language.

    Raises:
        InputError: neither "zh" nor "en".
    """
    if language not in WORDINGS:
        raise InputError(f"language {language!r} is unknown; use one of: {', '.join(WORDINGS)}")
    return WORDINGS[language]


def finding_keys(findings: Sequence[Finding], language: str = "zh") -> str:
    """Key points in a fixed order and wording, e.g. ``右肺上野·结节·12mm；左侧·胸腔积液·25mm``."""
    w = wording(language)
    keys = [w.key_gap.join((_place(w, f, w.key_location), w.names[f.type], f"{f.size_mm}mm")) for f in findings]
    return w.key_joint.join(keys) or w.normal_key


def write_report(findings: Sequence[Finding], rng: np.random.Generator, language: str = "zh") -> str:
    """Write a four-section report that is true of the findings, in their order; ``rng`` draws the wording."""
    w = wording(language)
    statements = [_statement(w, f, rng) for f in findings] or [_pick(w.normal_sentences, rng)]
    present = {f.type for f in findings}
    negatives = [text for kind, texts in w.negatives.items() if kind not in present for text in texts]
    if rng.random() < 0.5:
        statements.append(_pick(negatives, rng))
    lead = next((kind for kind in _URGENCY if kind in present), "normal")
    named = w.joint.join(_place(w, f, w.key_location) + w.space + w.names[f.type] for f in findings)
    impression = _pick(w.impression["one"], rng).format(all=named) if findings else _pick(w.impression["normal"], rng)
    stop = w.stop + w.space
    texts = (stop.join(statements), impression, _pick(w.advice[lead], rng), _pick(w.tendency[lead], rng))
    sections = [
        w.section.format(heading=heading, text=text[0].upper() + text[1:]) + w.stop
        for heading, text in zip(w.headings, texts, strict=True)
    ]
    return w.space.join(sections)


def parse_report(text: str, language: str = "zh") -> list[Finding] | None:
    """Read the findings back from a report in this module's wording.

    Only the findings section counts; later sections may be missing or cut short, text before it is skipped.
    A sentence states a finding if it names type, side, zone (an effusion needs none) and size outside of
    clauses with a negation; other sentences are passed over.

    Returns:
        The findings in order; [] if the section says that both lungs are normal and states no finding; None
        if there is no findings section, or nothing in it can be read.
    """
    w = wording(language)
    flags = re.IGNORECASE
    mark = r"\s*[:：]"
    start = re.search(re.escape(w.headings[0]) + mark, text, flags)
    if start is None:
        return None
    body = text[start.end() :]
    end = re.search("|".join(re.escape(h) + mark for h in w.headings), body, flags)
    body = body[: end.start()] if end else body
    found = [f for sentence in re.split(w.sentence_end, body) if (f := _read(w, sentence)) is not None]
    if found:
        return found
    return [] if re.search(w.normal_pattern, body, flags) else None


def score_reports(
    references: Sequence[Sequence[Finding]], generated: Sequence[str], language: str = "zh"
) -> dict[str, float]:
    """Compare generated reports with the true findings.

    In each case true findings are paired one to one with parsed ones, greedily: the pair that agrees in most
    of (side, zone, type) first, then the smaller difference in size. An unpaired one is wrong in all.

    Returns:
        location_acc: share of true findings whose partner has the same side and zone.
        type_acc: share of (true findings + normal cases) with the right type; a normal case is right if
            the report parses as normal.
        size_within_4mm: share of true findings whose partner's size differs by at most 4 mm.
        exact_acc: share of cases with as many findings as true ones and every pair right in side, zone, type
            and size (within 4 mm); a normal case must parse as normal.
        garbled_rate: share of cases that do not parse or contain U+FFFD; such a case is wrong in everything.
        n: number of cases.
        A share of nothing (no abnormal case, or no case) is NaN.

    Raises:
        ValueError: the two lists differ in length.
    """
    if len(references) != len(generated):
        raise ValueError(f"{len(references)} references but {len(generated)} reports")
    location, kind, size, exact, garbled = [], [], [], [], []
    for truth, text in zip(references, generated, strict=True):
        parsed = None if "\ufffd" in text else parse_report(text, language)
        garbled.append(parsed is None)
        if not truth:
            kind.append(parsed == [])
            exact.append(parsed == [])
            continue
        right = [_agreement(a, b) for a, b in _pair(truth, parsed or [])]
        location += [r[0] for r in right]
        kind += [r[1] for r in right]
        size += [r[2] for r in right]
        exact.append(len(parsed or []) == len(truth) and all(all(r) for r in right))

    def share(hits: list[bool]) -> float:
        return float(np.mean(hits)) if hits else float("nan")

    return {
        "location_acc": share(location),
        "type_acc": share(kind),
        "size_within_4mm": share(size),
        "exact_acc": share(exact),
        "garbled_rate": share(garbled),
        "n": len(references),
    }


def _pick(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _place(w: Wording, f: Finding, template: str) -> str:
    """Where a finding lies; an effusion has a side only."""
    if f.type == "effusion":
        return w.sides[f.side] + ("侧" if w is WORDINGS["zh"] else "")
    return template.format(side=w.sides[f.side], zone=w.zones[f.zone])


def _statement(w: Wording, f: Finding, rng: np.random.Generator) -> str:
    place = _place(w, f, _pick(w.locations, rng))
    return _pick(w.sentences[f.type], rng).format(loc=place, side=w.sides[f.side], n=f.size_mm)


def _read(w: Wording, sentence: str) -> Finding | None:
    """The finding that one sentence states, or None."""
    flags = re.IGNORECASE
    clauses = [c for c in re.split(w.clause_end, sentence) if not re.search(w.negation, c, flags)]
    text = "，".join(clauses)
    kind = next((kind for kind, pattern in w.type_patterns if re.search(pattern, text, flags)), None)
    side = re.search(w.side_pattern, text, flags)
    zone = re.search(w.zone_pattern, text, flags)
    size = re.search(w.size_pattern, text, flags)
    if kind is None or side is None or size is None or (zone is None and kind != "effusion"):
        return None
    sides, zones = ({word: name for name, word in table.items()} for table in (w.sides, w.zones))
    where = "lower" if kind == "effusion" else zones[zone.group(1).lower()]
    mm = round(float(size.group(1)) * (10 if size.group(2).lower() in ("cm", "厘米") else 1))
    return Finding(kind, sides[side.group(1).lower()], where, mm) if mm > 0 else None


def _pair(truth: Sequence[Finding], parsed: Sequence[Finding]) -> list[tuple[Finding, Finding | None]]:
    """Greedy one-to-one pairing; see :func:`score_reports`."""
    order = sorted(
        ((_distance(a, b), i, j) for i, a in enumerate(truth) for j, b in enumerate(parsed)),
    )
    partner: dict[int, int] = {}
    for _, i, j in order:
        if i not in partner and j not in partner.values():
            partner[i] = j
    return [(a, parsed[partner[i]] if i in partner else None) for i, a in enumerate(truth)]


def _distance(a: Finding, b: Finding) -> tuple[int, int]:
    return (a.side != b.side) + (a.zone != b.zone) + (a.type != b.type), abs(a.size_mm - b.size_mm)


def _agreement(a: Finding, b: Finding | None) -> tuple[bool, bool, bool]:
    """Location, type and size right."""
    if b is None:
        return False, False, False
    same_place = a.side == b.side and a.zone == b.zone
    return same_place, a.type == b.type, abs(a.size_mm - b.size_mm) <= SIZE_TOLERANCE_MM
