"""Prove a graphics card in ten minutes: twelve checks of all that runs on it, then the tests that need one.

    python scripts/gpu_check.py [--minutes 10] [--only 3,4] [--out outputs/gpu_check]

Each line says pass, fail or skipped, with what was measured and, beside it, the estimate for an H100 / RTX 5090.
The report, in JSON and Markdown, is written as it goes. Nothing comes from the network: the language model of 2.8B has
random weights, and the scripts run on the models of assets/. ``--allow_cpu`` runs the same checks at tiny sizes without
a card, which shows that they run. Exit status: 0 where nothing failed, else 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, numbers, positive_float, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Checks of a graphics card")
    parser.add_argument("--minutes", type=positive_float, default=10.0, help="what no longer fits is skipped")
    parser.add_argument("--only", type=numbers, metavar="N,N", help="these checks, 1 to 13; default: all")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_check"), help="folder of the report")
    parser.add_argument("--allow_cpu", action="store_true", help="without a card, at tiny sizes: shows that all runs")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    import torch  # after the arguments: a wrong flag is answered at once

    from config.errors import InputError

    if not torch.cuda.is_available() and not args.allow_cpu:
        raise InputError(
            f"torch {torch.__version__} sees no CUDA device: install its CUDA build and NVIDIA's driver (README, "
            "Installation), or add --allow_cpu to see that the checks run"
        )
    from engine.gpu_check.runner import CHECKS, FAIL, run_checks

    if unknown := [number for number in args.only or () if number not in CHECKS]:
        raise InputError(f"--only {unknown[0]}: no such check; expected numbers from 1 to {max(CHECKS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = run_checks(args.only or list(CHECKS), device, args.out.resolve(), args.minutes)
    print(results.summary(), flush=True)
    return int(results.counts[FAIL] > 0)


if __name__ == "__main__":
    run_main(main)
