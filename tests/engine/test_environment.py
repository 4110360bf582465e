"""The project's own environment: when it is made, filled, kept, repaired; nothing is installed here."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine import environment

REPOSITORY = Path(__file__).resolve().parents[2]


class Machine:
    """Stands for ``subprocess.run``: notes what is changed and answers as a machine in some condition would."""

    def __init__(self, python: Path) -> None:
        self.python, self.did = python, []
        self.starts, self.has_pip, self.venv_status, self.pip_status = True, True, 0, 0
        self.has_card, self.options = False, []

    def __call__(self, command: list[str], **_: object) -> SimpleNamespace:
        if command == ["nvidia-smi"]:
            if not self.has_card:
                raise FileNotFoundError(command[0])
            return SimpleNamespace(returncode=0)
        if command[1:3] == ["-m", "venv"]:
            self.did.append("venv")
            if self.venv_status == 0:
                self.python.parent.mkdir(parents=True, exist_ok=True)
                self.python.touch()
                self.has_pip = self.starts = True
            return SimpleNamespace(returncode=self.venv_status)
        if not self.python.is_file():
            raise FileNotFoundError(self.python)
        if command[1:4] == ["-m", "pip", "install"]:
            self.did.append("install")
            self.options = command[command.index(str(environment.REQUIREMENTS)) + 1 :]
            return SimpleNamespace(returncode=self.pip_status)
        if command[1:4] == ["-m", "pip", "--version"]:
            return SimpleNamespace(returncode=0 if self.has_pip and self.starts else 1)
        assert command[1:] == ["-c", ""], f"unexpected command {command}"
        return SimpleNamespace(returncode=0 if self.starts else 103)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The environment's paths lie in an empty folder."""
    monkeypatch.delenv("MAMBA_CT_PYTHON", raising=False)
    monkeypatch.setattr(environment, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(environment, "STAMP", tmp_path / ".venv" / "installed-requirements.txt")
    monkeypatch.setattr(environment, "REQUIREMENTS", tmp_path / "requirements.txt")
    environment.REQUIREMENTS.write_bytes(b"numpy==1\n")
    made = Machine(environment.python_of(environment.VENV))
    monkeypatch.setattr(subprocess, "run", made)
    return made


def changes(machine: Machine) -> list[str]:
    """What is done so that the environment is ready."""
    machine.did.clear()
    assert environment.ensure_environment() == machine.python
    return list(machine.did)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="2"):
        environment.ensure_environment()
    return capsys.readouterr().err


def test_made_and_filled_on_first_use_then_left_alone_until_the_requirements_change(machine) -> None:
    assert changes(machine) == ["venv", "install"]
    assert environment.STAMP.read_text(encoding="utf-8") == hashlib.sha256(b"numpy==1\n").hexdigest()
    assert changes(machine) == []
    environment.REQUIREMENTS.write_text("numpy==2\n", encoding="utf-8")
    assert changes(machine) == ["install"]
    assert changes(machine) == []


def test_an_installation_that_failed_is_repeated(machine, capsys) -> None:
    environment.ensure_environment()
    environment.REQUIREMENTS.write_text("numpy==2\n", encoding="utf-8")
    machine.pip_status = 1
    assert "installing requirements.txt failed with status 1" in refused(capsys)
    # Half of the new requirements may be there: the old ones are not held any more either.
    environment.REQUIREMENTS.write_bytes(b"numpy==1\n")
    machine.pip_status = 0
    assert changes(machine) == ["install"]


def test_half_made_environment_without_pip_is_made_again(machine, capsys) -> None:
    """As a Debian without python3-venv leaves it; once the package is there, the same command must work."""
    machine.venv_status = 1
    assert "apt install python3-venv" in refused(capsys)
    assert machine.did == ["venv"] and not environment.STAMP.exists()
    machine.python.parent.mkdir(parents=True)
    machine.python.touch()
    machine.has_pip, machine.venv_status = False, 0
    assert changes(machine) == ["venv", "install"]


def test_environment_whose_python_cannot_start_is_made_again(machine) -> None:
    """A moved folder, or the Python that it was made from was removed: the stamp alone would call it ready."""
    environment.ensure_environment()
    machine.starts = False
    assert changes(machine) == ["venv", "install"]


