"""Key points: the findings of a report as one line of text, which a language model turns into a report.

    已知：右肺上野结节12mm；左侧胸腔积液25mm。
    Known: right upper zone nodule 12 mm; left pleural effusion 25 mm.

:func:`key_points_of` takes them from a report, ``change_together`` of ``report_changes.py`` changes sizes and places
in a report wherever they stand. Both read by :mod:`data.report_language.labeller`; a change that the labeller does
not read is not made.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from config.errors import InputError
from data.findings import LESION, FindingRecord
from data.report_language.key_point_words import OUTSIDE_LUNG, WORDS, Words
from data.report_language.labeller import PREAMBLE, detect_language, label_report
from data.report_language.report_changes import grouped, read

MOST_MM = 500  # no finding in a chest is larger
STATED_IN = (PREAMBLE, "findings", "impression")  # advice and tendency state no findings


def write_key_points(findings: Sequence[FindingRecord], language: str) -> str:
    """One line of text, the findings in their order: side, zone (else lobe), name, size in whole mm.

    Raises InputError: the language is not "zh" or "en".
    """
    w = _words(language)
    return w.opening + (list_key_points(findings, language) or w.none) + w.stop


def list_key_points(findings: Sequence[FindingRecord], language: str) -> str:
    """The findings as :func:`write_key_points` says them, to stand in a sentence; empty for none."""
    w = _words(language)
    return w.joint.join(_point(w, f) for f in findings)


def read_key_points(text: str, language: str) -> list[FindingRecord]:
    """The findings of a line of key points, in its own wording or in a user's.

    Raises InputError: a part of the line names no known finding, ends in a number without a unit, or states a size that
        no finding has; or the language is unknown.
    """
    language = detect_language(text) if language == "auto" else language
    w = _words(language)
    body = re.sub(rf"^\s*{w.opening.strip()[:-1]}\s*[:：]?", "", text.strip(), flags=re.IGNORECASE)
    found: list[FindingRecord] = []
    for part in re.split(r"[；;。\n]|\.(?!\d)", body):
        found += _read_part(w, part.strip(" ，,"), language)
    for finding in found:
        if finding.size_mm is not None and finding.size_mm > MOST_MM:
            raise InputError(f"'{body.strip()}': a size of {finding.size_mm:g} mm, expected up to {MOST_MM} mm")
    return [replace(f, section="", start=0, end=0) for f in found if f.polarity != "absent"]


def _read_part(w: Words, part: str, language: str) -> list[FindingRecord]:
    """A clause without a finding says something of the finding before it: place, size, number or change."""
    if not part or re.fullmatch(w.normal, part, re.IGNORECASE):
        return []
    found: list[FindingRecord] = []
    so_far, last = "", []
    for clause in re.split(r"[，,]", part):
        if bare := re.search(r"(?<![A-Za-z\d.×*+乘])\d+(?:\.\d+)?$", clause.strip()):
            raise InputError(f"'{clause.strip()}': {bare.group()} has no unit; expected a size in mm or cm")
        alone = _read_clause(w, clause, language)
        if alone and last:
            found, so_far, last = found + last, "", []
        so_far = f"{so_far}，{clause}" if so_far else clause
        now = _read_clause(w, so_far, language)
        if last and now == last:
            raise InputError(_unknown(w, clause))
        last = now
    if not last:
        raise InputError(_unknown(w, part))
    return found + last


def _read_clause(w: Words, text: str, language: str) -> list[FindingRecord]:
    """The labeller knows no bare lesion: read as a nodule it gives place and size."""
    found = label_report(text, language)
    as_nodule = re.sub(w.lesion, w.nodule, text, flags=re.IGNORECASE)
    return found or [replace(f, finding=LESION) for f in label_report(as_nodule, language)]


def _unknown(w: Words, part: str) -> str:
    return f"'{part.strip()}' names no known finding; known are: {', '.join(w.names.values())}"


def key_points_of(report: str, language: str) -> list[FindingRecord]:
    """The findings that a report states as present or possible, each at each place once, in the order of the text.

    A mention without place, level or size is the same finding as one that has them (an impression repeats findings so).
    A possible finding that the report denies elsewhere is left out.
    """
    _words(language)
    mentions = [m for m in read(report, language) if m.section in STATED_IN]
    return [finding for finding, _ in grouped(mentions)]


def point_key(f: FindingRecord) -> tuple[str, str | None, str | None, str | None, int | None]:
    """What a key point says of a finding: name, side, zone, lobe where there is no zone, size in whole mm."""
    return f.finding, f.side, f.zone, None if f.zone else f.lobe, None if f.size_mm is None else round(f.size_mm)


def _words(language: str) -> Words:
    if language not in WORDS:
        raise InputError(f"language {language!r} is unknown; use one of: {', '.join(WORDS)}")
    return WORDS[language]


def _point(w: Words, f: FindingRecord) -> str:
    kind = "zone" if f.zone else "lobe" if f.lobe else "side" if f.finding in OUTSIDE_LUNG else "lung"
    place = w.place[kind].format(side=w.sides[f.side], level=w.levels.get(f.level, ""))
    place = place if f.side or f.level else ""
    size = "" if f.size_mm is None else w.size.format(mm=min(MOST_MM, round(f.size_mm)))
    return place + w.names[f.finding] + size
