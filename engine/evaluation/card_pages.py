"""The report card for people: Markdown, one HTML file that holds its figures, and the plots of confidence.

A block is one part of the card in both formats, so they have the same content.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

from config.files import write_text
from data.report_language.sections import SECTIONS
from engine.evaluation.baselines import BASELINES
from engine.evaluation.conditions import AUDITED, OWN
from engine.evaluation.confidence import EDGES, TO_CHECK, ConfidenceScores

_LOOK = Path(__file__).parents[1] / "page" / "static" / "look.css"  # the report page's
_STYLE = """
body{max-width:72rem;margin:0 auto;padding:1.5rem 1rem 4rem}h1{font-size:1.5rem;margin-bottom:.6rem}
h2{font-size:1.05rem;margin:1.6rem 0 .6rem}img{max-width:100%;background:#fff;border-radius:.4rem}figure{margin:.6rem 0}
figcaption{color:var(--soft);font-size:.82rem}.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem}
td,th{border:1px solid var(--line);padding:.3em .65em;text-align:left;vertical-align:top}th{background:var(--sunken)}
.verdict{font-size:1.2rem;font-weight:650;padding:.7em 1em;border-radius:.6rem;border-left:6px solid var(--soft);
background:var(--surface)}.depends{border-color:var(--good)}.independent,[class*=below]{border-color:var(--bad)}
.partly,.unclear{border-color:var(--warn-line)}mark{background:var(--warn-wash);color:var(--warn);border-radius:.2em}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.8rem}.tile b{font-size:1.7rem;
font-weight:650;font-variant-numeric:tabular-nums}.tile dl{display:grid;grid-template-columns:1fr auto;gap:0 .8rem;
margin:.4rem 0 0;font-size:.82rem;color:var(--soft)}.tile dd{margin:0;font-variant-numeric:tabular-nums}
.case{margin:0 0 1rem}.case h2{margin:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1.2rem}.pair h3{margin:0;font-size:.8rem;
color:var(--soft);font-weight:600}.pair p{white-space:pre-wrap;overflow-wrap:anywhere}ins{text-decoration:none;
background:var(--changed);border-radius:.2em}del{background:var(--bad-wash);color:var(--bad);border-radius:.2em;
text-decoration:none}details{margin:.5rem 0}summary{font-size:1rem;font-weight:600;color:var(--ink);padding:.4rem 0}
@media (max-width:40rem){.pair{grid-template-columns:1fr}}"""
_MARK = re.compile("|".join(map(re.escape, TO_CHECK.values())))
_WORD = re.compile(r"[A-Za-z]+|\d+(?:\.\d+)?|\s+|.", re.DOTALL)
_IMAGES = {
    "own": "the case's own",
    "shuffled": "another patient's",
    "blank": "blank",
    "prior": "none (mean of all)",
    "squares": "mean of all, own slice levels, lesion RoIs and measured lesions",
}
_COMPARED = {
    "macro_f1": "macro-F1",
    "micro_f1": "micro-F1",
    "crg": "CRG",
    "location_acc": "side and level",
    "size_within_3mm": "size within 3 mm",
}
_BESIDE = {"shuffled": "another patient's image", "nearest": "nearest case copied", "lookup": "same findings copied"}
_LEAST_EQUAL = 3  # characters in which two reports must agree to count as alike there
Block = tuple[str, str]  # Markdown, HTML
ShownCase = tuple[str, str, str, Path | None]  # name, reference, marked report, figure of its maps


def opening_blocks(card: Mapping[str, Any], drawn: Sequence[ShownCase]) -> list[Block]:
    """What people look for: the verdict, five numbers beside baselines and floors, and cases drawn at random."""
    audit = card["audit"]
    verdict = f"<p class='verdict {audit['verdict_code']}'>{html.escape(audit['verdict'])}</p>"
    blocks = [
        (f"**{audit['verdict']}**", verdict),
        _text(f"{card['cases']} cases of {card['csv']}, checkpoint {card['checkpoint']}. In brackets: the 95 % "
              "interval over cases. Definitions: docs/evaluation.md."),
        _five_numbers(card),
    ]  # fmt: skip
    if drawn:
        words = "Words that only the reference has are red, words that only the report has are green."
        blocks += [_text(f"{len(drawn)} cases, drawn at random by the seed. {words}"), *map(_drawn_case, drawn)]
    return blocks


def card_blocks(card: Mapping[str, Any], plots: Sequence[tuple[Path, str]], cases: Sequence[ShownCase]) -> list[Block]:
    """All tables, each after its heading."""
    blocks = [
        *_audit(card["audit"]),
        *_compared(card),
        *_findings(card["findings"]),
        *_places(card["places"], card["mask"]),
        *_confidence(card["confidence"], card["language"]["reports_in"]),
        *(_figure(path, caption) for path, caption in plots),
        *_pointing(card["pointing"]),
        *_language(card["language"]),
        *_sections(card["sections"], card["text"]),
        _heading("Reports"),
    ]
    for name, reference, marked, figure in cases:
        blocks.append(_table([["case", name], ["reference", reference], ["generated", marked]]))
        if figure is not None:
            blocks.append(_figure(figure, f"{name}: where it looked; the lesion outlined", "maps/"))
    return blocks


def write_pages(folder: Path, opening: Sequence[Block], blocks: Sequence[Block]) -> None:
    """Write ``report_card.md``, which links its figures, and ``report_card.html``, which holds them; there everything
    after the opening is folded at its headings."""
    markdown = [block for block, _ in (*opening, *blocks)]
    write_text(folder / "report_card.md", "\n\n".join(["# Report card", *markdown]) + "\n")
    look = _LOOK.read_text(encoding="utf-8") + _STYLE
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'>"
    page = [f"<!doctype html><html lang='en'><head>{head}<title>Report card</title><style>{look}</style></head>"]
    page += ["<body><h1>Report card</h1>", *(part for _, part in opening), "<details>"]
    for number, (_, part) in enumerate(blocks):
        is_heading = part.startswith("<h2>")
        between = "</details><details>" if is_heading and number else ""
        page.append(f"{between}<summary>{part[4:-5]}</summary>" if is_heading else part)
    write_text(folder / "report_card.html", "\n".join([*page, "</details></body></html>"]))


def draw_plots(folder: Path, scores: ConfidenceScores) -> list[tuple[Path, str]]:
    """Write the reliability diagram and the risk-coverage curve; none where there are no statements."""
    from matplotlib.figure import Figure  # without pyplot: no display and no global state

    bins, curve, card = scores.bins, scores.curve, scores.card
    if not bins:
        return []
    plots = [(folder / "reliability.png", "Reliability"), (folder / "risk_coverage.png", "Risk and coverage")]
    figure = Figure(figsize=(4, 4.6), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    left, width = bins["from"], np.diff(EDGES)
    top.bar(left, np.nan_to_num(bins["right"]), width, align="edge", color="#4c78a8", edgecolor="white")
    top.plot([0, 1], [0, 1], "--", color="#555555", linewidth=1)
    top.plot(bins["confidence"], bins["right"], "o", color="#f58518", markersize=4)
    top.set(ylabel="fraction right", ylim=(0, 1), title=f"statements  ECE {card['ece']:.3f}")
    below.bar(left, bins["count"], width, align="edge", color="#9d9d9d", edgecolor="white")
    below.set(xlabel="confidence", ylabel="count", xlim=(0, 1))
    figure.savefig(plots[0][0], dpi=150)
    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.step(curve["coverage"], curve["risk"], where="post", color="#4c78a8")
    axis.set(xlabel="fraction of statements kept, the surest first", ylabel="fraction of them wrong", xlim=(0, 1))
    axis.set(ylim=(0, max(0.05, 1.15 * float(curve["risk"].max()))))
    axis.set(title=f"statements  area {card['area_under_risk_coverage']:.3f}")
    figure.savefig(plots[1][0], dpi=150)
    return plots


# ---------------------------------------------------------------------------- blocks


def _heading(text: str) -> Block:
    return (f"## {text}", f"<h2>{html.escape(text)}</h2>")


def _text(text: str) -> Block:
    return (text, f"<p>{html.escape(text)}</p>")


def _list(lines: Sequence[str]) -> Block:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return ("\n".join(f"- {line}" for line in lines), f"<ul>{items}</ul>")


def _figure(path: Path, caption: str, folder: str = "") -> Block:
    """``folder``: of the figure, from the card's."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    escaped = html.escape(caption)
    image = f"<img alt='{escaped}' src='data:image/png;base64,{content}'>"
    return (f"![{caption}]({folder}{path.name})", f"<figure>{image}<figcaption>{escaped}</figcaption></figure>")


