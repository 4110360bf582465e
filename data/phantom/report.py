"""Reports of phantom findings.

A report has four sections, ``所见：…。结论：…。建议：…。病理倾向：…。`` (English: Findings, Impression,
Recommendation, Pathology tendency). Templates are chosen at random and state only what is true; the labeller
(:mod:`data.report_language.labeller`) reads every finding back.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from config.errors import InputError
from data.phantom.finding import Finding
from data.phantom.wording import WORDINGS, Wording

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
