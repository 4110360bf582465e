"""The report card: every measure of a set of generated reports as one dictionary of JSON values.

Keys and definitions are in docs/evaluation.md. A value that cannot be measured is None (null), never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.report_language.labeller import FindingMention, detect_language
from data.report_language.sections import PREAMBLE, SECTIONS, section_shares, section_text
from engine.evaluation.bootstrap import Score, mean_score
from engine.evaluation.calibration import mark_unsure
from engine.evaluation.confidence import Labeller, Statement, sentence_confidences
from engine.evaluation.confidence_scores import ConfidenceScores
from engine.evaluation.finding_metrics import ClinicalScores, clinical_scores
from engine.evaluation.image_dependence import (
    Verdict,
    false_findings_on_normal,
    judge,
    loss_gap,
    macro_difference,
    nats_per_token,
    same_share,
)
from engine.evaluation.localisation import MaskedCase, mask_scores, place_scores, share, whole_report_scores
from engine.evaluation.optional_metrics import optional_scores
from engine.evaluation.report_checks import find_duplicates, find_garble, find_repetition
from engine.evaluation.text_metrics import language_scores

Records = Sequence[Mapping[str, Any]]


@dataclass
class Evaluated:
    """Everything that was generated and measured of one table, by row.

    Attributes:
        records: of each condition, with text, nats and tokens.
        references: true reports.
        masked: lesions of the mask, None for a row without one.
        statements: of the own reports.
        confidence: of all statements, in their order.
        looked: records of the pointing game, None for a row that was not looked at.
        told: what the model is told of lesions beside the image, in words.
    """

    label: Labeller
    references: list[str]
    records: dict[str, Records]
    masked: list[MaskedCase | None]
    statements: list[list[Statement]]
    confidence: ConfidenceScores
    looked: list[Mapping[str, Any] | None]
    abstain_below: float = 0.5
    told: Sequence[str] = ()
    optional: Sequence[str] | None = None
    mentions: dict[str, list[list[FindingMention]]] = field(default_factory=dict)
    truth: list[list[FindingMention]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.truth = [self.label(text) for text in self.references]
        for name in self.records:
            self.mentions[name] = [self.label(text) for text in self.texts(name)]

    @property
    def language(self) -> str:
        return self.label.language

    def texts(self, condition: str = "own") -> list[str]:
        return [record["text"] for record in self.records[condition]]


def language_of(references: Sequence[str]) -> str:
    """That of most reports."""
    chinese = sum(detect_language(text) == "zh" for text in references)
    return "zh" if 2 * chinese >= len(references) else "en"


def report_card(held: Evaluated) -> dict[str, Any]:
    """All measures; see docs/evaluation.md for each key."""
    clinical = {name: clinical_scores(held.truth, mentions) for name, mentions in held.mentions.items()}
    places = {name: place_scores(held.truth, mentions) for name, mentions in held.mentions.items()}
    own = places["own"]
    card = {
        "cases": len(held.references),
        "language": _language(held),
        "findings": _findings(held, clinical["own"]),
        "location_acc": own["location_acc"].value,
        "size_within_3mm": own["size_within_3mm"].value,
        "places": {name: _score(score) for name, score in own.items()},
        "whole_reports": {name: _whole_reports(held, name) for name in held.records if name in ("own", "shuffled")},
        "mask": _mask(held),
        "sections": _sections(held),
        "text": _text_faults(held.texts()) | {"cut_at_limit": _cut(held)},
        "audit": _audit(held, clinical, places),
        "confidence": _confidence(held),
        **_pointing(held),
    }
    return _plain(card)


def marked_reports(held: Evaluated) -> list[str]:
    """The reports, 待核实 behind each sentence whose confidence is below the threshold; nothing is taken out."""
    values = iter(held.confidence.calibrated)
    marked = []
    for text, said in zip(held.texts(), held.statements, strict=True):
        confidences = sentence_confidences(text, said, [float(next(values)) for _ in said])
        marked.append(mark_unsure(text, confidences, held.abstain_below, held.language))
    return marked


def _language(held: Evaluated) -> dict[str, Any]:
    scores = language_scores(held.references, held.texts(), held.language)
    extra, lines = optional_scores(held.references, held.texts(), held.language, held.optional)
    scores |= extra
    found: dict[str, Any] = {"reports_in": held.language}
    found |= {name: score.value for name, score in scores.items()}
    found["intervals"] = {name: [score.low, score.high] for name, score in scores.items()}
    found["definitions"] = {name: score.what for name, score in scores.items()}
    found["not_computed"] = lines
    return found


def _findings(held: Evaluated, scores: ClinicalScores) -> dict[str, Any]:
    by_section = {}
    for section in SECTIONS[:2]:
        if any(mention.section == section for mentions in held.truth for mention in mentions):
            one = clinical_scores(held.truth, held.mentions["own"], (section,))
            by_section[section] = {"macro_f1": _score(one.macro_f1), "micro_f1": _score(one.micro_f1)}
    return {
        "macro_f1": scores.macro_f1.value,
        "macro_f1_interval": [scores.macro_f1.low, scores.macro_f1.high],
        "chance": scores.chance_macro_f1.value,
        "chance_interval": [scores.chance_macro_f1.low, scores.chance_macro_f1.high],
        "p_value": scores.p_value,
        "micro_f1": _score(scores.micro_f1),
        "micro_precision": _score(scores.micro_precision),
        "micro_recall": _score(scores.micro_recall),
        "micro_chance": _score(scores.chance_micro_f1),
        "by_finding": [
            {
                "finding": row.finding,
                "references": row.references,
                "reports": row.generated,
                "precision": row.precision,
                "recall": row.recall,
                "f1": row.f1.value,
                "f1_interval": [row.f1.low, row.f1.high],
            }
            for row in scores.findings
        ],
        "by_section": by_section,
    }


def _whole_reports(held: Evaluated, condition: str) -> dict[str, Any]:
    texts = held.texts(condition)
    scores = whole_report_scores(held.truth, held.mentions[condition], texts, held.language)
    return {name: _score(score) for name, score in scores.items()}


def _mask(held: Evaluated) -> dict[str, Any]:
    known = [case for case in held.masked if case is not None]
    problems = [case.problem for case in known if case.problem]
    if len(problems) == len(known):
        return {"cases": 0, "reports": None, "references": None, "problems": problems}
    return {
        "cases": len(known) - len(problems),
        "reports": {name: _score(s) for name, s in mask_scores(held.masked, held.mentions["own"]).items()},
        "references": {name: _score(s) for name, s in mask_scores(held.masked, held.truth).items()},
        "problems": problems,
    }


def _sections(held: Evaluated) -> dict[str, Any]:
    """Share of reports with each section, and language scores of its text where the reference has it."""
    shares, wanted = section_shares(held.texts()), section_shares(held.references)
    found: dict[str, Any] = {}
    for name in SECTIONS:
        pairs = [
            (truth, section_text(text, name) or "")
            for reference, text in zip(held.references, held.texts(), strict=True)
            if (truth := section_text(reference, name))
        ]
        scores = language_scores(*map(list, zip(*pairs, strict=True)), held.language) if pairs else {}
        chosen = {key: _score(scores[key]) for key in ("BLEU-4", "ROUGE-L", "chrF") if key in scores}
        found[name] = {"in_reports": shares[name], "in_references": wanted[name], "cases": len(pairs)} | chosen
    complete = [all(section_text(text, name) for name in SECTIONS) for text in held.texts()]
    loose = [any(m.section == PREAMBLE for m in mentions) for mentions in held.mentions["own"]]
    found["all_four"] = _score(mean_score(complete, "reports with all four sections, none empty"))
    found["findings_outside_sections"] = float(np.mean(loose))
    return found


def _text_faults(texts: Sequence[str]) -> dict[str, Any]:
    loops, garble = [find_repetition(text) for text in texts], [find_garble(text) for text in texts]
    worst = max(loops, key=lambda loop: loop.share)
    return {
        "looping": _score(mean_score([loop.looping for loop in loops], "reports that are a loop by more than a fifth")),
        "worst_loop": {"piece": worst.piece, "times": worst.times, "share": worst.share},
        "distinct_4grams": float(np.mean([loop.distinct_4grams for loop in loops])),
        "garbled": _score(mean_score([one.garbled for one in garble], "reports with characters that are no text")),
        "empty": float(np.mean([not text.strip() for text in texts])),
        "mean_characters": float(np.mean([len(text) for text in texts])),
    }


def _cut(held: Evaluated) -> float:
    """Share of reports that had not ended at --max_new_tokens: their scores are those of a torso."""
    return float(np.mean([not record["ended"] for record in held.records["own"]]))


def _audit(
    held: Evaluated, clinical: Mapping[str, ClinicalScores], places: Mapping[str, Mapping[str, Score]]
) -> dict[str, Any]:
    own = held.records["own"]
    found: dict[str, Any] = {}
    differences, gaps = {}, {}
    for name in held.records:
        entry = {
            "macro_f1": clinical[name].macro_f1.value,
            "macro_f1_interval": [clinical[name].macro_f1.low, clinical[name].macro_f1.high],
            "micro_f1": clinical[name].micro_f1.value,
            "location_acc": places[name]["location_acc"].value,
            "size_within_3mm": places[name]["size_within_3mm"].value,
            "nats_per_token": nats_per_token(held.records[name]),
        }
        if name != "own":
            gaps[name] = loss_gap(own, held.records[name])
            differences[name] = macro_difference(held.truth, held.mentions["own"], held.mentions[name])
            entry["loss_gap"] = _score(gaps[name])
            entry["macro_f1_difference"] = _score(differences[name])
            entry["same_reports"] = same_share(held.texts(), held.texts(name))
        found[name] = entry
    duplicates, natural = find_duplicates(held.texts()), find_duplicates(held.references)
    normal = false_findings_on_normal(held.truth, held.mentions["own"])
    verdict: Verdict = judge(
        len(own), clinical["own"].p_value, differences, gaps, same_share(held.texts(), held.texts("prior"))
    )
    reasons = list(verdict.reasons)
    if held.told:
        alone = {"macro-F1": "macro_f1", "side and height": "location_acc", "size within 3 mm": "size_within_3mm"}
        values = {what: found["squares"][key] for what, key in alone.items()}
        known = ", ".join(f"{what} {value:.3f}" for what, value in values.items() if math.isfinite(value))
        reasons.append(f"{' and '.join(held.told)} alone, with the mean image, give {known}")
    return found | {
        "normal_false_finding_rate": normal.value,
        "normal_false_finding_interval": [normal.low, normal.high],
        "normal_cases": normal.n,
        "duplicate_rate": duplicates.near_share,
        "exact_duplicate_rate": duplicates.exact_share,
        "most_common_report": duplicates.most_common,
        "duplicate_rate_of_references": natural.near_share,
        "verdict": verdict.text,
        "verdict_code": verdict.code,
        "reasons": reasons,
    }


def _confidence(held: Evaluated) -> dict[str, Any]:
    marked = marked_reports(held)
    touched = sum(text != plain for text, plain in zip(marked, held.texts(), strict=True))
    below = held.confidence.calibrated < held.abstain_below
    found = held.confidence.as_dict() | {"abstain_below": held.abstain_below}
    found |= {"reports_with_marks": touched / len(marked)}
    return found | {"statements_marked": float(below.mean()) if len(below) else None}


def _pointing(held: Evaluated) -> dict[str, Any]:
    hits, chances, why = [], [], {}
    for case, record in enumerate(held.looked):
        for one in record["sentences"] if record else []:
            if one["hit"] is None:
                why[one["why"]] = why.get(one["why"], 0) + 1
            else:
                hits.append((case, one["hit"]))
                chances.append(one["chance"])
    score = share(hits, len(held.looked), "sentences whose map peaks in a cell that sees their lesion")
    detail = _score(score) | {"chance": float(np.mean(chances)) if chances else None, "not_played": why}
    return {"pointing_game": score.value, "pointing": detail}


def _score(score: Score) -> dict[str, Any]:
    return {"value": score.value, "interval": [score.low, score.high], "n": score.n, "what": score.what}


def _plain(value: Any) -> Any:
    """JSON values: NaN becomes None, NumPy's numbers Python's."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
