"""What a folder of scans becomes: the files of each case, one table of all, and a page to look through.

    OUT/cases/NAME/report.txt        what may be shown: the system's notice, the text, 待核实 behind unsure sentences
                   report.json       input, model, findings, sentences with confidence, versions, seconds
                   overlay.nii.gz    the lesions on the scan's own grid, 1 the largest
                   figure.png        slices with the lesions outlined
                   *.dcm             with --dicom, for DICOM input (engine/reports/dicom_output.py)
    OUT/failed/NAME.json             a scan that cannot be read, and why; tried again by the next start
    OUT/reports.csv, reports.xlsx    a row for each scan
    OUT/index.html                   every case with its figure and report

A case's folder appears whole, by a rename: what a killed process leaves is no case.
"""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from openpyxl import Workbook
from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

from config.errors import InputError
from config.files import atomic_path, write_csv, write_text
from data.cache import file_digest, publish
from data.imaging.reader import FoundScan, files_of, read_header, read_volume, write_on_grid
from data.imaging.volume import turned
from data.lesions import lesion_numbers
from engine.evaluation.confidence import TO_CHECK
from engine.figures import draw_case
from engine.reporting import Reading, Reporter, WrittenReport
from engine.run import environment
from models.language_model.prefix_state import weights_fingerprint

FORMAT = 1
LONGEST = 150  # bytes of a part of a name; a file system's limit is 255, Windows' 260 characters for a whole path
COLUMNS = ("case", "image", "status", "report", "findings", "findings_prompt", "least_confidence", "to_be_verified")
_STYLE = """:root{color-scheme:light dark}body{font:15px/1.55 system-ui,sans-serif;margin:1.5em auto;max-width:1200px;
padding:0 1em}input{font:inherit;padding:.35em .6em;width:min(28em,90%)}section{border-top:1px solid #8886;
padding:.8em 0}h2{font-size:1.05em;margin:.2em 0}img{max-width:100%;border-radius:4px}p{white-space:pre-wrap;
margin:.5em 0}ul{margin:.3em 0}.failed h2{color:#d33}small{opacity:.75}mark{background:#ffd9a0;color:#000}"""
_SEARCH = """const box=document.querySelector('input');box.addEventListener('input',()=>{const wanted=
box.value.toLowerCase();for(const one of document.querySelectorAll('section'))one.hidden=
!one.textContent.toLowerCase().includes(wanted)});"""


# ------------------------------------------------------------------ one case


