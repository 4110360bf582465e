"""A folder of scans to reports: bad ones are one line, any stop goes on to the same files, shards make the whole."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openpyxl
import pydicom
import pytest

from config.errors import InputError
from data.imaging.reader import FoundScan, read_header, read_mask, read_volume
from data.phantom.dataset import make_dataset
from engine.chain import SHIPPED_DEMO
from engine.cli import Interrupted
from engine.reporting import Reporter, ScanReader
from engine.reports import files as report_files
from engine.reports.dicom_output import FILES
from engine.reports.files import CaseFolder
from scripts import report_folder
from tests.data.imaging.images import write_itk, write_study

CASES = 3
SCRIPT = Path(report_folder.__file__)
CHECKPOINT = SHIPPED_DEMO / "vision_bridge_vlm.pt"


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """Phantoms as NIfTI, one as .mha, one as a DICOM series, and a broken file."""
    root = tmp_path_factory.mktemp("scans")
    data = make_dataset(root / "made", 0, 0, CASES, seed=3, workers=1)
    shutil.copy(data.cases_json, root)
    inside = root / "images"
    (root / "made" / "images").rename(inside)
    first, second, *_ = sorted(inside.glob("*.nii.gz"))
    write_itk(inside / "other.mha", read_volume(first).array)
    write_study(inside / "patient", read_volume(second))
    shutil.copy(data.cases_json, inside)  # the series lies one folder deeper
    (inside / "broken.nii.gz").write_bytes(gzip.compress(b"no scan"))
    return inside


@pytest.fixture(scope="module")
def load(demo_reporter) -> Callable:
    return lambda args: demo_reporter


def run(scans: Path, out: Path, load: Callable, *flags: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_folder, "load_reporter", load)
        patch.setattr(
            sys, "argv", [str(SCRIPT), str(scans), str(out), "--batch_size", "2", "--max_new_tokens", "200", *flags]
        )
        return report_folder.main()


def files(out: Path) -> dict[str, object]:
    """What was written, without what no two runs have in common: times, and what openpyxl says of them."""
    found: dict[str, object] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out).as_posix()
        if name.endswith("report.json"):
            record = json.loads(path.read_text(encoding="utf-8"))
            assert min(record.pop("seconds").values()) > 0
            found[name] = record
        elif name.endswith(".xlsx"):
            found[name] = [row for row in openpyxl.load_workbook(path).active.iter_rows(values_only=True)]
        elif name.endswith(".dcm"):
            lines = str(pydicom.dcmread(path)).splitlines()
            found[name] = [line for line in lines if not re.search("(Creation|Content|Contribution) (Date|Time)", line)]
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(scans, load, tmp_path_factory) -> Path:
    """OUT of an undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(scans, out, load, "--dicom") == report_folder.EXIT_UNUSABLE  # of the broken file
    return out


def test_every_scan_has_its_files_and_a_bad_one_a_line(whole, scans, capsys):
    names = [f"test_{k:04d}.nii.gz" for k in range(CASES)]
    cases = {record["case"]: record for name, record in files(whole).items() if name.endswith("report.json")}
    [series] = [name for name in cases if name.startswith("patient/")]
    assert set(cases) == {*names, "other.mha", series}
    plain = {"report.txt", "report.json", "overlay.nii.gz", "figure.png"}
    for name, record in cases.items():
        folder = whole / "cases" / name
        assert {file.name for file in folder.iterdir()} == plain | (set(FILES) if name == series else set())
        text = (folder / "report.txt").read_text(encoding="utf-8")
        assert record["marked"] in text and "所见" in text
        assert "".join(sentence["text"] for sentence in record["sentences"]) == record["report"]
    twin = cases["test_0001.nii.gz"]
    assert cases[series]["report"] == twin["report"] and cases[series]["input"]["axes"] == "LPS"
    reason = json.loads((whole / "failed" / "broken.nii.gz.json").read_text(encoding="utf-8"))["error"]
    assert "broken.nii.gz" in reason and "\n" not in reason


