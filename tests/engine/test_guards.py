"""One run in a folder at a time, room on the disk, and errors of a disk as one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config.errors import InputError, is_out_of_memory
from config.schema import REPOSITORY
from engine.cli import run_main
from engine.guards import LOCK_FILE, hold_folder, release_folder, require_room, size

HOLDER = """
import sys
from pathlib import Path
from engine.guards import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen:
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": REPOSITORY, "encoding": "utf-8"}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_run_is_refused_and_a_dead_one_keeps_nothing(tmp_path, holder):
    with pytest.raises(InputError, match="another run writes into .*another --output_dir") as refused:
        hold_folder(tmp_path)
    if sys.platform != "win32":  # where a locked file cannot be read
        assert f"(process {holder.pid} on " in str(refused.value)
    holder.kill()
    holder.wait()
    assert (tmp_path / LOCK_FILE).is_file(), "the file is left, the lock is not"
    hold_folder(tmp_path)
    hold_folder(tmp_path)  # the same process goes on with it
    release_folder(tmp_path)


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    dead = tmp_path / ".part-4194304-stage1_state.pt"  # above the largest process number of Linux
    alive = tmp_path / f".part-{os.getppid()}-summary.txt"
    for part in (dead, alive):
        part.write_bytes(b"half")
    hold_folder(tmp_path)
    release_folder(tmp_path)
    assert not dead.exists() and alive.exists()


def test_too_little_room_is_said_with_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=500_000_000))
    require_room(tmp_path, 400_000_000, "the preprocessed volumes")
    with pytest.raises(InputError, match=r"has 500 MB left, the preprocessed volumes need 1.5 GB: free some"):
        require_room(tmp_path, 1_500_000_000, "the preprocessed volumes")
    assert size(820_400_000) == "820 MB"


def test_errors_of_a_disk_end_in_one_line_and_defects_keep_their_traceback(capsys):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/7/image.bin")

    with pytest.raises(SystemExit) as stop:
        run_main(full)
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.count("\n") == 1
    assert printed.startswith("error: cache/7/image.bin: No space left on device; files written before are whole")

    def defect() -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    with pytest.raises(OSError, match="Bad file descriptor"):
        run_main(defect)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_told_from_defects(error, full, capsys):
    def fail():
        raise error

    assert is_out_of_memory(error) is full
    with pytest.raises(SystemExit if full else type(error)) as ended:
        run_main(fail)
    if full:
        assert ended.value.code == 2 and capsys.readouterr().err.startswith("error: out of memory: ")
