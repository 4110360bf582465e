"""A night of Stage-1 runs over learning rates and batch sizes, 300 epochs each; the best checkpoint is kept.

    python scripts/run_overnight_300.py
    python scripts/run_overnight_300.py --epochs 100 --lrs 1e-4 5e-5 2e-5 --batch_sizes 2 4
    python scripts/run_overnight_300.py --no_grid

Each run is a train.py process in OUTPUT/overnight/STUDY/RUN. After any interruption the same command goes on: finished
runs are kept, an interrupted one continues from its saved state. Writes OUTPUT/vision_bridge_overnight_best.pt,
overnight_best_summary.txt and overnight_leaderboard.csv. The files of a night with more epochs, or with as many and a
lower val_loss, are kept; the names of the new ones then end in the epochs: _100epochs.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from config.schema import REPOSITORY
from engine.cli import Interrupted, Parser, add_common_flags, config_from, positive_float, positive_int, run_main

LRS, BATCH_SIZES = (1e-4, 5e-5, 2e-5), (2, 4)
NO_GRID_LR, NO_GRID_BATCH_SIZE = 1e-4, 4  # train.py's own


def parse_args() -> argparse.Namespace:
    parser = Parser(description="A night of Stage-1 runs; the same command goes on after any stop")
    add_common_flags(parser)
    parser.add_argument("--epochs", type=positive_int, default=300, help="of every run")
    parser.add_argument("--objective", choices=("align", "proxy_l2"), default="align", help="see train.py")
    parser.add_argument("--lrs", type=positive_float, nargs="+", help=f"default: {LRS}")
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", help=f"default: {BATCH_SIZES}")
    parser.add_argument("--no_grid", action="store_true", help="one run with train.py's own lr and batch_size")
    parser.add_argument("--train_script", type=Path, default=REPOSITORY / "train.py", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.no_grid and (args.lrs or args.batch_sizes):
        raise InputError("--no_grid runs train.py's own lr and batch_size: leave out --lrs and --batch_sizes")
    defaults = ((NO_GRID_LR,), (NO_GRID_BATCH_SIZE,)) if args.no_grid else (LRS, BATCH_SIZES)
    args.lrs, args.batch_sizes = args.lrs or defaults[0], args.batch_sizes or defaults[1]

    # Imported only now, so that --help and a wrong flag answer at once.
    from engine.training.overnight import Night

    night = Night(args, config_from(args))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        night.search()
    except KeyboardInterrupt:
        raise Interrupted("finished runs are kept; the same command goes on from here") from None
    finally:
        best, summary = night.write_report()
    if best:
        print(f"best: {best}; {summary}", flush=True)
        return 0
    print(f"error: no run ended with a usable checkpoint; {summary} has the reasons", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    run_main(main)