def test_the_table_and_the_page_hold_every_case(whole):
    with (whole / "reports.csv").open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == CASES + 3 and [row["status"] for row in rows].count("failed") == 1
    sheet = openpyxl.load_workbook(whole / "reports.xlsx").active
    cells = [["" if cell is None else str(cell) for cell in row] for row in sheet.iter_rows(values_only=True)]
    assert cells[0] == list(rows[0]) and [row[3] for row in cells[1:]] == [row["report"] for row in rows]
    page = (whole / "index.html").read_text(encoding="utf-8")
    assert page.count("<section") == len(rows) and "http" not in page
    for row in rows:
        assert row["case"] in page


def test_the_overlay_lies_on_the_scan_and_numbers_the_lesions(whole, scans):
    seen = 0
    for name in ("test_0000.nii.gz", "test_0001.nii.gz", "other.mha"):
        overlay, scan = whole / "cases" / name / "overlay.nii.gz", scans / name
        record = json.loads((overlay.parent / "report.json").read_text(encoding="utf-8"))
        assert np.allclose(read_header(overlay).affine, read_header(scan).affine, atol=1e-4)
        labels = read_mask(overlay, read_volume(scan))
        voxel = float(np.prod(read_volume(scan).spacing))
        sizes = [np.count_nonzero(labels == k) * voxel for k in range(1, labels.max() + 1)]
        assert sizes == pytest.approx([lesion["measured"]["volume_mm3"] for lesion in record["measured"]], rel=1e-3)
        seen += len(sizes)
    assert seen


def test_a_run_stopped_at_any_point_goes_on_to_the_same_files(scans, load, whole, tmp_path, monkeypatch):
    """Stopped in the middle of writing a case, as by kill -9: what lies half-written is no case, and goes."""
    publish, out, stops = report_files.publish, tmp_path / "out", (1, 0, 2)
    for left in stops:
        kept = []

        def stop(fill: Callable, entry: Path, scratch: Path, left: int = left, kept: list = kept) -> None:
            if len(kept) == left:
                (scratch / ".tmp-killed").mkdir(parents=True)
                fill(scratch / ".tmp-killed")
                raise KeyboardInterrupt
            kept.append(entry)
            publish(fill, entry, scratch)

        with monkeypatch.context() as patch:
            patch.setattr(report_files, "publish", stop)
            with pytest.raises(Interrupted, match="the same command goes on from here"):
                run(scans, out, load, "--dicom")
    written = []
    monkeypatch.setattr(report_files, "publish", lambda *given: written.append(given[1]) or publish(*given))
    run(scans, out, load, "--dicom")
    assert len(written) == CASES + 2 - sum(stops), "no case is written twice"
    assert files(out) == files(whole)


def test_shards_make_the_files_of_one_run(scans, load, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(scans, out, load, "--dicom", "--shard", "1/2")
    done = len(list(out.glob("cases/**/report.json")))
    assert 0 < done < CASES + 2
    monkeypatch.setenv("RANK", "1")  # as accelerate launch does
    monkeypatch.setenv("WORLD_SIZE", "2")
    run(scans, out, load, "--dicom")
    assert files(out) == files(whole)


def test_nothing_is_written_again_for_a_scan_that_stays_broken(scans, load, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    monkeypatch.setattr(Reporter, "write", None)
    assert run(scans, out, load, "--dicom") == report_folder.EXIT_UNUSABLE
    assert files(out) == files(whole)


def test_a_changed_scan_is_read_again_and_other_settings_need_another_folder(scans, load, whole, tmp_path):
    out, copy = tmp_path / "out", tmp_path / "images"
    shutil.copytree(whole, out)
    shutil.copytree(scans, copy)
    shutil.copy(scans.parent / "cases.json", tmp_path)
    shutil.copy(copy / "test_0002.nii.gz", copy / "test_0000.nii.gz")
    (copy / "broken.nii.gz").unlink()
    assert run(copy, out, load, "--dicom") == 0
    one, two = ((out / "cases" / f"test_000{k}.nii.gz" / "overlay.nii.gz").read_bytes() for k in (0, 2))
    assert one == two
    with pytest.raises(InputError, match="made with dicom True, now False: give another OUT"):
        run(copy, out, load)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--stow", "http://localhost/dicom-web"], "add --dicom"),
        (["--mark_below", "2"], "--mark_below 2.0"),
        (["--question", ""], "--question ''"),
    ],
)
def test_flags_that_cannot_be_are_one_line(scans, load, tmp_path, flags, named):
    with pytest.raises(InputError, match=named):
        run(scans, tmp_path / "out", load, *flags)


