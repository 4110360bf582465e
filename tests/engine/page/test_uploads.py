"""What a browser sends: limits, names, archives, and one scan or one clear line."""

from __future__ import annotations

import asyncio
import io
import struct
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from config.errors import InputError
from engine.page import uploads
from engine.page.uploads import TooLarge, Upload, arrange, check_size, in_users_words, shown_name


def slice_file(path: Path, patient: str = "A") -> None:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, "1.2.840.10008.5.1.4.1.1.2"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID, data.PatientName, data.Modality = patient, f"Name^{patient}", "CT"
    pydicom.dcmwrite(path, data)


class Sent:
    """Files as they were received."""

    def __init__(self, folder: Path, most_bytes: int = 1 << 20) -> None:
        folder.mkdir()
        self.upload = Upload(folder, most_bytes)

    def add(self, name: str, content: bytes, announced: int | None = None) -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(content), 1000):
                yield content[start : start + 1000]

        asyncio.run(self.upload.receive(name, announced, chunks()))

    def arrange(self) -> Path:
        return arrange(self.upload.folder, self.upload.names)


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sent:
    monkeypatch.setattr(uploads, "LEAST_FREE", 0)
    return Sent(tmp_path / "upload")


def zipped(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.nii.gz", r"C:\Windows\a.nii.gz", "/abs.nii.gz", "a\0b.nii.gz", "…/影像.nii.gz"]
)
def test_no_name_of_a_client_becomes_a_path(sent: Sent, name: str) -> None:
    sent.add(name, b"x")
    assert sent.arrange() == sent.upload.folder / "000000.nii.gz"
    assert [path.name for path in sent.upload.folder.parent.rglob("*")] == ["upload", "000000.nii.gz"]


def test_a_shown_name_is_short_and_printable() -> None:
    assert shown_name("a/b\\影像 1.nii") == "影像 1.nii"
    assert shown_name("\x1b[31mred\u202e.nii") == "?[31mred?.nii" and shown_name("") == "unnamed"
    assert len(shown_name("x" * 9999)) == uploads.NAME_LENGTH


def test_size_and_number_of_files_are_bounded_and_nothing_of_a_refused_file_stays(
    sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent.upload.most_bytes = 5000
    with pytest.raises(TooLarge, match="more than 0 MB"):
        sent.add("a.nii", b"x", announced=10**13)  # before a byte is read
    with pytest.raises(TooLarge):
        sent.add("a.nii", b"x" * 5001)  # that announced nothing
    assert not list(sent.upload.folder.iterdir()) and sent.upload.bytes == 0
    monkeypatch.setattr(uploads, "MOST_FILES", 2)
    sent.add("a.dcm", b"x" * 2500)
    sent.add("b.dcm", b"x" * 2500)
    with pytest.raises(TooLarge, match="more than 2 files"):
        sent.add("c.dcm", b"")


def test_a_full_disk_is_one_line(sent: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LEAST_FREE", 1 << 60)
    with pytest.raises(TooLarge, match="disk"):
        sent.add("a.nii", b"x")


def test_a_zip_of_a_series_becomes_a_folder_of_numbered_slices(sent: Sent, tmp_path: Path) -> None:
    slice_file(tmp_path / "s")
    content = (tmp_path / "s").read_bytes()
    members = {"../../up/IM1": content, "/abs/IM2": content, "__MACOSX/._IM1": b"x", "readme.txt": b"hello"}
    sent.add("study.zip", zipped(members))
    folder = sent.arrange()
    assert folder.parent == sent.upload.folder
    assert sorted(path.name for path in folder.iterdir()) == ["000000.dcm", "000001.dcm"]
    assert not list(sent.upload.folder.glob("*.zip")), "the archive is no longer needed"


def test_images_of_two_patients_are_refused(sent: Sent, tmp_path: Path) -> None:
    for number, patient in enumerate("AAB"):
        slice_file(tmp_path / "s", patient)
        sent.add(f"IM{number}", (tmp_path / "s").read_bytes())
    with pytest.raises(InputError, match="images of 2 patients"):
        sent.arrange()


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "nothing came"),
        ({"note.txt": b"hello"}, r"note\.txt: no CT in it; expected a chest CT as \.nii\.gz"),
        ({"picture.png": b"\x89PNG\r\n"}, r"picture\.png: no CT in it"),
        ({"a.nii": b"x", "b.nii.gz": b"x"}, r"2 scans in one upload \(a\.nii, b\.nii\.gz\)"),
        ({"a.nii.gz": b""}, r"a\.nii\.gz: file is empty"),
        ({"a.zip": b"no zip"}, r"a\.zip: is no readable zip"),
        ({"a.zip": zipped({})}, r"a\.zip: the zip is empty"),
        ({"a.zip": zipped({"b.zip": zipped({})})}, r"a\.zip: holds another zip"),
        ({"a.zip": zipped({"b.txt": b"hello"})}, r"b\.txt: no CT in it"),
        ({"a.zip": zipped({"a.nii": b"1"}), "b.nii": b"1"}, "a zip among them"),
        ({"a.zip": zipped({"a.nii": b"\0" * (1 << 28)})}, "would unpack to more than 100 times its size"),
    ],
)
def test_what_is_no_scan_is_one_line(sent: Sent, files: dict[str, bytes], line: str) -> None:
    for name, content in files.items():
        sent.add(name, content)
    with pytest.raises(InputError, match=line) as error:
        sent.arrange()
    assert "\n" not in str(error.value) and str(sent.upload.folder) not in str(error.value)


