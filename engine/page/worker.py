"""The process that holds the models: scans, corrections, questions and maps come in, events go out.

It is a process of its own, so that a scan that kills it (memory, a defect of a library) takes neither the page nor the
other cases with it. It dies with the page, and removes the page's temporary files where that was killed.

    read    scan → ct.npy [z, y, x] int16 HU (LPS), lesions.npy, findings, report
    write   edited findings → report
    ask     question → answer, from the visual state that was kept
    map     a sentence of a report → map-REPORT-SENTENCE.npy [z, y, x] uint8 and its peak
    dicom   a report as a person left it → dicom.zip: SR and SEG, for a scan that came as DICOM
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config.errors import InputError, first_line
from config.files import atomic_path
from data.cache import file_digest
from data.findings import LESION, FindingRecord
from data.imaging.dicom import is_dicom
from data.imaging.reader import read_header, read_volume
from data.medical_vlm_dataset import encode_key_points
from data.report_language.key_points import MOST_MM, write_key_points
from data.report_language.sections import split_sentences
from data.report_language.terms import FINDINGS
from data.tables.caption_table import CaptionRow, read_caption_table
from engine import segmentation
from engine.chain import REPOSITORY
from engine.cli import force_utf8
from engine.evaluation.confidence import agrees, touches
from engine.evaluation.heat_maps import ViewGrid
from engine.evaluation.report_writer import token_spans
from engine.evaluation.saliency import ReportLikelihood, attribution_maps, lesion_cells, without_each_lesion
from engine.page.uploads import arrange, check_size, in_users_words
from engine.reporting import Reading, Reporter, Trust, WrittenReport, default_question, encode_questions
from engine.reports.files import lesion_labels
from engine.run import environment
from models.language_model.decoding import CharacterStream
from models.language_model.prefix_state import PrefixState, answer_from_state
from models.medical_vlm import generate_reports
from models.selective_scan import backend_name

PHANTOM = "phantom"  # in place of a sample's number
MAKE_PHANTOMS = REPOSITORY / "scripts" / "make_phantoms.py"
KEPT = 16  # cases whose state stays in memory, the latest ones
ANSWER_TOKENS = 200
SIDES, ZONES = ("left", "right", "bilateral"), ("upper", "middle", "lower")
Event = dict[str, Any]


@dataclass
class ReadCase:
    """A case that was read. ``findings``: as the page lists them, by their number; ``reports``: in their order, with
    the records that each was written from; ``state``: the language model's after the visual tokens."""

    folder: Path
    reading: Reading
    findings: list[FindingRecord] = field(default_factory=list)
    reports: list[tuple[WrittenReport, list[FindingRecord]]] = field(default_factory=list)
    state: PrefixState | None = None
    maps: dict[tuple[int, int], Event] = field(default_factory=dict)


