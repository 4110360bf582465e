"""Every script answers --help and a wrong flag before heavy packages are imported, and refuses an old Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformers", "accelerate", "pandas", "numba", "scipy", "matplotlib", "nibabel", "optuna"]
ENVIRONMENT = {"run_tests", "quickstart"}  # these run before anything is installed
FILES = [REPOSITORY / "train.py", REPOSITORY / "train_vlm.py"]
FILES += [path for folder in ("scripts", "docs") for path in sorted((REPOSITORY / folder).glob("*.py"))]
SCRIPTS = [pytest.param(path, id=path.stem) for path in FILES if path.stem not in ENVIRONMENT]
RUN = """
import atexit, runpy, sys
atexit.register(lambda: print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr))
sys.version_info = {version}
sys.path[0] = {folder!r}
sys.argv = [{script!r}, *{flags}]
runpy.run_path({script!r}, run_name="__main__")
"""


def start(script: Path, flags: list[str], version: str = "sys.version_info") -> tuple[int, list[str]]:
    """Status, and the lines of the error output; the last one names the heavy packages that were imported. The output
    goes into a pipe whose code page, as on a Western Windows, has no Chinese."""
    code = RUN.format(heavy=HEAVY, version=version, folder=str(script.parent), script=str(script), flags=flags)
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    options = {"capture_output": True, "encoding": "utf-8", "env": environment, "check": False}
    done = subprocess.run([sys.executable, "-c", code], **options)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_wrong_flag_import_nothing_heavy(script: Path) -> None:
    assert start(script, ["--help"]) == (0, [""])
    status, lines = start(script, ["--no_such_flag"])
    assert status == 2 and lines[-1] == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_is_refused_in_one_line_before_other_imports(script: Path) -> None:
    status, (line, imported) = start(script, ["--help"], version="(3, 10, 4, 'final', 0)")
    assert status == 2 and imported == ""
    assert line.startswith("error: Python 3.11 or newer is needed, this is 3.10.4: run  conda env create -n")


OLD_PYTHON = next(Path.home().glob(".pyenv/versions/3.10.*/bin/python"), None)


@pytest.mark.skipif(OLD_PYTHON is None, reason="no Python 3.10 of pyenv on this machine")
@pytest.mark.parametrize("script", SCRIPTS)
def test_python_3_10_itself_can_read_the_script_and_is_refused(script: Path) -> None:
    done = subprocess.run([OLD_PYTHON, script, "--help"], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "or newer is needed, this is 3.10" in done.stderr
