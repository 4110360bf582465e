"""A report as a file: text, Word, JSON."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

RESEARCH_USE = {
    "zh": "仅供科研使用，不是诊断。本文由算法生成，须由医师核实。",
    "en": "For research use, not a diagnosis. Written by an algorithm, to be verified by a physician.",
}
_TITLES = {"zh": "胸部CT报告", "en": "Chest CT report"}
_DETAILS = {"zh": ("影像", "模型"), "en": ("Scan", "Model")}
_CONTROLS = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # that XML 1.0 cannot hold
FORMATS = {
    "txt": "text/plain; charset=utf-8",
    "docx": "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
    "json": "application/json",
}
Event = Mapping[str, Any]


def export(kind: str, text: str, events: Sequence[Event], panel: Event, language: str) -> bytes:
    """The report ``text``, as a person left it, with what it was made from.

    Args:
        kind: a key of :data:`FORMATS`.
        events: of the case.
        panel: of the model.
        language: of the frame, "zh" or "en".
    """
    name = _last(events, "volume").get("name", "")
    model = f"{panel['checkpoint']} ({panel['digest']}), {panel['language_model']}"
    if kind == "txt":
        # Windows' editors know UTF-8 by its mark.
        return ("\ufeff" + "\n\n".join([text.strip(), f"{name} · {model}", RESEARCH_USE[language]]) + "\n").encode()
    if kind == "json":
        return json.dumps(record(text, events, panel), ensure_ascii=False, indent=1).encode()
    return _docx(text, name, model, language)


def record(text: str, events: Sequence[Event], panel: Event) -> dict[str, Any]:
    """All that is known of a report, as JSON values. Times in seconds."""
    volume, report = _last(events, "volume"), _last(events, "report")
    stages = {event["name"]: event["seconds"] for event in events if event["kind"] == "stage_done"}
    generated = report.get("text", "")
    return {
        "report": text,
        "generated": generated,
        "edited": text.strip() != str(report.get("marked", "")).strip(),
        "research_use": RESEARCH_USE,
        "input": {key: volume.get(key) for key in ("name", "digest", "shape", "spacing", "affine")},
        "model": {
            key: panel[key] for key in ("checkpoint", "digest", "language_model", "versions", "scan_backend", "device")
        },
        "facts": _last(events, "findings").get("facts", []),
        "findings": report.get("findings", []),
        "findings_prompt": report.get("key_points", ""),
        "sentences": report.get("sentences", []),
        "confidence_calibrated": panel["calibrated"],
        "seconds": {**stages, "first_character": report.get("first_character")},
    }


def _last(events: Sequence[Event], kind: str) -> Event:
    return next((event for event in reversed(events) if event["kind"] == kind), {})


def _docx(text: str, name: str, model: str, language: str) -> bytes:
    import docx
    from docx.oxml.ns import qn
    from docx.shared import Pt

    document = docx.Document()
    style = document.styles["Normal"]
    style.font.name, style.font.size = "Calibri", Pt(11)
    style.element.rPr.rFonts.set(qn("w:eastAsia"), "Microsoft YaHei")
    document.core_properties.title, document.core_properties.author = _TITLES[language], ""
    document.add_heading(_TITLES[language], 1)
    for line in text.strip().splitlines():
        document.add_paragraph(_CONTROLS.sub("", line))
    table = document.add_table(rows=2, cols=2, style="Light List Accent 1")
    for row, (label, value) in zip(table.rows, zip(_DETAILS[language], (name, model), strict=True), strict=True):
        row.cells[0].text, row.cells[1].text = label, _CONTROLS.sub("", value)
    document.add_paragraph().add_run(RESEARCH_USE[language]).bold = True
    stream = io.BytesIO()
    document.save(stream)
    return stream.getvalue()
