"""SR and SEG of a report: in the scan's own study, where the lesion is, unverified; a real server takes them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.uid import BasicTextSRStorage

from config.errors import InputError
from data.imaging.reader import read_volume
from engine.chain import SHIPPED_DEMO
from engine.reports.dicom_output import FILES, UNVERIFIED, DicomReport, DicomwebServer, dicom_report, source_slices
from engine.reports.files import lesion_labels
from tests.data.imaging.images import write_study

SCAN = SHIPPED_DEMO / "data" / "images" / "val_0000.nii.gz"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("study")
    shutil.copy(SHIPPED_DEMO / "data" / "cases.json", root)  # it is a phantom
    write_study(root / "patient", read_volume(SCAN))
    return root / "patient"


@pytest.fixture(scope="module")
def made(study, demo_reporter):
    """The series, its reading and its objects."""
    reading = demo_reporter.reader.read(study)
    [report] = demo_reporter.write([reading])
    return source_slices(study), reading, report, dicom_report(*_parts(study, reading, report))


def _parts(study, reading, report):
    return source_slices(study), reading, report, lesion_labels(reading), "0123456789abcdef"


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("objects")
    made[3].save(where)
    return where


def test_the_text_report_has_its_sections_and_says_who_made_it(made, folder):
    slices, reading, report, _ = made
    document = pydicom.dcmread(folder / FILES[0])
    assert document.SOPClassUID == BasicTextSRStorage == document.file_meta.MediaStorageSOPClassUID
    assert (document.VerificationFlag, document.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert document.StudyInstanceUID == slices[0].StudyInstanceUID and document.PatientID == "P1"
    assert str(document.PatientName) == "张^三" and document.AccessionNumber == "A1"
    assert document.SeriesInstanceUID != slices[0].SeriesInstanceUID
    values = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in document.ContentSequence}
    assert values["Observer Type"].ConceptCodeSequence[0].CodeMeaning == "Device"
    assert values["Comment"].TextValue == UNVERIFIED
    found = values["Findings"].ContentSequence[0].TextValue, values["Impressions"].ContentSequence[0].TextValue
    assert "空洞" in found[0] and "结论" not in found[0] and "空洞" in found[1]
    marks = sum(text.count("【待核实】") for text in found)
    assert marks == sum(sentence.unsure for sentence in report.sentences) > 0


def test_the_segmentation_lies_on_the_lesion(made, folder):
    slices, reading, _, _ = made
    segmentation = hd.seg.segread(folder / FILES[2])
    assert segmentation.number_of_segments == len(reading.measured) == 1
    assert segmentation.FrameOfReferenceUID == slices[0].FrameOfReferenceUID
    volume = segmentation.get_volume(combine_segments=True)
    centre = volume.affine @ [*np.argwhere(volume.array).mean(0), 1]
    lesion = reading.measured[0].measured
    dz, dy, dx = read_volume(SCAN).spacing
    assert np.allclose(centre[:3], [lesion.x * dx, lesion.y * dy, lesion.z * dz], atol=0.1)
    size = int(volume.array.sum()) * dz * dy * dx
    assert size == pytest.approx(lesion.volume_mm3, rel=1e-3)


def test_the_measurements_are_those_of_the_findings_and_name_their_segment(made, folder):
    _, reading, _, _ = made
    document = hd.sr.srread(folder / FILES[1])
    [group] = document.content.get_volumetric_roi_measurement_groups()
    values = {item.name.meaning: float(item.value) for item in group.get_measurements()}
    lesion = reading.measured[0]
    expected = {"Volume": lesion.measured.volume_mm3, "Long axis": lesion.size_mm}
    assert values == pytest.approx(expected | {"Attenuation Coefficient": lesion.measured.mean_hu}, abs=1e-2)
    [site] = group.finding_sites
    assert site.laterality.meaning.lower() == lesion.side == "right"
    [segment] = group.referenced_segment[0].ReferencedSOPSequence
    assert segment.ReferencedSOPInstanceUID == pydicom.dcmread(folder / FILES[2]).SOPInstanceUID
    assert segment.ReferencedSegmentNumber == 1


def test_without_lesions_there_is_no_segmentation(study, made):
    slices, reading, report, labels, version = _parts(study, *made[1:3])
    clean = type(reading)(reading.image, None, reading.questions, volume=reading.volume, measured=[])
    [text] = dicom_report(slices, clean, report, np.zeros_like(labels), version).objects
    assert text.SOPClassUID == BasicTextSRStorage


def test_a_report_written_again_is_the_same_object_and_another_text_another(study, made, demo_reporter):
    parts = _parts(study, *made[1:3])
    again = dicom_report(*parts)
    assert [one.SOPInstanceUID for one in again.objects] == [one.SOPInstanceUID for one in made[3].objects]
    [other] = demo_reporter.write([made[1]], ["已知：左肺下野结节12mm。"])
    changed = dicom_report(*parts[:2], other, *parts[3:])
    assert not {one.SOPInstanceUID for one in changed.objects} & {one.SOPInstanceUID for one in again.objects}


def test_an_anonymised_series_is_filed_and_one_without_a_study_refused(tmp_path, made):
    _, reading, report, _ = made
    gone = dict.fromkeys(("PatientName", "PatientBirthDate", "AccessionNumber", "StudyTime"))
    write_study(tmp_path / "a", read_volume(SCAN), **gone)
    slices = source_slices(tmp_path / "a")
    built = dicom_report(slices, reading, report, lesion_labels(reading), "1")
    built.save(tmp_path)
    assert pydicom.dcmread(tmp_path / FILES[0]).PatientName in ("", None)
    write_study(tmp_path / "b", read_volume(SCAN), FrameOfReferenceUID=None)
    with pytest.raises(InputError, match="has no FrameOfReferenceUID, .* leave out --dicom"):
        source_slices(tmp_path / "b")
    assert source_slices(SCAN) is None


@pytest.mark.skipif(not shutil.which("dciodvfy"), reason="dciodvfy is absent (Debian: apt install dicom3tools)")
@pytest.mark.parametrize("name", FILES)
def test_dciodvfy_finds_no_fault(folder, name):
    done = subprocess.run(["dciodvfy", folder / name], capture_output=True, encoding="utf-8", check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0 and not [line for line in lines if line.startswith(("Error", "Warning"))], lines


# ------------------------------------------------------------------ a real server

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory) -> Iterator[str]:
    """Orthanc with its DICOMweb plug-in, installed where that is possible; its address."""
    if not (shutil.which("Orthanc") and PLUGIN.is_file()):
        if not shutil.which("apt-get") or os.geteuid() != 0:
            pytest.skip("Orthanc is absent and cannot be installed (Debian: apt install orthanc orthanc-dicomweb)")
        install = "apt-get install -y --no-install-recommends orthanc orthanc-dicomweb"
        done = subprocess.run(install.split(), capture_output=True, encoding="utf-8", check=False, timeout=300)
        if done.returncode:
            pytest.skip(f"apt-get cannot install Orthanc: {(done.stderr.splitlines() or ['?'])[-1]}")
    root = tmp_path_factory.mktemp("orthanc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"StorageDirectory": str(root), "IndexDirectory": str(root), "HttpPort": port, "Plugins": [str(PLUGIN)]}
    settings |= {"DicomServerEnabled": False, "RemoteAccessAllowed": False, "AuthenticationEnabled": False}
    (root / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    server = subprocess.Popen(["Orthanc", root / "orthanc.json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/system"):
                break
            time.sleep(0.1)
        else:
            pytest.skip("Orthanc does not answer within 20 s")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def _json(url: str):
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def test_orthanc_takes_the_objects_into_the_study_once(made, study, orthanc):
    objects: DicomReport = made[3]
    server = DicomwebServer(f"{orthanc}/dicom-web")
    server.send([pydicom.dcmread(file) for file in sorted(study.glob("*.dcm"))])
    for _ in range(2):  # the second time nothing is added
        server.send(objects.objects)
    [one] = _json(f"{orthanc}/studies?expand")
    assert one["MainDicomTags"]["StudyInstanceUID"] == "1.2.3.1"
    series = [_json(f"{orthanc}/series/{name}") for name in one["Series"]]
    kinds = sorted(part["MainDicomTags"]["Modality"] for part in series)
    assert kinds == ["CT", "SEG", "SR", "SR"]
    assert sum(len(part["Instances"]) for part in series) == len(made[0]) + 3


def test_a_server_that_is_not_there_is_one_line(made):
    for address in ("localhost:8042", "http://"):
        with pytest.raises(InputError, match="expected the address"):
            DicomwebServer(address)
    with pytest.raises(InputError, match="took no report: .*send it again"):
        DicomwebServer("http://127.0.0.1:9/dicom-web").send(made[3].objects)


def test_a_lesion_that_was_called_false_is_not_filed(study, made):
    _, reading, report, _ = made
    parts = _parts(study, reading, report)
    [text] = dicom_report(*parts, stated=[]).objects
    assert text.SOPClassUID == BasicTextSRStorage
    [lesion] = reading.measured
    renamed = replace(lesion, finding="mass", size_mm=31.0)
    assert len(dicom_report(*parts, stated=[renamed]).objects) == 3
