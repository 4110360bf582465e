"""The whole test suite, in the same environment as the quick start.

    python scripts/run_tests.py [pytest arguments]

Makes .venv and installs the requirements on first use. All arguments go to pytest; test files run side by side, on up
to four cores (-n 0: one after the other).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.environment import REPOSITORY, call_patiently, ensure_environment


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)  # nothing is installed for a question
        return
    python = ensure_environment()
    cores = os.cpu_count() or 1
    workers = min(cores, 4)  # each holds up to 2 GB
    command = [str(python), "-X", "utf8", "-m", "pytest", "-n", str(workers), "--dist", "loadfile", *sys.argv[1:]]
    threads = {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    sys.exit(call_patiently(command, cwd=REPOSITORY, env={**os.environ, **threads}))


if __name__ == "__main__":
    main()