def _table(rows: Sequence[Sequence[str]]) -> Block:
    """The first row is the head."""
    cells = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(rows[0]))
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        marked = (_MARK.sub(r"<mark>\g<0></mark>", html.escape(cell).replace("\n", "<br>")) for cell in row)
        lines.append("<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in marked) + "</tr>")
    table = f"<div class='scroll'><table>{''.join(lines)}</table></div>"
    return ("\n".join(f"| {' | '.join(row)} |" for row in cells), table)


# ---------------------------------------------------------------------------- the opening


def _five_numbers(card: Mapping[str, Any]) -> Block:
    """Each score of the reports, and beside it those of the baselines and the floor."""
    own, audit, whole = _own_scores(card), card["audit"], card["whole_reports"]
    baselines = card["baselines"] or {}
    negative = {name: score["value"] for name, score in card["floors"]["all_negative"].items()}
    scores = [("macro-F1 of findings", "macro_f1"), ("CRG", "crg"), ("side and level right", "location_acc")]
    scores += [("size within 3 mm", "size_within_3mm"), ("whole report right", "exact_acc")]
    rows, tiles = [["score", "the model", *_BESIDE.values(), "nothing reported"]], []
    for title, name in scores:
        if name == "exact_acc":
            mine, shuffled = whole["own"][name], whole["shuffled"][name]["value"]
            copied = [baselines.get(one, {}).get("whole_reports", {}).get(name) for one in ("nearest", "lookup")]
        else:
            mine, shuffled = own[name], audit["shuffled"].get(name)
            copied = [baselines.get(one, {}).get(name) for one in ("nearest", "lookup")]
        values = [shuffled, *(one and one["value"] for one in copied), negative.get(name)]
        rows.append([title, _scored(mine), *map(show, values)])
        beside = [
            pair for pair in zip([*_BESIDE.values(), "nothing reported"], values, strict=True) if pair[1] is not None
        ]
        lines = "".join(f"<dt>{html.escape(what)}</dt><dd>{show(value)}</dd>" for what, value in beside)
        interval = _scored(mine).partition(" ")[2]
        number = f"<b>{show(mine['value'])}</b><div class='muted small'>{interval}</div>"
        tiles.append(f"<div class='card tile'><div class='muted small'>{title}</div>{number}<dl>{lines}</dl></div>")
    return _table(rows)[0], f"<div class='tiles'>{''.join(tiles)}</div>"


def _drawn_case(case: ShownCase) -> Block:
    """A case with its figure; reference and report side by side, their differences marked."""
    name, reference, generated, figure = case
    there, here = marked_differences(reference, generated)
    image, link = "", ""
    if figure is not None:
        link, image = _figure(figure, "where it looked; the lesion outlined", "maps/")
        link = f"\n\n{link}"
    sides = f"<div><h3>reference</h3><p>{there}</p></div><div><h3>generated</h3><p>{here}</p></div>"
    words = _table([["case", name], ["reference", reference], ["generated", generated]])[0] + link
    return words, f"<div class='card case'><h2>{html.escape(name)}</h2>{image}<div class='pair'>{sides}</div></div>"


def marked_differences(reference: str, generated: str) -> tuple[str, str]:
    """Both texts as HTML: what only the reference has in ``del``, what only the report has in ``ins``."""
    texts = [_WORD.findall(text) for text in (reference, generated)]
    pieces: tuple[list[str], list[str]] = ([], [])
    changed: list[list[str]] = [[], []]

    def close() -> None:
        for side, tag in enumerate(("del", "ins")):
            if text := "".join(changed[side]):
                pieces[side].append(f"<{tag}>{_escaped(text)}</{tag}>")
            changed[side].clear()

    for kind, a, b, c, d in SequenceMatcher(None, *texts, autojunk=False).get_opcodes():
        parts = "".join(texts[0][a:b]), "".join(texts[1][c:d])
        # A character or two between changes is chance, and would break the words apart.
        if kind == "equal" and (len(parts[0]) >= _LEAST_EQUAL or not any(changed)):
            close()
            for side in (0, 1):
                pieces[side].append(_escaped(parts[side]))
        else:
            for side in (0, 1):
                changed[side].append(parts[side])
    close()
    return "".join(pieces[0]), "".join(pieces[1])


def _escaped(text: str) -> str:
    return _MARK.sub(r"<mark>\g<0></mark>", html.escape(text))


# ---------------------------------------------------------------------------- content


def show(value: Any) -> str:
    """A number as the card prints it; a dash where there is none."""
    return "—" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    return show(value) if value is None or None in interval else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _named(values: Mapping[str, Any], name: str) -> str:
    """The value of a key with its interval, which has a key of its own."""
    return _with_interval(values[name], values[f"{name}_interval"])


def _scored(score: Mapping[str, Any] | None, absent: str = "") -> str:
    return _with_interval(score["value"], score["interval"]) if score else absent


def _audit(audit: Mapping[str, Any]) -> list[Block]:
    rows = [["image", "macro-F1", "side and level", "size within 3 mm", "nats per token", "loss gap", "same reports"]]
    for name in AUDITED:
        one = audit[name]
        numbers = [show(one[key]) for key in ("location_acc", "size_within_3mm", "nats_per_token")]
        same = show(one["same_reports"]) if name != OWN else ""
        rows.append([_IMAGES[name], _named(one, "macro_f1"), *numbers, _scored(one.get("loss_gap")), same])
    normal = _with_interval(audit["normal_false_finding_rate"], audit["normal_false_finding_interval"])
    text = (
        f"Normal cases with a false finding: {normal} of {audit['normal_cases']}. Duplicate or near-duplicate reports: "
        f"{show(audit['duplicate_rate'])} (of the references: {show(audit['duplicate_rate_of_references'])}); the most "
        f"frequent report makes up {show(audit['most_common_report'])}."
    )
    return [_heading("Does it look at the image?"), _list(audit["reasons"]), _table(rows), _text(text)]


def _compared(card: Mapping[str, Any]) -> list[Block]:
    """Each score of the reports beside that of the baselines and the floors."""
    baselines, floors = card["baselines"] or {}, card["floors"]
    rows = [["score", "the model", *baselines, "floors"]]
    for name, words in _COMPARED.items():
        copied = [_beside(one[name], one["difference"][name]) for one in baselines.values()]
        bounds = "\n".join(show(floor[name]["value"]) for floor in floors.values() if name in floor)
        rows.append([words, _unbroken(_own_scores(card)[name]), *copied, bounds])
    for name, score in card["whole_reports"]["own"].items():
        if score["n"]:
            parts = (
                (one["whole_reports"][name], one["difference"]["whole_reports"][name]) for one in baselines.values()
            )
            rows.append([f"whole reports: {name}", _unbroken(score), *(_beside(*part) for part in parts), ""])
    text = f"{card['baselines_note']}."
    if baselines:
        text = f"Baselines copy one of {text} " + "; ".join(f"{name}: {words}" for name, words in BASELINES.items())
        text += ". In the second line of a cell: the model minus the baseline, with its paired interval."
    text += " Floors, in this order: reports that state no finding, that state every finding, permuted reports."
    return [_heading("Beside its baselines and floors"), _text(text), _table(rows)]


def _own_scores(card: Mapping[str, Any]) -> dict[str, Any]:
    """The model's scores that baselines have too, by the names that they have there; of whole reports apart."""
    found = card["findings"]
    macro = {"value": found["macro_f1"], "interval": found["macro_f1_interval"]}
    return {**found, "macro_f1": macro, **card["places"]}


def _beside(score: Mapping[str, Any], difference: Mapping[str, Any]) -> str:
    numbers = [difference["value"], *difference["interval"]]
    signed = "—" if None in numbers else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*numbers)
    return f"{_unbroken(score)}\n{signed}".replace(" ", "\u00a0")


