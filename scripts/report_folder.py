"""A report for every scan of a folder, whatever their formats: text, JSON, overlay, figure, one table, one page.

    python scripts/report_folder.py d:/ct/new outputs/reports
    python scripts/report_folder.py d:/ct/new outputs/reports --dicom --stow http://localhost:8042/dicom-web
    python scripts/report_folder.py d:/ct/new outputs/reports --shard 2/4      the second of four machines
    accelerate launch scripts/report_folder.py d:/ct/new outputs/reports       each process takes its shard

IN is searched with all its subfolders: NIfTI, .mha, .mhd, .nrrd, and each series of DICOM files. What OUT holds stands
in engine/reports/files.py. It can be stopped at any moment and started again: finished cases are skipped. A scan that
cannot be read is reported in one line and tried again by the next start; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError, is_out_of_memory
from engine.cli import (
    Interrupted,
    Parser,
    add_force_flag,
    add_reading_flags,
    find_checkpoint,
    positive_int,
    run_main,
    shard,
    shard_of_environment,
)

EXIT_UNUSABLE = 1


def parse_args() -> argparse.Namespace:
    parser = Parser(description="A report for every scan of a folder")
    parser.add_argument("folder", type=Path, metavar="IN", help="folder of scans")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the reports")
    add_reading_flags(parser, llm_device="auto")
    parser.add_argument("--question", help="default: one of the prompt file")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="reports written together")
    parser.add_argument("--max_new_tokens", type=positive_int, default=300, help="a report is cut there")
    parser.add_argument("--llm_int8", action="store_true", help="int8 weights of the language model")
    parser.add_argument("--card", type=Path, help="report_card.json of this checkpoint: it calibrates the confidence")
    parser.add_argument("--mark_below", type=float, default=0.5, help="less sure sentences are marked to be verified")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="the I-th of N parts (default: RANK, WORLD_SIZE)")
    parser.add_argument("--dicom", action="store_true", help="for DICOM input, write SR and SEG objects too")
    parser.add_argument("--stow", metavar="URL", help="send them to this DICOMweb server")
    add_force_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config.files import write_text
from data.cache import file_digest
from data.imaging.reader import scans_below
from engine.reporting import Reading, Reporter, Trust, WrittenReport
from engine.reports.files import CaseFolder, about_run, check_same_run, write_tables
from engine.run import best_device

SENT = "sent.json"  # of a case whose objects the server has


def check_flags(args: argparse.Namespace) -> None:
    """Raises: InputError for a folder that is not there, or flags that contradict each other."""
    if not args.folder.is_dir():
        raise InputError(f"IN {args.folder}: no such folder; give the folder that holds the scans")
    if args.out.is_file():
        raise InputError(f"OUT {args.out} is a file: expected the name of a folder")
    if args.out.resolve() == args.folder.resolve():
        raise InputError("IN and OUT are the same folder: reports are written into a folder of their own")
    if not 0 <= args.mark_below <= 1:
        raise InputError(f"--mark_below {args.mark_below}: expected a confidence from 0 to 1")
    if args.stow and not args.dicom:
        raise InputError("--stow sends the objects that --dicom writes: add --dicom")
    if args.question == "":
        raise InputError("--question '': expected a question")


def load_reporter(args: argparse.Namespace) -> Reporter:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # of accelerate launch
    path = args.checkpoint or find_checkpoint(args.config)
    return Reporter.load(
        path,
        args.config,
        mamba_model=args.mamba_model,
        slice_policy=args.slice_policy,
        llm_device=best_device() if args.llm_device == "auto" else "cpu",
        llm_int8=args.llm_int8,
        allow_toy_model=args.allow_toy_model,
        max_new_tokens=args.max_new_tokens,
        trust=Trust.of_card(args.card, path, args.mark_below) if args.card else Trust(threshold=args.mark_below),
    )


def settings_of(args: argparse.Namespace, about: dict[str, Any]) -> dict[str, Any]:
    """What decides the files of a case: one OUT has one of each."""
    own = ("question", "batch_size", "max_new_tokens", "mark_below", "dicom", "force")
    card = file_digest(args.card).hex() if args.card else None
    return {"model": about["model"], "card": card} | {name: getattr(args, name) for name in own}


def _of_one_case(error: Exception) -> bool:
    """Whether the next scan may fare better: its file is locked or has vanished, not a full or read-only disk."""
    return isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class FolderRun:
    """The cases of one process, in groups that are written together.

    Groups are formed of all scans, before the shards: a report does not depend on how many processes there are, nor on
    where an earlier run was stopped.
    """

    def __init__(self, args: argparse.Namespace, reporter: Reporter, about: dict[str, Any]) -> None:
        self.args, self.reporter, self.about = args, reporter, about
        memory = reporter.reader.cache.root / "files"
        out = args.out.resolve()
        self.cases = [CaseFolder(scan, out, memory) for scan in scans_below(args.folder.resolve(), out)]
        self.index, self.count = args.shard or shard_of_environment()
        groups = [self.cases[k : k + args.batch_size] for k in range(0, len(self.cases), args.batch_size)]
        self.groups = groups[self.index - 1 :: self.count]
        self.scratch = out / f".scratch-{self.index}-of-{self.count}"
        self.failed = 0
        self.server = None
        if args.stow:
            from engine.reports.dicom_output import DicomwebServer

            self.server = DicomwebServer(args.stow)

    def __len__(self) -> int:
        return sum(map(len, self.groups))

    def run(self) -> None:
        """Write what is missing, with a progress bar."""
        shutil.rmtree(self.scratch, ignore_errors=True)  # of a run that was killed
        with tqdm(total=len(self), desc="reports", unit="case", dynamic_ncols=True, disable=None) as bar:
            for group in self.groups:
                missing = [case for case in group if not case.is_done()]
                if missing:
                    self._write(group, missing)
                for case in group:
                    if self.server and case not in missing:
                        self._send(case)
                bar.update(len(group))
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _write(self, group: Sequence[CaseFolder], missing: Sequence[CaseFolder]) -> None:
        """Read and write a whole group, as an undisturbed run does, and keep what was missing of it."""
        readings = {case: self._read(case) for case in missing}
        if not any(readings.values()):
            return
        readings |= {case: self._read(case) for case in group if case not in missing}
        whole = [(case, readings[case]) for case in group if readings[case] is not None]
        for case, reading, report in self._written(whole):
            if case in missing:
                self._keep(case, reading, report)
                if self.server:
                    self._send(case)

    def _read(self, case: CaseFolder) -> Reading | None:
        """None for a scan that cannot be read, which is reported."""
        try:
            if case.scan.problem:
                raise InputError(case.scan.problem)
            asked = [self.args.question] if self.args.question else []
            flags = {"own_question": bool(asked), "force": self.args.force}
            return self.reporter.reader.read(case.scan.path, None, asked, **flags)
        except (InputError, OSError, MemoryError, RuntimeError) as error:
            if not (isinstance(error, InputError) or is_out_of_memory(error) or _of_one_case(error)):
                raise
            self._fail(case, error)
            return None

    def _written(
        self, whole: Sequence[tuple[CaseFolder, Reading]]
    ) -> Iterator[tuple[CaseFolder, Reading, WrittenReport]]:
        """The reports of a group; one that cannot be written leaves the others theirs."""
        try:
            reports = self.reporter.write([reading for _, reading in whole])
        except InputError as error:
            if len(whole) == 1:
                self._fail(whole[0][0], error)
                return
            for one in whole:
                yield from self._written([one])
            return
        yield from ((case, reading, report) for (case, reading), report in zip(whole, reports, strict=True))

    def _fail(self, case: CaseFolder, error: Exception) -> None:
        reason = " ".join(str(error).split()) or "not enough memory"
        tqdm.write(f"error: {case.scan.name}: {reason}")
        case.fail(reason)
        self.failed += 1

    def _keep(self, case: CaseFolder, reading: Reading, report: WrittenReport) -> None:
        try:
            more = self._dicom_writer(reading, report) if self.args.dicom else None
            case.write(reading, report, self.about, self.scratch, more)
        except InputError as error:  # a series without the identifiers that --dicom needs
            self._fail(case, error)
        except OSError as error:
            if not _of_one_case(error):
                raise
            self._fail(case, error)

    def _dicom_writer(self, reading: Reading, report: WrittenReport) -> Callable[[Path, np.ndarray], object] | None:
        """What adds the DICOM objects to a case's folder; None for a scan of another format."""
        from engine.reports.dicom_output import dicom_report, source_slices

        slices = source_slices(reading.image)
        if slices is None:
            return None
        version = self.about["model"]["digest"][:16]
        return lambda folder, labels: dicom_report(slices, reading, report, labels, version).save(folder)

    def _send(self, case: CaseFolder) -> None:
        """Send the objects of a case, once."""
        import pydicom

        files = sorted(case.path.glob("*.dcm"))
        if not files or (case.path / SENT).is_file():
            return
        try:
            self.server.send([pydicom.dcmread(file) for file in files])
        except InputError as error:
            tqdm.write(f"error: {case.scan.name}: {error}")
            self.failed += 1
            return
        write_text(case.path / SENT, json.dumps({"server": self.server.url, "files": [file.name for file in files]}))


def main() -> int:
    args = parse_args()
    check_flags(args)
    reporter = load_reporter(args)
    about = about_run(reporter)
    run = FolderRun(args, reporter, about)
    if not run.cases:
        raise InputError(f"IN {args.folder}: holds no scan: expected NIfTI, .mha, .mhd, .nrrd or DICOM files")
    check_same_run(args.out, settings_of(args, about))
    part = f", shard {run.index} of {run.count}" if run.count > 1 else ""
    print(f"{len(run)} of {len(run.cases)} scans{part}, reports in {args.out}", flush=True)
    started = time.perf_counter()
    try:
        run.run()
    except KeyboardInterrupt:
        raise Interrupted("finished reports are kept; the same command goes on from here") from None
    done = write_tables(args.out, run.cases)
    seconds = time.perf_counter() - started
    print(
        f"reports of {done} of {len(run.cases)} scans, {run.failed} failed in this run, {seconds:.0f} s: "
        f"{args.out / 'index.html'}",
        flush=True,
    )
    return EXIT_UNUSABLE if run.failed else 0


if __name__ == "__main__":
    run_main(main)
