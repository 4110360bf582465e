"""The project's own virtual environment: made and filled on first use, with nothing but Python.

Only the standard library is imported: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from engine.chain import REPOSITORY, call_patiently  # importing it refuses an old Python

VENV = REPOSITORY / ".venv"
REQUIREMENTS = REPOSITORY / "requirements.txt"
STAMP = VENV / "installed-requirements.txt"  # hash of the requirements that the environment holds
CUDA_BUILD = "cu130"  # of torch, for Windows; it runs on every card since Turing, the RTX 5090 included
DRIVER = 580  # of NVIDIA, the first for CUDA 13


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_environment() -> Path:
    """The interpreter to run with; the environment is made and the requirements installed if need be.

    ``MAMBA_CT_PYTHON=current`` uses the active environment, which has the requirements already, as it is.
    """
    if os.environ.get("MAMBA_CT_PYTHON") == "current":
        return Path(sys.executable)
    python = python_of(VENV)
    build = cuda_build()
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + "".join(build).encode()).hexdigest()
    held = STAMP.read_text(encoding="utf-8").strip() if STAMP.is_file() else None
    # It is started, because a moved folder or a removed base Python leaves an interpreter that cannot run.
    if held == wanted and succeeds([str(python), "-c", ""]):
        return python
    print(f"installing the requirements into {VENV} (once; a few minutes)", flush=True)
    STAMP.unlink(missing_ok=True)  # an interrupted installation must not pass for the old one
    # Without pip it is half-made: after an interruption, or on a Debian without python3-venv.
    if not succeeds([str(python), "-m", "pip", "--version"]):
        what = "making the virtual environment (on Debian: apt install python3-venv)"
        run(what, sys.executable, "-m", "venv", VENV)
    quiet = ("--disable-pip-version-check", "-q")
    run("installing requirements.txt", python, "-m", "pip", "install", *quiet, "-r", REQUIREMENTS, *build)
    STAMP.write_text(wanted, encoding="utf-8")
    return python


def cuda_build() -> list[str]:
    """What pip needs besides the requirements for a torch that uses the NVIDIA card.

    On Linux nothing: PyPI's own torch does. On Windows PyPI's torch computes on the CPU alone; with the build's name
    such a torch is replaced where it is installed already.
    """
    return cuda_torch() if os.name == "nt" and succeeds(["nvidia-smi"]) else []


def cuda_torch() -> list[str]:
    """torch's CUDA build for pip, which puts it in the place of another build."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    pin = next(line for line in lines if line.startswith("torch=="))
    return [f"{pin}+{CUDA_BUILD}", "--extra-index-url", f"https://download.pytorch.org/whl/{CUDA_BUILD}"]


def succeeds(command: list[str]) -> bool:
    """Whether a program runs and exits with status 0; its output is not shown."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # absent, not executable, or for another machine
        return False


def run(what: str, *command: object) -> None:
    """Run a program; exit with one line and status 2 where it fails."""
    arguments = [str(part) for part in command]
    if code := subprocess.run(arguments, check=False).returncode:
        print(f"error: {what} failed with status {code}: {' '.join(arguments)}", file=sys.stderr, flush=True)
        sys.exit(2)


def run_inside(script: Path) -> None:
    """Run ``script`` with this process's arguments inside the environment and exit with its status."""
    python = ensure_environment()
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "MAMBA_CT_INSIDE": "1"}
    sys.exit(call_patiently([str(python), str(script), *sys.argv[1:]], env=environment))