def test_an_empty_folder_and_a_missing_one_are_one_line(load, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no scan"):
        run(tmp_path / "empty", tmp_path / "out", load)
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out", load)


@pytest.mark.minutes
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_9_loses_nothing(scans, load, demo_config, whole, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), str(scans), str(out), "--batch_size", "2", "--dicom"]
    command += ["--checkpoint", str(CHECKPOINT), "--config", str(demo_config), "--max_new_tokens", "200"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(out.glob("cases/**/report.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run(scans, out, load, "--dicom") == report_folder.EXIT_UNUSABLE
    assert files(out) == files(whole)


def test_a_series_that_cannot_have_dicom_objects_does_not_end_the_run(scans, load, tmp_path, capsys):
    mixed = tmp_path / "scans"
    first = sorted(scans.glob("*.nii.gz"))[1]
    write_study(mixed / "nameless", read_volume(first), FrameOfReferenceUID=None)
    shutil.copy(first, mixed)
    shutil.copy(scans / "cases.json", mixed)
    assert run(mixed, tmp_path / "out", load, "--dicom") == report_folder.EXIT_UNUSABLE
    [failed] = (tmp_path / "out" / "failed").rglob("*.json")
    assert "has no FrameOfReferenceUID" in failed.read_text(encoding="utf-8")
    assert (tmp_path / "out" / "cases" / first.name / "report.txt").is_file()


def test_a_locked_file_is_one_line_and_a_full_disk_ends_the_run(scans, load, tmp_path, monkeypatch, capsys):
    def locked(number):
        def read(self, path, *_, **__):
            raise OSError(number, os.strerror(number), str(path))

        return read

    monkeypatch.setattr(ScanReader, "read", locked(errno.EACCES))
    assert run(scans, tmp_path / "out", load) == report_folder.EXIT_UNUSABLE
    assert capsys.readouterr().out.count("Permission denied") >= 3
    monkeypatch.setattr(ScanReader, "read", locked(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        run(scans, tmp_path / "out", load)


def test_long_names_are_shortened_and_stay_different(tmp_path):
    names = ["病" * 79 + f"{k}.nii.gz" for k in range(2)]
    cases = [CaseFolder(FoundScan(tmp_path / name, f"a/{name}"), tmp_path / "out", tmp_path) for name in names]
    for case in cases:
        case.fail("no")
        case.path.mkdir(parents=True)
    assert len({case.path for case in cases}) == len({case.failure for case in cases}) == 2


def test_a_report_that_cannot_be_written_leaves_the_others_theirs(scans, load, whole, tmp_path, monkeypatch, capsys):
    real = Reporter.write

    def write(self, readings):
        if any("test_0001" in str(reading.image) for reading in readings):
            raise InputError("a size of 1916 mm, expected up to 500 mm")
        return real(self, readings)

    monkeypatch.setattr(Reporter, "write", write)
    assert run(scans, tmp_path / "out", load, "--dicom") == report_folder.EXIT_UNUSABLE
    assert "test_0001.nii.gz: a size of 1916 mm" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out" / "cases").iterdir()}
    assert written == {path.name for path in (whole / "cases").iterdir()} - {"test_0001.nii.gz"}
