"""Atomic writing."""

from __future__ import annotations

from pathlib import Path

import pytest

from config.files import atomic_path, replace, write_text


def test_text_is_written_whole_into_a_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "报告.txt", "所见\r\n")
    assert (tmp_path / "new" / "报告.txt").read_bytes() == "所见\r\n".encode()
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x.nii.gz"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_path(target) as part:
        assert part.name.endswith(".nii.gz")
        part.write_bytes(b"half")
        raise RuntimeError
    assert target.read_bytes() == b"old" and list(tmp_path.iterdir()) == [target]


def test_a_target_that_another_program_holds_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, target, real, calls = tmp_path / "a", tmp_path / "b", Path.replace, []
    part.write_bytes(b"new")

    def held_once(self: Path, other: Path) -> Path:
        calls.append(other)
        if len(calls) == 1:
            raise PermissionError(13, "in use")
        return real(self, other)

    monkeypatch.setattr(Path, "replace", held_once)
    replace(part, target)
    assert target.read_bytes() == b"new" and len(calls) == 2