@pytest.fixture
def windows(machine, monkeypatch) -> None:
    # A copy of os for this module alone: pathlib would make Windows paths otherwise.
    monkeypatch.setattr(environment, "os", SimpleNamespace(**{**vars(os), "name": "nt"}))
    machine.python = environment.python_of(environment.VENV)
    environment.REQUIREMENTS.write_text("numpy==1\ntorch==2.13.0\n", encoding="utf-8")


def test_windows_with_an_nvidia_card_gets_the_cuda_build_of_torch(machine, windows) -> None:
    """PyPI's torch for Windows computes on the CPU alone; one that is installed already is replaced."""
    assert machine.python.name == "python.exe"
    assert changes(machine) == ["venv", "install"] and machine.options == []
    machine.has_card = True
    assert changes(machine) == ["install"]
    index = "https://download.pytorch.org/whl/cu130"
    assert machine.options == ["torch==2.13.0+cu130", "--extra-index-url", index]
    assert changes(machine) == []
    manual = (REPOSITORY / "environment.yml").read_text(encoding="utf-8")
    assert index in manual, "conda's environment has the same build"


@pytest.mark.skipif(os.name == "nt", reason="Linux")
def test_linux_takes_the_torch_of_the_requirements(machine) -> None:
    machine.has_card = True
    assert changes(machine) == ["venv", "install"] and machine.options == []


def test_the_pinned_torch_is_found_in_the_real_requirements(machine, windows, monkeypatch) -> None:
    monkeypatch.setattr(environment, "REQUIREMENTS", REPOSITORY / "requirements.txt")
    machine.has_card = True
    assert environment.cuda_build()[0].startswith("torch==")


@pytest.mark.parametrize("wanted", ["", "current"])
def test_old_python_is_refused_before_anything_is_made(tmp_path: Path, wanted: str) -> None:
    code = (
        "import pathlib, sys; sys.version_info = (3, 10, 4, 'final', 0); from engine import environment; "
        f"environment.VENV = environment.STAMP = pathlib.Path({str(tmp_path / 'none')!r}); "
        "environment.ensure_environment()"
    )
    place = {"cwd": REPOSITORY, "env": {**os.environ, "MAMBA_CT_PYTHON": wanted}}
    done = subprocess.run([sys.executable, "-c", code], **place, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "none").exists()
    [line] = done.stderr.splitlines()
    assert line.startswith("error: Python 3.11 or newer is needed, this is 3.10.4")


def test_current_interpreter_when_asked_for(machine, monkeypatch) -> None:
    monkeypatch.setenv("MAMBA_CT_PYTHON", "current")
    assert environment.ensure_environment() == Path(sys.executable)
    assert machine.did == []


def test_requirements_are_exact_and_readable() -> None:
    """The file that is really installed: each line pins one version, or the stamp would mean nothing."""
    lines = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert all(line.startswith("#") or not line or line.split(";")[0].count("==") == 1 for line in lines)


def test_runs_inside_with_arguments_and_hands_the_status_on(tmp_path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    inside = "assert os.environ['MAMBA_CT_INSIDE'] == '1' and sys.flags.utf8_mode"
    script.write_text(f"import os, sys\n{inside}\nsys.exit(int(sys.argv[1]))\n", encoding="utf-8")
    monkeypatch.setenv("MAMBA_CT_PYTHON", "current")
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "5"])
    with pytest.raises(SystemExit, match="5"):
        environment.run_inside(script)


@pytest.mark.skipif(os.name == "nt", reason="a console's Ctrl-C cannot be sent to one process tree there")
def test_ctrl_c_waits_until_the_program_has_saved(tmp_path: Path) -> None:
    """The program takes a second to save; killing it after a quarter of one would lose its state."""
    program = tmp_path / "program.py"
    waits = "try:\n    print('running', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    time.sleep(1)\n"
    saves = "    pathlib.Path(sys.argv[1]).write_text('saved')\n    sys.exit(130)\n"
    program.write_text(f"import pathlib, sys, time\n{waits}{saves}", encoding="utf-8")
    saved = tmp_path / "saved.txt"
    outer = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); from engine import environment; "
        f"sys.exit(environment.call_patiently([sys.executable, {str(program)!r}, {str(saved)!r}]))"
    )
    process = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"running\n"
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    assert process.wait(timeout=20) == 130
    assert saved.read_text(encoding="utf-8") == "saved"
