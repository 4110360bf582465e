"""The report card: every measure of a set of generated reports as one dictionary of JSON values.

Keys and definitions are in docs/evaluation.md. A value that cannot be measured is None (null), never 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data.findings import FindingRecord
from data.report_language.sections import PREAMBLE, SECTIONS, section_fractions, section_text
from engine.evaluation import image_dependence as audit
from engine.evaluation.baselines import CopiedReports
from engine.evaluation.bootstrap import Score, difference, hit_score, mean_score
from engine.evaluation.confidence import ConfidenceScores, Labeller, Statement, mark_unsure
from engine.evaluation.finding_metrics import clinical_scores, constant_floors, finding_scores, label_matrix
from engine.evaluation.localisation import MaskedCase, mask_scores, place_scores, whole_report_scores
from engine.evaluation.report_checks import find_duplicates, find_repetition, is_garbled
from engine.evaluation.text_metrics import language_scores

_COMPARED_PLACES = ("location_acc", "size_within_3mm")


@dataclass
class TableResults:
    """Everything that was generated and measured of one table, by row.

    Attributes:
        records: of each condition, with text, nats and tokens.
        references: true reports.
        masked: lesions of the mask, None for a row without one.
        statements: of the own reports.
        confidence: of all statements, in their order.
        pointing: records of the pointing game, None for a row without maps.
        lesion_inputs: what the model is given of lesions beside the image, in words.
        copied: the baselines' reports.
    """

    label: Labeller
    references: list[str]
    records: dict[str, list[dict[str, Any]]]
    masked: list[MaskedCase | None]
    statements: list[list[Statement]]
    confidence: ConfidenceScores
    pointing: list[Mapping[str, Any] | None]
    abstain_below: float = 0.5
    lesion_inputs: Sequence[str] = ()
    copied: CopiedReports = CopiedReports({}, "no training cases were given")

    @cached_property
    def truth(self) -> list[list[FindingRecord]]:
        """Findings of the references."""
        return [self.label(text) for text in self.references]

    @cached_property
    def mentions(self) -> dict[str, list[list[FindingRecord]]]:
        """Findings of the reports of each condition."""
        return {name: [self.label(text) for text in self.texts(name)] for name in self.records}

    def texts(self, condition: str = "own") -> list[str]:
        return [record["text"] for record in self.records[condition]]


def report_card(results: TableResults) -> dict[str, Any]:
    """All measures; see docs/evaluation.md for each key."""
    clinical = {name: clinical_scores(results.truth, mentions) for name, mentions in results.mentions.items()}
    places = {name: place_scores(results.truth, mentions) for name, mentions in results.mentions.items()}
    own, language = places["own"], results.label.language
    whole = {
        name: whole_report_scores(results.truth, results.mentions[name], results.texts(name), language)
        for name in ("own", "shuffled")
    }
    baselines = _baselines(results, _comparable(clinical["own"], own, whole["own"]))
    card = {
        "cases": len(results.references),
        "language": _language(results),
        "findings": _findings(results, clinical["own"]),
        "location_acc": own["location_acc"].value,
        "size_within_3mm": own["size_within_3mm"].value,
        "places": own,
        "whole_reports": whole,
        "baselines": baselines or None,
        "baselines_note": results.copied.note,
        "floors": _floors(results, clinical["own"]),
        "mask": _mask(results),
        "sections": _sections(results),
        "text": _text(results),
        "audit": _audit(results, clinical, places, baselines),
        "confidence": _confidence(results),
        **_pointing(results),
    }
    return plain(card)


def marked_reports(results: TableResults) -> list[str]:
    """The reports with 待核实 behind each sentence whose confidence is below the threshold; nothing is removed."""
    values = iter(results.confidence.calibrated.tolist())
    options = results.abstain_below, results.label.language
    reports = zip(results.texts(), results.statements, strict=True)
    return [mark_unsure(text, stated, [next(values) for _ in stated], *options) for text, stated in reports]


def _language(results: TableResults) -> dict[str, Any]:
    scores = language_scores(results.references, results.texts(), results.label.language)
    return {
        "reports_in": results.label.language,
        **{name: score.value for name, score in scores.items()},
        "intervals": {name: score.bounds for name, score in scores.items()},
        "definitions": {name: score.what for name, score in scores.items()},
    }


def _findings(results: TableResults, scores: Mapping[str, Any]) -> dict[str, Any]:
    stated_in = {mention.section for mentions in results.truth for mention in mentions}
    sections = [name for name in SECTIONS[:2] if name in stated_in]
    parts = [clinical_scores(results.truth, results.mentions["own"], (name,)) for name in sections]
    return {
        **scores,
        **_with_interval("macro_f1", scores["macro_f1"]),
        **_with_interval("chance", scores["chance"]),
        "by_finding": [row | _with_interval("f1", row["f1"]) for row in scores["by_finding"]],
        "by_section": {
            name: {key: part[key] for key in ("macro_f1", "micro_f1")}
            for name, part in zip(sections, parts, strict=True)
        },
    }


def _comparable(
    findings: Mapping[str, Any], places: Mapping[str, Score], whole_reports: Mapping[str, Score]
) -> dict[str, Any]:
    """The scores that reports and baselines are compared by, named as in the card."""
    found = {name: findings[name] for name in ("macro_f1", "micro_f1", "crg")}
    return found | {name: places[name] for name in _COMPARED_PLACES} | {"whole_reports": whole_reports}


def _baselines(results: TableResults, own: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same scores of each baseline, and ``difference``: those of the reports minus those of the baseline."""
    found = {}
    for name, texts in results.copied.reports.items():
        mentions = [results.label(text) for text in texts]
        scores = _comparable(
            finding_scores(label_matrix(results.truth), label_matrix(mentions)),
            place_scores(results.truth, mentions),
            whole_report_scores(results.truth, mentions, texts, results.label.language),
        )
        found[name] = scores | {"difference": _differences(own, scores)}
    return found