class Worker:
    """A reporter, and the cases that it has read."""

    def __init__(self, settings: Mapping[str, Any], send: Callable[[str | None, Event], None]) -> None:
        """``settings``: of :mod:`scripts.report_page`. ``send``: of an event, with the case that it is about."""
        self.send = send
        names = ("config", "mamba_model", "slice_policy", "llm_device")
        trust = _trust(settings)
        options = {name: settings[name] for name in names} | {"max_new_tokens": settings["max_new_tokens"]}
        self.reporter = Reporter.load(settings["checkpoint"], trust=trust, **options)
        self.reader, self.lm = self.reporter.reader, self.reporter.lm
        self.settings, self.config = settings, self.reader.config
        self.cases: OrderedDict[str, ReadCase] = OrderedDict()

    def panel(self) -> Event:
        """What the page shows of the model, and the cases of the validation table."""
        checkpoint, config = self.reader.checkpoint, self.config
        rows = self._rows()
        return {
            "kind": "ready",
            "checkpoint": checkpoint.path.name,
            "digest": file_digest(checkpoint.path).hex()[:16],
            "stage": checkpoint.stage,
            "trained": f"epoch {checkpoint.epoch}, step {checkpoint.step}, val_loss {checkpoint.val_loss:.4f}",
            "language_model": Path(config.mamba_model).name,
            "language": self.reader.known.get("language") or "zh",
            "findings_prompt": config.findings_prompt,
            "config": {key: value for key, value in config.to_dict().items() if not _is_path(value)},
            "versions": environment(),
            "scan_backend": backend_name(self.reader.device.type),
            "device": str(self.reader.device),
            "verdict": self.reporter.trust.verdict,
            "calibrated": self.reporter.trust.calibrator is not None,
            "threshold": self.reporter.trust.threshold,
            "samples": [row.image_path.name for row in rows],
        }

    def _rows(self) -> list[CaptionRow]:
        """Of the validation table; none where there is no table to be read."""
        table = self.config.resolved("caption_csv_val") if self.config.caption_csv_val else None
        if table is None or not table.is_file():
            return []
        try:
            return read_caption_table(table, image_root=self.config.table_root, path_map=self.config.path_map)
        except InputError as error:  # a person's own scan needs none
            print(f"note: no cases of caption_csv_val to choose from: {error}", flush=True)
            return []

    # ------------------------------------------------------------------ jobs

    def run(self, job: Mapping[str, Any]) -> None:
        """One job; what goes wrong is an event, one line."""
        case, kind = job["case"], job["kind"]
        names = job.get("names", {})  # arrange adds the members of a zip
        try:
            getattr(self, kind)(job)
        except InputError as error:
            line = in_users_words(str(error), Path(job["folder"]), names, job.get("name", "the scan"))
            for value in filter(_is_path, self.config.to_dict().values()):  # of this machine, no user's business
                line = line.replace(value, Path(value).name)
            self.send(case, {"kind": "error", "of": kind, "line": line, "confirm": confirmable(line)})
        except Exception as error:  # noqa: BLE001  one case must not take the process with it
            traceback.print_exc()
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()
            line = f"the program failed at this ({type(error).__name__}: {first_line(error)}); the next scan works"
            self.send(case, {"kind": "error", "of": kind, "line": line})

    def read(self, job: Mapping[str, Any]) -> None:
        case, folder, names = job["case"], Path(job["folder"]), job["names"]
        begin, end = self._stages(case)
        begin("reading")
        image, mask, question, reference = self._scan_of(job, folder, names)
        check_size(read_header(image).shape)
        volume = read_volume(image, "LPS")
        np.save(folder / "ct.npy", np.clip(np.rint(volume.array), -32768, 32767).astype(np.int16))
        geometry = {
            "dicom": image.is_dir() or is_dicom(image),
            "shape": volume.array.shape,
            "spacing": volume.spacing,
            "affine": volume.affine.tolist(),
        }
        self.send(case, {"kind": "volume", "name": job["name"], "digest": file_digest(image).hex(), **geometry})
        del volume
        self.reader.allow_toy_model = bool(job["accept_toy"] or self.settings["allow_toy_model"])
        config = self.config.replace(cache_dir=str(folder / "cache"))  # nothing of a patient outlives the case
        self.reader.cache = segmentation.open_cache(config, self.reader.checkpoint.preprocess_plan)
        questions = [question] if question else []
        flags = {"own_question": bool(job["question"]), "force": bool(job["force"])}
        reading = self.reader.read(image, mask, questions, **flags, begin=begin)
        read = ReadCase(folder, reading)
        self.cases[case] = read
        while len(self.cases) > KEPT:
            self.cases.popitem(last=False)
        self._save_lesions(case, read)
        read.findings = [*(reading.believed or []), *reading.doubtful]
        ticked = len(reading.believed or [])
        listed = [describe(k, finding, k < ticked) for k, finding in enumerate(read.findings)]
        editable = self.config.findings_prompt != "off" and reading.believed is not None
        event = {"kind": "findings", "findings": listed, "editable": editable, "language": reading.language}
        self.send(case, event | {"facts": reading.facts, "question": reading.questions[0], "reference": reference})
        begin("writing")
        self._write(case, read, reading.key_points, list(reading.believed or []))
        end()

    def write(self, job: Mapping[str, Any]) -> None:
        read = self._case(job)
        records = [edited(one, read.findings) for one in job["findings"]]
        self._write(job["case"], read, write_key_points(records, read.reading.language), records, job["findings"])

    def ask(self, job: Mapping[str, Any]) -> None:
        case, read, number = job["case"], self._case(job), job["number"]
        tokenizer, device, reading = self.lm.tokenizer, self.lm.model.device, read.reading
        [question] = encode_questions([job["question"]], tokenizer, self.config)
        key_points = read.reports[-1][0].key_points  # as the user left them
        known = torch.tensor(encode_key_points(tokenizer, key_points), dtype=torch.long)
        ids = torch.cat([known, question])[None].to(device)
        batch = {"question_ids": ids, "question_mask": torch.ones_like(ids)}
        said = {"kind": "answer_text", "number": number}
        stream = CharacterStream(tokenizer, lambda text: self.send(case, {**said, "text": text}))
        self.send(case, {"kind": "question", "number": number, "text": job["question"]})
        if self.reader.vision.cmi is None:
            read.state = read.state or PrefixState.read(self.lm, reading.visuals[0].to(device))
            [text] = answer_from_state(self.lm, read.state, batch, ANSWER_TOKENS, streamer=stream)
        else:
            [text] = generate_reports(self.lm, self._steered(read, question), batch, ANSWER_TOKENS, streamer=stream)
        self.send(case, {"kind": "answer", "number": number, "text": text})

    def map(self, job: Mapping[str, Any]) -> None:
        case, read, key = job["case"], self._case(job), (job["report"], job["sentence"])
        if key not in read.maps:
            read.maps[key] = self._map(read, *key)
        self.send(case, {"kind": "map", "report": key[0], "sentence": key[1], **read.maps[key]})

    def dicom(self, job: Mapping[str, Any]) -> None:
        """Unverified SR and SEG in the scan's own study."""
        from engine.reports.dicom_output import FILES, dicom_report, source_slices  # highdicom takes seconds

        read = self._case(job)
        slices = source_slices(read.reading.image)
        if slices is None:
            raise InputError("a report can be filed in a study only for a scan that came as DICOM")
        if not 0 <= job["report"] < len(read.reports):
            raise InputError(f"there is no report {job['report']}")
        report, records = read.reports[job["report"]]
        if job["text"] != report.full.strip():
            # The marks stand in the text that a person has seen; the sentences are those of the generated one.
            report = replace(report, text=job["text"], marked=job["text"], notice="", sentences=())
        version = file_digest(self.reader.checkpoint.path).hex()[:16]
        stated = None if read.reading.believed is None else records
        made = dicom_report(slices, read.reading, report, lesion_labels(read.reading), version, stated)
        with tempfile.TemporaryDirectory(dir=read.folder) as folder:
            made.save(Path(folder))
            with atomic_path(read.folder / "dicom.zip") as part, zipfile.ZipFile(part, "w") as archive:
                for file in (Path(folder) / name for name in FILES):
                    if file.is_file():
                        archive.write(file, file.name)
        self.send(job["case"], {"kind": "file", "name": "dicom.zip"})

    def forget(self, job: Mapping[str, Any]) -> None:
        """Also removes what a job that ran meanwhile has written, or held open."""
        self.cases.pop(job["case"], None)
        shutil.rmtree(job["folder"], ignore_errors=True)

    # ------------------------------------------------------------------ parts of them

    def _case(self, job: Mapping[str, Any]) -> ReadCase:
        read = self.cases.get(job["case"])
        if read is None:
            raise InputError("this scan is no longer in memory (others came since, or reading failed): load it again")
        self.cases.move_to_end(job["case"])
        return read

    def _scan_of(
        self, job: Mapping[str, Any], folder: Path, names: dict[str, str]
    ) -> tuple[Path, Path | None, str, str]:
        """Image, mask, question and reference report of a job."""
        if job["sample"] is None:
            return arrange(folder / "upload", names), None, job["question"], ""
        if job["sample"] == PHANTOM:
            row = self._phantom(folder / PHANTOM, job["seed"])
            return row.image_path, None, job["question"] or default_question(row, self.config, 0), row.answer
        rows = self._rows()
        if not 0 <= job["sample"] < len(rows):
            raise InputError(f"case {job['sample']}: the validation table has cases 0 to {len(rows) - 1}")
        row = rows[job["sample"]]
        mask = row.mask_path if self.config.slice_policy == "mask" else None
        return row.image_path, mask, job["question"] or default_question(row, self.config, 0), row.answer

    def _phantom(self, folder: Path, seed: int) -> CaptionRow:
        """A synthetic case that nobody has seen, by the script that makes them."""
        language = self.reader.known.get("language") or "zh"
        command = [sys.executable, str(MAKE_PHANTOMS), "--out", str(folder), "--n_train", "0", "--n_val", "1"]
        command += ["--n_test", "0", "--workers", "1", "--seed", str(seed), "--language", language]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if done.returncode:
            raise InputError(f"make_phantoms.py failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        return read_caption_table(folder / "val.csv")[0]

    def _stages(self, case: str) -> tuple[Callable[[str], None], Callable[[], None]]:
        """Two functions: one begins a stage and ends the one before, the other ends the last one."""
        open_stages: list[tuple[str, float]] = []

        def end() -> None:
            for name, started in open_stages:
                self.send(case, {"kind": "stage_done", "name": name, "seconds": time.perf_counter() - started})
            open_stages.clear()

        def begin(name: str) -> None:
            end()
            open_stages.append((name, time.perf_counter()))
            self.send(case, {"kind": "stage", "name": name})

        return begin, end

    @torch.no_grad()
    def _steered(self, read: ReadCase, question: torch.Tensor) -> torch.Tensor:
        """Visual tokens (1, L', D) that CMI makes for the ids (Lq,) of a question."""
        vision, device = self.reader.vision, self.reader.device
        position, roi = (part[None].to(device) for part in read.reading.view[1:])
        asked = self.lm.embed(question[None].to(self.lm.model.device)).float().to(device)
        mask = torch.ones_like(question)[None].to(device)
        seen = vision.visual_tokens(read.reading.features[None].to(device), position, roi)
        return vision.steer(seen, asked, mask).to(self.lm.model.device)

    def _save_lesions(self, case: str, read: ReadCase) -> None:
        volume = read.reading.volume
        if volume.mask is None:
            return
        lps = (lesion_labels(read.reading) > 0).astype(np.uint8)
        np.save(read.folder / "lesions.npy", lps)
        self.send(case, {"kind": "layer", "name": "lesions", "any": bool(lps.any())})

    def _write(
        self, case: str, read: ReadCase, key_points: str, records: list[FindingRecord], ticked: object = None
    ) -> None:
        """``ticked``: the findings as a person has left them."""
        number, started, first, streamed = len(read.reports), time.perf_counter(), [], []

        def write(text: str) -> None:
            first.append(time.perf_counter() - started)
            streamed.append(text)
            self.send(case, {"kind": "text", "report": number, "text": text})

        begun = {"kind": "writing", "report": number, "key_points": key_points, "ticked": ticked}
        self.send(case, begun | {"notice": read.reading.notice})
        stream = CharacterStream(self.lm.tokenizer, write)
        torch.manual_seed(0)
        [report] = self.reporter.write([read.reading], [key_points], streamer=stream)
        read.reports.append((report, records))
        sentences = [
            {
                "text": one.text,
                "confidence": one.confidence,
                "unsure": one.unsure,
                "stated": [mention.describe() for mention in one.stated],
                "place": place_of(one.stated, records),
            }
            for one in report.sentences
        ]
        seconds = {"seconds": report.seconds, "first_character": first[0] if first else None}
        event = {"kind": "report", "report": number, "text": report.text, "marked": report.full, **seconds}
        said = [record.to_dict() for record in records]
        self.send(case, event | {"sentences": sentences, "key_points": key_points, "findings": said,
                                 "notice": report.notice, "cut": not report.tokens.ended,
                                 "rewritten": "".join(streamed) != report.text})  # fmt: skip

    def _map(self, read: ReadCase, number: int, sentence: int) -> Event:
        """Evidence for the words of a sentence, beside the mean features of the training cases."""
        if not 0 <= number < len(read.reports) or not 0 <= sentence < len(read.reports[number][0].sentences):
            raise InputError(f"report {number} has no sentence {sentence}")
        (report, records), reading = read.reports[number], read.reading
        if self.lm.model.device.type != self.reader.device.type:
            raise InputError("maps need vision and language model on one device: start without --llm_device")
        words = [span for one in report.statements if one.sentence == sentence for span in one.words]
        pieces = split_sentences(report.text)
        start = sum(map(len, pieces[:sentence]))
        words = words or [(start, start + len(pieces[sentence].rstrip()))]
        spans = token_spans(self.lm.tokenizer, report.tokens.ids)
        tokens = [k for k, span in enumerate(spans) if touches(span, words)]
        grid = ViewGrid.of(self.reader.selection, reading.volume, tuple(reading.features[:, 0].shape))
        lesions, without = without_each_lesion(records)
        lines = [report.key_points, *(write_key_points(rest, reading.language) for rest in without)]
        images, position, roi = (part[None].to(self.reader.device) for part in reading.view)
        shown = {"images": images, "slice_position": position, "roi": roi}
        batches = [shown | dict(self.reporter.batch([reading], [line])) for line in lines]
        likelihood = ReportLikelihood(self.reporter.writer.model, batches[0], report.tokens.ids, batches[1:])
        cells = lesion_cells(reading.volume, grid, lesions)
        baseline = self._baseline(reading.features.to(self.reader.device))
        heat = attribution_maps(likelihood, [tokens], baseline, "evidence", cells)[0].numpy()
        laid = grid.lay_over(heat)
        strongest = float(laid.max())
        name = f"map-{number}-{sentence}"
        scaled = np.clip(laid / strongest, 0, 1) if strongest > 0 else np.zeros_like(laid)
        np.save(read.folder / f"{name}.npy", np.rint(255 * scaled).astype(np.uint8))
        return {"layer": name, "peak": [int(i) for i in np.unravel_index(int(laid.argmax()), laid.shape)]}

    def _baseline(self, features: torch.Tensor) -> torch.Tensor:
        """(K, C, T, T): each channel at its mean over the training cases, or where they are not known over this one."""
        known = self.reader.known.get("feature_distance")
        channels = features.shape[1]
        mean = known["mean"][:channels].to(features) if known else features.mean((0, 2, 3))
        return mean[None, :, None, None].expand_as(features).contiguous()


def describe(number: int, finding: FindingRecord, ticked: bool) -> Event:
    """A finding as the page lists it."""
    m = finding.measured
    return {
        "id": number,
        "on": ticked,
        "finding": finding.finding,
        "side": finding.side,
        "zone": finding.level,
        "size_mm": None if finding.size_mm is None else round(finding.size_mm, 1),
        "probability": finding.probability,
        "measured": m is not None,
        "volume_ml": None if m is None else m.volume_mm3 / 1000,
        "mean_hu": None if m is None else m.mean_hu,
        "place": None if m is None else [round(m.z), round(m.y), round(m.x)],
    }


def edited(given: Mapping[str, Any], listed: list[FindingRecord]) -> FindingRecord:
    """A finding of the page's list as the user left it. Raises InputError for a value that none can have."""
    finding, side, zone, size = (given.get(name) for name in ("finding", "side", "zone", "size_mm"))
    if finding not in (*FINDINGS, LESION):
        raise InputError(f"'{str(finding)[:40]}' is no known finding")
    if side not in (None, *SIDES) or zone not in (None, *ZONES):
        raise InputError(f"{finding}: side {str(side)[:20]} or zone {str(zone)[:20]} is not known")
    if size is not None and not (isinstance(size, int | float) and 1 <= size <= MOST_MM):
        raise InputError(f"{finding}: size {str(size)[:20]}, expected 1 to {MOST_MM} mm")
    number = given.get("id")
    if not (isinstance(number, int) and 0 <= number < len(listed)):
        return FindingRecord(finding, side=side, zone=zone, size_mm=size)
    known = listed[number]
    changes = {"finding": finding, "side": side, "size_mm": size}
    if zone != known.level:
        changes |= {"zone": zone, "lobe": None}
    if (side, zone) != (known.side, known.level):  # it is another lesion than the measured one
        changes["measured"] = None
    return replace(known, **changes)


def place_of(stated: tuple[FindingRecord, ...], records: list[FindingRecord]) -> list[int] | None:
    """Where the measured lesion lies that a sentence states: z, y, x in voxels of the scan."""
    for mention in stated:
        for record in records:
            if record.measured is not None and mention.polarity != "absent" and agrees(mention, record, size=False):
                return [round(record.measured.z), round(record.measured.y), round(record.measured.x)]
    return None


def confirmable(line: str) -> str | None:
    """Which confirmation lets the page go on after an error."""
    for kind, flag in (("force", "--force"), ("accept_toy", "--allow_toy_model")):
        if flag in line:
            return kind
    return None


def _trust(settings: Mapping[str, Any]) -> Trust | None:
    """Of the report card that was named, or that the quick start or the night put beside the checkpoint."""
    checkpoint = Path(settings["checkpoint"])
    if settings["card"]:
        return Trust.of_card(Path(settings["card"]), checkpoint)
    found = (checkpoint.parent / name / "report_card.json" for name in ("card", "overnight_card"))
    for beside in filter(Path.is_file, found):
        try:
            card = json.loads(beside.read_text(encoding="utf-8"))
            if "digest" in card or Path(card["checkpoint"]).resolve() == checkpoint.resolve():
                return Trust.of_card(beside, checkpoint)
        except (InputError, ValueError, KeyError, TypeError) as why:
            print(f"note: {beside} is not used: {first_line(why)}", flush=True)
    return None


def _is_path(value: object) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def serve(settings: Mapping[str, Any], connection: Connection, root: Path) -> None:
    """The process: jobs until the page closes its end, or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the page says when to end
    force_utf8()

    def send(case: str | None, event: Event) -> None:
        connection.send((case, event))

    try:
        worker = Worker(settings, send)
        send(None, worker.panel())
        while True:
            job = connection.recv()
            worker.run(job)
            send(job["case"], {"kind": "end", "of": job["kind"]})
    except InputError as error:
        send(None, {"kind": "failed", "line": " ".join(str(error).split())})
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the page is gone, killed perhaps
        shutil.rmtree(root, ignore_errors=True)
