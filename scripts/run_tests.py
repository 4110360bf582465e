"""The whole test suite, in the same environment as the quick start.

python scripts/run_tests.py [pytest arguments]
"""

from __future__ import annotations

import subprocess
import sys

from environment import REPOSITORY, ensure_environment


def main() -> None:
    python = ensure_environment()
    command = [str(python), "-X", "utf8", "-m", "pytest", *sys.argv[1:]]
    sys.exit(subprocess.run(command, cwd=REPOSITORY, check=False).returncode)


if __name__ == "__main__":
    main()