def _differences(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: difference(score, other[name], name) if isinstance(score, Score) else _differences(score, other[name])
        for name, score in own.items()
    }


def _floors(results: TableResults, findings: Mapping[str, Score]) -> dict[str, dict[str, Score]]:
    """Scores of the findings of reports that nobody need train for."""
    chance = {"macro_f1": "chance", "micro_f1": "micro_chance", "crg": "crg_chance"}
    return constant_floors(results.truth) | {"permuted": {name: findings[key] for name, key in chance.items()}}


def _headline(cases: int, baseline: Mapping[str, Any]) -> Score:
    """The difference that the verdict rests on: of exact reports where every reference states its findings in full, as
    synthetic ones do, else of macro-F1."""
    exact = baseline["difference"]["whole_reports"]["exact_acc"]
    return exact if exact.n == cases else baseline["difference"]["macro_f1"]


def _mask(results: TableResults) -> dict[str, Any]:
    known = [case for case in results.masked if case is not None]
    problems = [case.problem for case in known if case.problem]
    measured = len(known) - len(problems)
    return {
        "cases": measured,
        "reports": mask_scores(results.masked, results.mentions["own"]) if measured else None,
        "references": mask_scores(results.masked, results.truth) if measured else None,
        "problems": problems,
    }


def _sections(results: TableResults) -> dict[str, Any]:
    """Fraction of reports with each section, and language scores of its text where the reference has it."""
    generated, wanted = section_fractions(results.texts()), section_fractions(results.references)
    found: dict[str, Any] = {}
    for name in SECTIONS:
        pairs = [
            (truth, section_text(text, name) or "")
            for reference, text in zip(results.references, results.texts(), strict=True)
            if (truth := section_text(reference, name))
        ]
        found[name] = {"in_reports": generated[name], "in_references": wanted[name], "cases": len(pairs)}
        if pairs:
            scores = language_scores(*map(list, zip(*pairs, strict=True)), results.label.language)
            found[name] |= {key: scores[key] for key in ("BLEU-4", "ROUGE-L", "chrF")}
    complete = [all(section_text(text, name) for name in SECTIONS) for text in results.texts()]
    outside = [any(m.section == PREAMBLE for m in mentions) for mentions in results.mentions["own"]]
    found["all_four"] = mean_score(complete, "reports with all four sections, none empty")
    found["findings_outside_sections"] = float(np.mean(outside))
    return found


