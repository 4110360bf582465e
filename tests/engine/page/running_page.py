"""A report page started as a user starts it, on the shipped model, and what a program sends to it."""

from __future__ import annotations

import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

REPOSITORY = Path(__file__).resolve().parents[3]
PHANTOM = REPOSITORY / "assets" / "demo" / "data" / "images" / "val_0000.nii.gz"
LONG_S = 120.0  # of a loaded machine
Event = dict[str, Any]


class Page:
    """A running page, and what a program asks of it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        command = [sys.executable, str(REPOSITORY / "scripts" / "report_page.py"), "--demo", "--port", "0", *flags]
        environment = {**os.environ, "TMPDIR": str(self.temporary), "TEMP": str(self.temporary), "PYTHONUTF8": "1"}
        self.log = (folder / "log.txt").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, env=environment, encoding="utf-8"
        )
        line = next((line for line in self.process.stdout if line.startswith("report page: ")), "")
        assert line, Path(self.log.name).read_text(encoding="utf-8")
        self.address = line.split()[2]
        self.port = int(self.address.rpartition(":")[2])
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def wait_until_ready(self) -> Event:
        deadline = time.monotonic() + LONG_S
        while time.monotonic() < deadline:
            status = json.loads(self.ask("GET", "/api/status")[1])
            if status["model"]:
                return status
            time.sleep(0.2)
        raise AssertionError(Path(self.log.name).read_text(encoding="utf-8"))

    def ask(
        self, method: str, path: str, body: bytes | Event | None = None, **headers: str
    ) -> tuple[int, bytes, http.client.HTTPMessage]:
        """Status, body and headers of an answer; ``x_file_name`` stands for ``x-file-name``."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_S)
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        given = {"x-report-page": "1"} | {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, content, {name: value for name, value in given.items() if value})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.headers

    def new_case(self) -> str:
        return json.loads(self.ask("POST", "/api/cases")[1])["case"]

    def read(self, files: dict[str, bytes] | None = None, **options: Any) -> str:
        """Start reading files, or the sample; returns the case."""
        case = self.new_case()
        for name, content in (files or {}).items():
            status, answer, _ = self.ask("PUT", f"/api/cases/{case}/files", content, x_file_name=name)
            assert status == 200, answer
        given = options if files is not None else {"sample": 0, **options}
        status, answer, _ = self.ask("POST", f"/api/cases/{case}/read", given)
        assert status == 202, answer
        return case

    def do(self, case: str, kind: str, **details: Any) -> list[Event]:
        """A job of a case that was read; returns its events."""
        before = len(self.events(case, of=None))
        status, answer, _ = self.ask("POST", f"/api/cases/{case}/{kind}", details)
        assert status == 202, answer
        return self.events(case, of=kind, after=before)

    def events(self, case: str, of: str | None = "read", after: int = 0, kind: str = "end") -> list[Event]:
        """Events until a job ends, or the first of a ``kind``; with ``of`` None those that are there."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONG_S if of else 0.4)
        path = f"/api/cases/{case}/events" + (f"?after={after - 1}" if after else "")
        connection.request("GET", path)
        found: list[Event] = []
        try:
            for line in connection.getresponse():
                if line.startswith(b"data: "):
                    found.append(json.loads(line[6:]))
                    if found[-1]["kind"] == kind and (kind != "end" or found[-1]["of"] == of):
                        break
        except TimeoutError:
            assert of is None, found
        finally:
            connection.close()
        return found

    def layer(self, case: str, name: str) -> np.ndarray:
        content = self.ask("GET", f"/api/cases/{case}/volumes/{name}.nii")[1]
        return np.asarray(nib.Nifti1Image.from_bytes(content).dataobj).transpose(2, 1, 0)

    def close(self) -> None:
        self.process.terminate() if os.name == "nt" else self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=30)


def one(events: list[Event], kind: str) -> Event:
    return [event for event in events if event["kind"] == kind][-1]


def dicom_series(slices: int, patient: str = "A", seed: int = 0) -> dict[str, bytes]:
    study, series, files = generate_uid(), generate_uid(), {}
    rng = np.random.default_rng(seed)
    for k in range(slices):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.2"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.PatientID, data.PatientName, data.Modality = patient, patient, "CT"
        data.StudyInstanceUID, data.SeriesInstanceUID, data.InstanceNumber = study, series, k
        data.ImagePositionPatient, data.ImageOrientationPatient = [0, 0, 5 * k], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.Rows, data.Columns = [2.5, 2.5], 64, 64
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        data.PixelData = rng.integers(-1000, 300, (64, 64), np.int16).tobytes()
        stream = io.BytesIO()
        pydicom.dcmwrite(stream, data)
        files[f"IM{k}"] = stream.getvalue()
    return files


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def abdomen() -> bytes:
    """A body of soft tissue in air, without lungs."""
    y, x = np.mgrid[:100, :100]
    body = ((y - 50) / 35) ** 2 + ((x - 50) / 42) ** 2 < 1
    noise = np.random.default_rng(0).normal(0, 12, (40, 100, 100))
    hu = np.where(body, 40, -1000) + noise
    return nib.Nifti1Image(hu.transpose(2, 1, 0).astype(np.int16), np.diag([3.5, 3.5, 6.0, 1.0])).to_bytes()


def promising(voxels_along_each_axis: int) -> bytes:
    """A header of that many voxels, and none behind it."""
    content = bytearray(nib.Nifti1Image(np.zeros((2, 2, 2), np.int16), np.eye(4)).to_bytes())
    content[40:48] = np.array([3, *[voxels_along_each_axis] * 3], "<i2").tobytes()
    return bytes(content)


def colours() -> bytes:
    rgb = np.zeros((20, 20, 20), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    return nib.Nifti1Image(rgb, np.eye(4)).to_bytes()


BAD_INPUT: dict[str, tuple[Callable[[], dict[str, bytes]], str]] = {
    "a text file": (lambda: {"report.txt": b"hello"}, "report.txt: no CT in it"),
    "an empty zip": (lambda: {"scan.zip": zipped({})}, "scan.zip: the zip is empty"),
    "a zip of two patients": (
        lambda: {"two.zip": zipped(dicom_series(3) | {f"b/{n}": c for n, c in dicom_series(3, "B").items()})},
        "images of 2 patients",
    ),
    "a 2-D DICOM": (lambda: dicom_series(1), "is a single image, expected a volume"),
    "a colour image": (lambda: {"colour.nii": colours()}, "colours"),
    "a picture": (lambda: {"photo.png": b"\x89PNG\r\n\x1a\n"}, "photo.png: no CT in it"),
    "a scan of the abdomen": (lambda: {"abdomen.nii": abdomen()}, "lung"),
    "a broken header": (lambda: {"broken.nii.gz": PHANTOM.read_bytes()[:700]}, "broken.nii.gz"),
    "a header of 10^13 voxels": (lambda: {"huge.nii": promising(30_000)}, "huge.nii: header announces"),
    "an .mha that names another file": (
        lambda: {"a.mha": b"ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementType = MET_SHORT\n"
                          b"ElementDataFile = /etc/passwd\n"},
        "a.mha: its voxels lie in another file",
    ),
    "an .nrrd that names another file": (
        lambda: {"a.nrrd": b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4 4 4\ndata file: ../../x.raw\n\n"},
        "a.nrrd: its voxels lie in another file",
    ),
}  # fmt: skip