@dataclass(frozen=True)
class CaseFolder:
    """Where the files of one scan are, or will be. ``memory``: where digests of files are remembered."""

    scan: FoundScan
    out: Path
    memory: Path

    @property
    def path(self) -> Path:
        return self.out / "cases" / self._place

    @property
    def failure(self) -> Path:
        return self.out / "failed" / f"{self._place}.json"

    @property
    def _place(self) -> str:
        """The scan's name, whose parts a file system takes with what is added to them."""
        parts = self.scan.name.split("/")
        return "/".join(part if len(part.encode()) <= LONGEST else _shortened(part) for part in parts)

    def record(self) -> dict[str, Any] | None:
        """``report.json``; None before there is one."""
        file = self.path / "report.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def is_done(self) -> bool:
        """Whether there is a report of the scan as it is now; one of another content is removed."""
        record = self.record()
        if record is None:
            return False
        try:
            if record["input"]["digest"] == input_digest(self.scan.path, self.memory):
                return True
        except (InputError, OSError):  # reading it says why
            return False
        shutil.rmtree(self.path)
        return False

    def fail(self, reason: str) -> None:
        write_text(self.failure, json.dumps({"case": self.scan.name, "error": reason}, ensure_ascii=False))

    def write(
        self,
        reading: Reading,
        report: WrittenReport,
        about: Mapping[str, Any],
        scratch: Path,
        more: Callable[[Path, np.ndarray], object] | None = None,
    ) -> None:
        """Write every file of the case.

        Args:
            about: of every case alike: model and versions.
            scratch: folder on the same disk that no other process uses.
            more: writes further files into the folder, given the lesions of :func:`lesion_labels`.
        """
        labels, volume = lesion_labels(reading), read_volume(reading.image)
        record = self._record_of(reading, report, about)

        def fill(folder: Path) -> None:
            write_text(folder / "report.txt", report.full + "\n")
            write_on_grid(folder / "overlay.nii.gz", labels, reading.image)
            draw_case(folder / "figure.png", volume, labels)
            if more is not None:
                more(folder, labels)
            write_text(folder / "report.json", json.dumps(record, ensure_ascii=False, indent=1))

        publish(fill, self.path, scratch)
        self.failure.unlink(missing_ok=True)

    def _record_of(self, reading: Reading, report: WrittenReport, about: Mapping[str, Any]) -> dict[str, Any]:
        """``report.json``."""
        header = read_header(reading.image)
        return {
            "format": FORMAT,
            "case": self.scan.name,
            "input": {
                "digest": input_digest(reading.image, self.memory),
                "voxels": reading.volume.voxels,
                "shape": list(header.shape),
                "spacing_mm": [round(float(size), 6) for size in header.zooms],
                "affine": np.round(header.affine, 6).tolist(),
                "axes": header.axcodes,
            },
            "question": reading.questions[0],
            "findings_prompt": report.key_points,
            "notice": report.notice,
            "report": report.text,
            "marked": report.marked,
            "complete": report.tokens.ended,
            "sentences": [
                {
                    "text": one.text,
                    "confidence": one.confidence and round(one.confidence, 4),
                    "to_be_verified": one.unsure,
                    "states": [finding.to_dict() for finding in one.stated],
                }
                for one in report.sentences
            ],
            "measured": [finding.to_dict() for finding in reading.measured or []],
            "lesions_looked_for": reading.measured is not None,
            "believed": None if reading.believed is None else [finding.to_dict() for finding in reading.believed],
            "remarks": reading.facts,
            **about,
            "seconds": {
                name: round(value, 3) for name, value in [*reading.seconds.items(), ("writing", report.seconds)]
            },
        }


def _shortened(part: str) -> str:
    start = part.encode()[: LONGEST - 13].decode(errors="ignore")
    return f"{start}_{blake2b(part.encode(), digest_size=6).hexdigest()}"


def input_digest(path: Path, memory: Path) -> str:
    """BLAKE2b of the content of all files that decide the image; ``memory`` as of :func:`data.cache.file_digest`."""
    digest = blake2b(digest_size=20)
    for file in files_of(path):
        digest.update(file_digest(file, memory))
    return digest.hexdigest()


def lesion_labels(reading: Reading) -> np.ndarray:
    """The lesions of ``reading.measured`` on the scan's own grid, uint8 or int16 (z, y, x) in LPS: 1 is the first."""
    volume, count = reading.volume, len(reading.measured or [])
    if volume.mask is None:
        original = np.empty(3, int)
        original[list(volume.voxel_map.transpose_forward)] = volume.voxel_map.shape_before_crop
        restored = np.zeros(original, np.uint8)
    else:
        restored = volume.voxel_map.labels_to_original(np.asarray(volume.mask))
    numbered = lesion_numbers(turned(restored, volume.axcodes, "LPS"))
    sizes = np.bincount(numbered.ravel())[1:]
    order = np.zeros(len(sizes) + 1, np.uint8 if count < 256 else np.int16)
    # Findings are sorted by their volume, those of equal volume by their number.
    largest = np.argsort(-sizes, kind="stable")[:count]
    order[1 + largest] = np.arange(1, len(largest) + 1)  # one of a resampled mask may have vanished
    return order[numbered]


def about_run(reporter: Reporter) -> dict[str, Any]:
    """Model and versions, the same for every case of a run."""
    reader, checkpoint = reporter.reader, reporter.reader.checkpoint
    model = {
        "checkpoint": checkpoint.path.name,
        "digest": file_digest(checkpoint.path).hex(),
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "language_model": Path(reader.config.mamba_model).name,
        "language_model_weights": weights_fingerprint(reporter.lm.model),
        "segmentation_network": reader.cache.network,
        "visual_tokens": reader.config.max_visual_tokens,
        "slice_policy": reader.config.slice_policy,
        "confidence_calibrated": reporter.trust.calibrator is not None,
        "report_card": reporter.trust.verdict or None,
    }
    return {"model": model, "versions": environment()}