def _text(results: TableResults) -> dict[str, Any]:
    texts = results.texts()
    loops = [find_repetition(text) for text in texts]
    worst = max(loops, key=lambda loop: loop.share)
    return {
        "looping": mean_score([loop.looping for loop in loops], "reports that are a loop by more than a fifth"),
        "worst_loop": {"piece": worst.piece, "times": worst.times, "share": worst.share},
        "distinct_4grams": np.mean([loop.distinct_4grams for loop in loops]),
        "garbled": mean_score([is_garbled(text) for text in texts], "reports with characters that are no text"),
        "empty": np.mean([not text.strip() for text in texts]),
        "mean_characters": np.mean([len(text) for text in texts]),
        "cut_at_limit": np.mean([not record["ended"] for record in results.records["own"]]),
    }


def _audit(
    results: TableResults,
    clinical: Mapping[str, Mapping],
    places: Mapping[str, Mapping[str, Score]],
    baselines: Mapping[str, Mapping],
) -> dict[str, Any]:
    own, mentions, found = results.records["own"], results.mentions, {}
    for name, records in results.records.items():
        found[name] = {
            **_with_interval("macro_f1", clinical[name]["macro_f1"]),
            "micro_f1": clinical[name]["micro_f1"].value,
            "location_acc": places[name]["location_acc"].value,
            "size_within_3mm": places[name]["size_within_3mm"].value,
            "nats_per_token": audit.nats_per_token(records),
        }
        if name != "own":
            found[name] |= {
                "loss_gap": audit.loss_gap(own, records),
                "macro_f1_difference": audit.macro_difference(results.truth, mentions["own"], mentions[name]),
                "same_reports": audit.same_fraction(results.texts(), results.texts(name)),
            }
    normal = audit.false_findings_on_normal(results.truth, mentions["own"])
    differences = (found[name]["macro_f1_difference"] for name in ("shuffled", "prior"))
    gap, same = found["shuffled"]["loss_gap"], found["prior"]["same_reports"]
    copied = {name: _headline(len(own), baseline) for name, baseline in baselines.items()}
    code, reasons = audit.judge(len(own), clinical["own"]["p_value"], *differences, gap, same, copied)
    if results.lesion_inputs:
        alone = {"macro-F1": "macro_f1", "side and level": "location_acc", "size within 3 mm": "size_within_3mm"}
        values = {what: found["squares"][key] for what, key in alone.items()}
        known = ", ".join(f"{what} {value:.3f}" for what, value in values.items() if math.isfinite(value))
        reasons.append(f"{' and '.join(results.lesion_inputs)} alone, with the mean image, give {known}")
    return found | {
        "normal_false_finding_rate": normal.value,
        "normal_false_finding_interval": normal.bounds,
        "normal_cases": normal.n,
        **find_duplicates(results.texts()),
        "duplicate_rate_of_references": find_duplicates(results.references)["duplicate_rate"],
        "verdict": audit.VERDICTS[code],
        "verdict_code": code,
        "reasons": reasons,
    }


def _confidence(results: TableResults) -> dict[str, Any]:
    touched = [marked != text for marked, text in zip(marked_reports(results), results.texts(), strict=True)]
    below = results.confidence.calibrated < results.abstain_below
    return results.confidence.card | {
        "abstain_below": results.abstain_below,
        "reports_with_marks": np.mean(touched),
        "statements_marked": below.mean() if len(below) else None,
    }


def _pointing(results: TableResults) -> dict[str, Any]:
    sentences = [(case, one) for case, record in enumerate(results.pointing) if record for one in record["sentences"]]
    hits = [(case, one["hit"]) for case, one in sentences if one["hit"] is not None]
    chances = [one["chance"] for _, one in sentences if one["hit"] is not None]
    why = Counter(one["why"] for _, one in sentences if one["hit"] is None)
    score = hit_score(hits, len(results.pointing), "sentences whose map peaks in a cell that sees their lesion")
    detail = score.as_dict() | {"chance": np.mean(chances) if chances else None, "not_played": why}
    return {"pointing_game": score.value, "pointing": detail}


def _with_interval(name: str, score: Score) -> dict[str, Any]:
    return {name: score.value, f"{name}_interval": score.bounds}


def plain(value: Any) -> Any:
    """JSON values: scores become dictionaries, NaN None, NumPy's numbers Python's."""
    if isinstance(value, Score):
        value = value.as_dict()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
