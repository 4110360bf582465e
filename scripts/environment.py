"""The project's own virtual environment: made and filled on first use, with nothing but Python.

Only the standard library here: this runs before anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
VENV = REPOSITORY / ".venv"
REQUIREMENTS = REPOSITORY / "requirements.txt"
STAMP = VENV / "installed-requirements.txt"  # hash of the requirements that the environment holds
OLDEST_PYTHON = (3, 11)


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ensure_environment() -> Path:
    """The interpreter to run with; the environment is made and the requirements installed if need be.

    An active conda or virtual environment that has the requirements already (``mamba5090``) is used as it
    is: set ``MAMBA_CT_PYTHON=current``.
    """
    if os.environ.get("MAMBA_CT_PYTHON") == "current":
        return Path(sys.executable)
    if sys.version_info < OLDEST_PYTHON:
        stop(f"Python {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} or newer is needed, this is {sys.version.split()[0]}")
    python = python_of(VENV)
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if python.is_file() and STAMP.is_file() and STAMP.read_text(encoding="utf-8").strip() == wanted:
        return python
    print(f"installing the requirements into {VENV} (once; a few minutes)", flush=True)
    if not python.is_file():
        run(
            [sys.executable, "-m", "venv", str(VENV)],
            "making the virtual environment (on Debian: apt install python3-venv)",
        )
    run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-r", str(REQUIREMENTS)],
        "installing requirements.txt")  # fmt: skip
    STAMP.write_text(wanted, encoding="utf-8")
    return python


def run(command: list[str], what: str) -> None:
    code = subprocess.run(command, check=False).returncode
    if code != 0:
        stop(f"{what} failed with status {code}: {' '.join(command)}")


def stop(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def run_inside(script: Path) -> None:
    """Run ``script`` with this process's arguments inside the environment and leave with its status."""
    python = ensure_environment()
    environment = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1", "MAMBA_CT_INSIDE": "1"}
    try:
        code = subprocess.run([str(python), str(script), *sys.argv[1:]], env=environment, check=False).returncode
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
