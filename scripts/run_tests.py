"""The whole test suite, in the same environment as the quick start.

    python scripts/run_tests.py [pytest arguments]

Makes .venv and installs the requirements on first use. All arguments go to pytest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.environment import REPOSITORY, call_patiently, ensure_environment


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)  # nothing is installed for a question
        return
    python = ensure_environment()
    command = [str(python), "-X", "utf8", "-m", "pytest", *sys.argv[1:]]
    sys.exit(call_patiently(command, cwd=REPOSITORY))


if __name__ == "__main__":
    main()