def check_same_run(out: Path, settings: Mapping[str, Any]) -> None:
    """Write OUT/run.json, or compare with what is there.

    Raises InputError: OUT holds reports that were made with other settings.
    """
    file, wanted = out / "run.json", json.loads(json.dumps(settings))
    if file.is_file():
        there = json.loads(file.read_text(encoding="utf-8"))
        other = next((key for key in wanted if there.get(key) != wanted[key]), None)
        if other:
            raise InputError(
                f"{out} holds reports that were made with {other} {there.get(other)!r}, now {wanted[other]!r}: give "
                "another OUT, or the same settings"
            )
        return
    write_text(file, json.dumps(wanted, ensure_ascii=False, indent=1))


# ------------------------------------------------------------------ all cases


def write_tables(out: Path, cases: Sequence[CaseFolder]) -> int:
    """Write ``reports.csv``, ``reports.xlsx`` and ``index.html``; how many cases have a report."""
    rows, parts = [], []
    for case in cases:
        record = case.record()
        rows.append(_row(case, record))
        parts.append(_section(case, record))
    write_csv(out / "reports.csv", [COLUMNS, *rows])
    book = Workbook()
    sheet = book.active
    for row in [COLUMNS, *rows]:
        sheet.append([ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell for cell in row])
        for cell in sheet[sheet.max_row]:
            if cell.data_type == "f":  # a text that begins with "=" is no formula
                cell.data_type = "s"
    sheet.freeze_panes = "B2"
    for column, width in zip("ABCDEFGH", (24, 24, 10, 90, 60, 40, 16, 16), strict=True):
        sheet.column_dimensions[column].width = width
    with atomic_path(out / "reports.xlsx") as part:
        book.save(part)
    done = sum(row[2] == "done" for row in rows)
    head = "<!doctype html><meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Reports"
    head += (
        f"</title><style>{_STYLE}</style><h1>{done} reports of {len(cases)} scans</h1><p>Generated by an algorithm, "
    )
    head += "verified by nobody: for research, no diagnosis.</p><input placeholder='Search / 查找' aria-label='Search'>"
    write_text(out / "index.html", "\n".join([head, *parts, f"<script>{_SEARCH}</script>"]))
    return done


def _row(case: CaseFolder, record: Mapping[str, Any] | None) -> list[Any]:
    name = case.scan.name
    if record is None:
        return [name, str(case.scan.path), "failed" if case.failure.is_file() else "waiting", _reason(case), *[""] * 4]
    sure = [one["confidence"] for one in record["sentences"] if one["confidence"] is not None]
    shown = f"{record['notice']}\n{record['marked']}" if record["notice"] else record["marked"]
    unsure = sum(one["to_be_verified"] for one in record["sentences"])
    findings = "; ".join(remark for remark in record["remarks"] if remark.startswith(("believed", "measured")))
    least = min(sure, default=None)
    return [name, str(case.scan.path), "done", shown, findings, record["findings_prompt"], least, unsure]


def _reason(case: CaseFolder) -> str:
    if not case.failure.is_file():
        return ""
    return json.loads(case.failure.read_text(encoding="utf-8"))["error"]


def _section(case: CaseFolder, record: Mapping[str, Any] | None) -> str:
    title = f"<h2>{html.escape(case.scan.name)}</h2>"
    if record is None:
        return f"<section class='failed'>{title}<p>{html.escape(_reason(case) or 'not read yet')}</p></section>"
    folder = quote(case.path.relative_to(case.out).as_posix())
    text = html.escape(f"{record['notice']}\n{record['marked']}".strip())
    text = re.sub("|".join(map(re.escape, TO_CHECK.values())), r"<mark>\g<0></mark>", text)
    remarks = "".join(f"<li>{html.escape(remark)}</li>" for remark in record["remarks"])
    links = ", ".join(f"<a href='{folder}/{name}'>{name}</a>" for name in ("report.json", "overlay.nii.gz"))
    return (
        f"<section>{title}<img loading='lazy' alt='' src='{folder}/figure.png'><p>{text}</p>"
        f"<details><summary><small>what was measured and checked; {links}</small></summary><ul>{remarks}</ul></details>"
        "</section>"
    )
