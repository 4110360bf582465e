"""Atomic writing: a file is the old one or the new one, whatever interrupts the writer."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from config import files
from config.files import atomic_path, keep_previous, write_text
from config.schema import REPOSITORY


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "x.nii.gz").write_bytes(b"old")
    return tmp_path / "x.nii.gz"


def test_text_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "deep" / "报告.txt", "所见\r\n")
    assert (tmp_path / "new" / "deep" / "报告.txt").read_bytes() == "所见\r\n".encode()
    assert len(list((tmp_path / "new" / "deep").iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["while it is written", "when it is renamed"])
def test_an_exception_leaves_the_old_file_and_nothing_else(
    target: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], where: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    if where == "when it is renamed":
        monkeypatch.setattr(files, "replace", fail)
    with pytest.raises(error), atomic_path(target) as part:
        assert part.name.endswith(".nii.gz"), "libraries choose the format by the suffix"
        part.write_bytes(b"new")
        if where == "while it is written":
            fail()
    assert target.read_bytes() == b"old" and list(target.parent.iterdir()) == [target]


def test_a_process_that_dies_in_the_middle_leaves_the_old_file(target: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from config import files\n"
        "files.os.fsync = lambda handle: os._exit(9)\n"
        "files.write_text(Path(sys.argv[1]), 'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(target)], cwd=REPOSITORY, check=False)
    assert done.returncode == 9 and target.read_bytes() == b"old"
    write_text(target, "new")
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(("held", "attempts"), [(2, 3), (99, 10)])
def test_a_target_that_another_program_holds_is_tried_again(
    target: Path, monkeypatch: pytest.MonkeyPatch, held: int, attempts: int
) -> None:
    real, calls = Path.replace, []

    def replace(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) <= held:
            raise PermissionError("[WinError 5] Access is denied")
        return real(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError) if held > attempts else nullcontext():
        write_text(target, "new")
    assert target.read_bytes() == (b"old" if held > attempts else b"new")
    assert len(calls) == attempts and list(target.parent.iterdir()) == [target]


def test_each_earlier_version_is_kept_under_its_own_name(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        (tmp_path / "best.pt").write_text(text, encoding="utf-8")
        keep_previous(tmp_path / "best.pt")
    kept = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert kept == {"best.previous.pt": "first", "best.previous2.pt": "second", "best.previous3.pt": "third"}