def _unbroken(score: Mapping[str, Any]) -> str:
    """With no-break spaces."""
    return _scored(score).replace(" ", "\u00a0")


def _findings(found: Mapping[str, Any]) -> list[Block]:
    text = (
        f"Macro-F1 {_named(found, 'macro_f1')}; by chance (permutation baseline) {_named(found, 'chance')}, "
        f"p = {show(found['p_value'])}. Micro: F1 {_scored(found['micro_f1'])}, precision "
        f"{_scored(found['micro_precision'])}, recall {_scored(found['micro_recall'])}. CRG {_scored(found['crg'])}; "
        "an all-negative and an all-positive report get 0.333."
    )
    rows = [["finding", "in references", "in reports", "precision", "recall", "F1"]]
    keys = ("finding", "references", "reports", "precision", "recall")
    rows += [[*(show(one[key]) for key in keys), _named(one, "f1")] for one in found["by_finding"]]
    return [_heading("Findings"), _text(text), _table(rows)]


def _places(places: Mapping[str, Any], mask: Mapping[str, Any]) -> list[Block]:
    rows = [["measure", "value", "of", "what"]]
    groups = (("", places), ("mask, reports: ", mask["reports"]), ("mask, references: ", mask["references"]))
    for prefix, scores in groups:
        for name, score in (scores or {}).items():
            rows.append([prefix + name, _scored(score), str(score["n"]), score["what"]])
    problems = [_list(mask["problems"])] if mask["problems"] else []
    return [_heading("Side, craniocaudal level and size"), _table(rows), *problems]