def test_a_zip_that_lies_about_its_sizes_is_cut(sent: Sent) -> None:
    """The central directory and the member's own header promise 10 bytes; the stream holds 300 MB."""
    honest = bytearray(zipped({"a.nii": b"\0" * (300 << 20)}))
    size = struct.pack("<I", 300 << 20)
    assert honest.count(size) == 2
    sent.add("a.zip", bytes(honest.replace(size, struct.pack("<I", 10))))
    with pytest.raises(InputError, match=r"a\.zip"):
        sent.arrange()
    assert sum(path.stat().st_size for path in sent.upload.folder.rglob("*") if path.is_file()) < 1 << 20


def test_an_encrypted_zip_is_refused(sent: Sent) -> None:
    content = bytearray(zipped({"a.nii": b"1234"}))
    content[6] |= 1  # the flag, in the member's header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    sent.add("a.zip", bytes(content))
    with pytest.raises(InputError, match="encrypted"):
        sent.arrange()


def test_a_scan_that_would_fill_the_memory_is_refused() -> None:
    check_size((512, 512, 1500))
    with pytest.raises(InputError, match="10000 x 10000 x 10000 voxels"):
        check_size((10_000,) * 3)


def test_a_line_has_the_users_names_and_no_path(tmp_path: Path) -> None:
    folder = tmp_path / "case" / "upload"
    folder.mkdir(parents=True)
    (folder / "000001.dcm").touch()
    nibabel_writes = (folder / "000001.dcm").as_posix()  # with slashes on Windows too
    line = f"{folder / '000001.dcm'}: pixels cannot be read\n(in {folder}): {nibabel_writes}; copy 000001.dcm again"
    assert in_users_words(line, tmp_path / "case", {"000001.dcm": "IM7"}, "study") == (
        "IM7: pixels cannot be read (in study): IM7; copy IM7 again"
    )


def test_files_that_come_together_are_counted_together_and_a_lost_one_leaves_nothing(sent: Sent) -> None:
    async def part(lost: bool) -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * 100
            await asyncio.sleep(0)
        if lost:
            raise ConnectionResetError

    async def together() -> list[BaseException | None]:
        jobs = (sent.upload.receive(f"{k}.dcm", None, part(lost=k == 1)) for k in range(3))
        return await asyncio.gather(*jobs, return_exceptions=True)

    first, second, third = asyncio.run(together())
    assert first is third is None and isinstance(second, ConnectionResetError)
    assert sent.upload.bytes == 600 and sorted(sent.upload.names.values()) == ["0.dcm", "2.dcm"]
    sent.add("3.dcm", b"x")
    assert len(list(sent.upload.folder.iterdir())) == 3
