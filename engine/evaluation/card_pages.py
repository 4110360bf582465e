"""The report card for people: Markdown, and one HTML file that holds its pictures.

Both are made of the same blocks, so they say the same.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.evaluation.calibration import TO_CHECK

_STYLE = """body{font:15px/1.55 sans-serif;margin:2em auto;max-width:1150px;padding:0 1em}
table{border-collapse:collapse;margin:.6em 0}td,th{border:1px solid #bbb;padding:.25em .6em;text-align:left;
vertical-align:top}th{background:#eee}img{max-width:100%}.verdict{font-size:1.25em;font-weight:bold;padding:.5em .8em;
border-left:6px solid #888;background:#f4f4f4}.depends{border-color:#2a8f3c}.independent{border-color:#b00020}
.partly,.unclear{border-color:#c77d00}mark{background:#ffd9a0}"""
AUDITED = ("own", "shuffled", "blank", "prior", "squares")
_IMAGES = {
    "own": "the case's own",
    "shuffled": "another patient's",
    "blank": "blank",
    "prior": "none (mean of all)",
    "squares": "mean of all, own slice heights and lesion squares",
}


@dataclass(frozen=True)
class Block:
    """``kind``: h2, text, verdict, list, table (rows, the first its head), picture (path and caption)."""

    kind: str
    content: Any
    extra: str = ""


@dataclass(frozen=True)
class ShownCase:
    """A report as the card shows it; ``picture``: where the model looked, or None."""

    name: str
    reference: str
    marked: str
    picture: Path | None


def card_blocks(card: Mapping[str, Any], plots: Sequence[tuple[Path, str]], cases: Sequence[ShownCase]) -> list[Block]:
    """The whole card."""
    audit = card["audit"]
    blocks = [
        Block("text", f"{card['cases']} cases of {card['csv']}, checkpoint {card['checkpoint']}. In brackets: the 95 % "
              "interval over cases. Definitions: docs/evaluation.md."),
        Block("h2", "Does it look at the image?"),
        Block("verdict", audit["verdict"], audit["verdict_code"]),
        Block("list", audit["reasons"]),
        Block("table", _audit_rows(audit)),
        Block("text", _audit_text(audit)),
        Block("h2", "Findings"),
        Block("text", _findings_text(card)),
        Block("table", _finding_rows(card["findings"]["by_finding"])),
        Block("h2", "Side, height and size"),
        Block("table", [["measure", "value", "of", "what"], *(_score_row(k, v) for k, v in card["places"].items()),
                        *_mask_rows(card["mask"])]),
        *([Block("list", card["mask"]["problems"])] if card["mask"]["problems"] else []),
        Block("h2", "Confidence"),
        Block("text", _confidence_text(card["confidence"])),
        *(Block("picture", path, caption) for path, caption in plots),
        Block("h2", "Where it looked"),
        Block("text", _pointing_text(card["pointing"])),
        Block("h2", "Language"),
        Block("table", _language_rows(card["language"])),
        *([Block("list", card["language"]["not_computed"])] if card["language"]["not_computed"] else []),
        Block("h2", "Sections and text"),
        Block("table", _section_rows(card["sections"])),
        Block("text", _text_text(card["text"])),
        Block("h2", "Reports"),
    ]  # fmt: skip
    for case in cases:
        blocks.append(Block("table", [["case", case.name], ["reference", case.reference], ["generated", case.marked]]))
        if case.picture is not None:
            blocks.append(Block("picture", case.picture, f"{case.name}: where it looked; the lesion outlined"))
    return blocks


def write_markdown(path: Path, blocks: Sequence[Block]) -> None:
    """Pictures are linked by their path from the file's folder."""
    parts = ["# Report card"]
    for block in blocks:
        if block.kind == "h2":
            parts.append(f"## {block.content}")
        elif block.kind == "list":
            parts.append("\n".join(f"- {line}" for line in block.content))
        elif block.kind == "verdict":
            parts.append(f"**{block.content}**")
        elif block.kind == "picture":
            parts.append(f"![{block.extra}]({block.content.relative_to(path.parent).as_posix()})")
        elif block.kind == "table":
            rows = [[_cell(cell) for cell in row] for row in block.content]
            rule = ["---"] * len(rows[0])
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:])))
        else:
            parts.append(str(block.content))
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_html(path: Path, blocks: Sequence[Block]) -> None:
    """One file: pictures are embedded."""
    parts = [
        f"<!doctype html><html><head><meta charset='utf-8'><title>Report card</title><style>{_STYLE}</style></head>"
    ]
    parts.append("<body><h1>Report card</h1>")
    for block in blocks:
        if block.kind == "h2":
            parts.append(f"<h2>{html.escape(block.content)}</h2>")
        elif block.kind == "list":
            parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in block.content) + "</ul>")
        elif block.kind == "verdict":
            parts.append(f"<p class='verdict {block.extra}'>{html.escape(block.content)}</p>")
        elif block.kind == "picture":
            held = base64.b64encode(block.content.read_bytes()).decode("ascii")
            caption = html.escape(block.extra)
            parts.append(f"<figure><img alt='{caption}' src='data:image/png;base64,{held}'><figcaption>{caption}"
                         "</figcaption></figure>")  # fmt: skip
        elif block.kind == "table":
            parts.append(_html_table(block.content))
        else:
            parts.append(f"<p>{html.escape(str(block.content))}</p>")
    path.write_text("\n".join([*parts, "</body></html>"]), encoding="utf-8")