def _confidence(found: Mapping[str, Any], language: str) -> list[Block]:
    text = (
        f"Expected calibration error {show(found['ece'])} of {found['statements']} statements (before calibration "
        f"{show(found['ece_before'])}; of perfect calibration, by chance, {show(found.get('ece_of_perfect'))}); "
        f"calibrated on {found['calibrated_on']}. Below {found['abstain_below']} a sentence is marked "
        f"{TO_CHECK[language]}: {show(found['statements_marked'])} of the statements, in "
        f"{show(found['reports_with_marks'])} of the reports. Area under the risk-coverage curve: "
        f"{show(found.get('area_under_risk_coverage'))}."
    )
    return [_heading("Confidence"), _text(text)]


def _pointing(found: Mapping[str, Any]) -> list[Block]:
    text = "Pointing game: not played, no sentence about a lesion of a mask that the model was shown."
    if found["n"]:
        text = f"Pointing game: {_scored(found)} of {found['n']} sentences; by chance {show(found['chance'])}."
        why = "; ".join(f"{reason}: {count}" for reason, count in found["not_played"].items())
        text += f" Not played: {why}." if why else ""
    return [_heading("Where it looked"), _text(text)]


def _language(found: Mapping[str, Any]) -> list[Block]:
    metrics = found["definitions"].items()
    rows = [[name, _with_interval(found[name], found["intervals"][name]), what] for name, what in metrics]
    return [_heading("Language"), _table([["metric", "value", "definition"], *rows])]


def _sections(sections: Mapping[str, Any], text: Mapping[str, Any]) -> list[Block]:
    rows = [["section", "in reports", "in references", "BLEU-4", "ROUGE-L", "chrF"]]
    for name in SECTIONS:
        one = sections[name]
        scores = [_scored(one.get(key), "—") for key in ("BLEU-4", "ROUGE-L", "chrF")]
        rows.append([name, show(one["in_reports"]), show(one["in_references"]), *scores])
    rows.append(["all four", _scored(sections["all_four"]), "", "", "", ""])
    faults = (
        f"Loops: {_scored(text['looping'])} of the reports; garbled: {_scored(text['garbled'])}; empty: "
        f"{show(text['empty'])}; cut at the limit of tokens: {show(text['cut_at_limit'])}. Distinct 4-grams: "
        f"{show(text['distinct_4grams'])}; mean length {text['mean_characters']:.0f} characters. Measured only: "
        "the reports stand as the model wrote them."
    )
    return [_heading("Sections and text"), _table(rows), _text(faults)]
