"""Measure one part of the system beside baselines and beside what the machine can do at most.

    python scripts/benchmark.py decode --size 130m --out outputs/benchmark

Writes OUT/SUITE.json and OUT/SUITE.png. The language model has random weights. ``--size tiny`` only shows in seconds
that a suite runs. Measured results: docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, run_main


def main() -> None:
    parser = Parser(description="Benchmarks beside baselines and the machine's own limits")
    suites = ("scan", "prefill", "decode", "train_step", "scaling", "memory", "data", "end_to_end", "saving")
    parser.add_argument("suite", choices=suites)
    parser.add_argument("--size", choices=("2.8b", "130m", "tiny"), default="2.8b", help="of the language model")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark"), help="folder for the results")
    args = parser.parse_args()
    import torch  # after the arguments: a wrong flag is answered at once

    from engine.benchmark.measure import SIZES, Report
    from engine.benchmark.suites import SUITES

    report = Report(args.suite, SIZES[args.size], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    SUITES[args.suite](report)
    report.write(args.out)


if __name__ == "__main__":
    run_main(main)