def show(value: Any, digits: int = 3) -> str:
    """A number as the card prints it; a dash where there is none."""
    if value is None:
        return "—"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    return show(value) if value is None or None in interval else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _scored(score: Mapping[str, Any]) -> str:
    return with_interval(score["value"], score["interval"])


def _score_row(name: str, score: Mapping[str, Any]) -> list[str]:
    return [name, _scored(score), str(score["n"]), score["what"]]


def _audit_rows(audit: Mapping[str, Any]) -> list[list[str]]:
    head = ["image", "macro-F1", "side and height", "size within 3 mm", "nats per token", "loss gap", "same reports"]
    rows = []
    for name in AUDITED:
        one = audit[name]
        gap, same = one.get("loss_gap"), one.get("same_reports")
        values = [_IMAGES[name], with_interval(one["macro_f1"], one["macro_f1_interval"]), show(one["location_acc"])]
        values += [show(one["size_within_3mm"]), show(one["nats_per_token"]), _scored(gap) if gap else "", show(same) if
                   gap else ""]  # fmt: skip
        rows.append(values)
    return [head, *rows]


def _audit_text(audit: Mapping[str, Any]) -> str:
    normal = with_interval(audit["normal_false_finding_rate"], audit["normal_false_finding_interval"])
    return (
        f"Normal cases with a false finding: {normal} of {audit['normal_cases']}. Duplicate or near-duplicate reports: "
        f"{show(audit['duplicate_rate'])} (of the references: {show(audit['duplicate_rate_of_references'])}); the most "
        f"frequent report makes up {show(audit['most_common_report'])}."
    )


def _findings_text(card: Mapping[str, Any]) -> str:
    found = card["findings"]
    return (
        f"Macro-F1 {with_interval(found['macro_f1'], found['macro_f1_interval'])}; by chance (reports dealt to other "
        f"cases) {with_interval(found['chance'], found['chance_interval'])}, p = {show(found['p_value'])}. Micro: F1 "
        f"{_scored(found['micro_f1'])}, precision {_scored(found['micro_precision'])}, recall "
        f"{_scored(found['micro_recall'])}."
    )


def _finding_rows(findings: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["finding", "in references", "in reports", "precision", "recall", "F1"]]
    for one in findings:
        f1 = with_interval(one["f1"], one["f1_interval"])
        counts = [one["finding"], str(one["references"]), str(one["reports"])]
        rows.append([*counts, show(one["precision"]), show(one["recall"]), f1])
    return rows


def _mask_rows(mask: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for who in ("reports", "references"):
        rows += [_score_row(f"mask, {who}: {name}", score) for name, score in (mask[who] or {}).items()]
    return rows


def _confidence_text(held: Mapping[str, Any]) -> str:
    return (
        f"Expected calibration error {show(held['ece'])} of {held['statements']} statements (before calibration "
        f"{show(held['ece_before'])}; of perfect calibration, by chance, {show(held.get('ece_of_perfect'))}); "
        f"calibrated on {held['calibrated_on']}. Below {held['abstain_below']} a sentence is marked {TO_CHECK['zh']}: "
        f"{show(held['statements_marked'])} of the statements, in {show(held['reports_with_marks'])} of the reports. "
        f"Area under the risk-coverage curve: {show(held.get('area_under_risk_coverage'))}."
    )


def _pointing_text(held: Mapping[str, Any]) -> str:
    if not held["n"]:
        return "Pointing game: not played, no sentence about a lesion of a mask that the model was shown."
    why = "; ".join(f"{reason}: {count}" for reason, count in held["not_played"].items())
    text = f"Pointing game: {_scored(held)} of {held['n']} sentences; by chance {show(held['chance'])}."
    return text + (f" Not played: {why}." if why else "")


def _language_rows(held: Mapping[str, Any]) -> list[list[str]]:
    rows = [["metric", "value", "definition"]]
    return rows + [
        [name, with_interval(held[name], held["intervals"][name]), what] for name, what in held["definitions"].items()
    ]


def _section_rows(held: Mapping[str, Any]) -> list[list[str]]:
    rows = [["section", "in reports", "in references", "BLEU-4", "ROUGE-L", "chrF"]]
    for name, one in held.items():
        if isinstance(one, Mapping) and "in_reports" in one:
            scores = [_scored(one[key]) if key in one else "—" for key in ("BLEU-4", "ROUGE-L", "chrF")]
            rows.append([name, show(one["in_reports"]), show(one["in_references"]), *scores])
    return [*rows, ["all four", _scored(held["all_four"]), "", "", "", ""]]


def _text_text(held: Mapping[str, Any]) -> str:
    return (
        f"Loops: {_scored(held['looping'])} of the reports; garbled: {_scored(held['garbled'])}; empty: "
        f"{show(held['empty'])}; cut at the limit of tokens: {show(held['cut_at_limit'])}. Distinct 4-grams: "
        f"{show(held['distinct_4grams'])}; mean length {show(held['mean_characters'], 0)} characters. Measured only: "
        "the reports stand as the model wrote them."
    )


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", "<br>")


def _html_table(rows: Sequence[Sequence[str]]) -> str:
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if number == 0 else "td"
        cells = (html.escape(str(cell)).replace("\n", "<br>") for cell in row)
        lines.append("<tr>" + "".join(f"<{tag}>{_marked(cell)}</{tag}>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def _marked(cell: str) -> str:
    for mark in TO_CHECK.values():
        cell = cell.replace(mark, f"<mark>{mark}</mark>")
    return cell
