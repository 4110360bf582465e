"""A night of training runs over learning rates and batch sizes; the best checkpoint is kept.

    python scripts/run_overnight_300.py
    python scripts/run_overnight_300.py --epochs 100 --lrs 1e-4 5e-5 2e-5 --batch_sizes 2 4
    python scripts/run_overnight_300.py --no_grid
    python scripts/run_overnight_300.py --stage 2 --until 07:30 --prune --evaluate d:/ct/test.csv
    python scripts/run_overnight_300.py --stage 2 --lrs 2e-5 --batch_sizes 1 -- --lora_rank 16

Each run is a train.py (Stage 2: train_vlm.py) process in OUTPUT/overnight/STUDY/RUN. After any interruption the same
command goes on: finished runs are kept, an interrupted one continues from its saved state. Writes in OUTPUT
vision_bridge_overnight_best.pt, overnight_best_summary.txt, overnight_leaderboard.csv and overnight_curves.png; Stage 2
vision_bridge_vlm_overnight_best.pt and overnight_stage2_*. The files of a night with more epochs, or with as many and a
lower val_loss, are kept; the names of the new ones then end in the epochs: _100epochs. Flags after -- go to every run.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from config.schema import REPOSITORY
from engine.chain import call_patiently
from engine.cli import (
    Interrupted,
    Parser,
    add_common_flags,
    clock_time,
    config_from,
    hours_from_now,
    positive_float,
    positive_int,
    run_main,
)
from engine.interrupt import handle_stop

EPOCHS = {1: 300, 2: 20}
LRS, BATCH_SIZES = {1: (1e-4, 5e-5, 2e-5), 2: (5e-5, 2e-5, 1e-5)}, {1: (2, 4), 2: (1, 2)}
NO_GRID = {1: (1e-4, 4), 2: (1e-5, 1)}  # the stage scripts' own
STARTS = ("vision_bridge_overnight_best.pt", "vision_bridge_best_val.pt")  # where --vision_checkpoint is left out


def parse_args() -> argparse.Namespace:
    parser = Parser(description="A night of training runs; the same command goes on after any stop")
    add_common_flags(parser)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="1: train.py, 2: train_vlm.py")
    parser.add_argument(
        "--epochs", type=positive_int, help=f"of every run (default: {EPOCHS[1]}, Stage 2: {EPOCHS[2]})"
    )
    parser.add_argument("--objective", choices=("align", "proxy_l2"), default="align", help="of Stage 1, see train.py")
    parser.add_argument(
        "--vision_checkpoint", type=Path, help=f"Stage 2 starts from it (default: {' or '.join(STARTS)})"
    )
    parser.add_argument("--lrs", type=positive_float, nargs="+", help=f"default: {LRS[1]}, Stage 2: {LRS[2]}")
    sizes = f"default: {BATCH_SIZES[1]}, Stage 2: {BATCH_SIZES[2]}"
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", help=sizes)
    parser.add_argument("--no_grid", action="store_true", help="one run with the script's own lr and batch_size")
    parser.add_argument("--prune", action="store_true", help="end runs that are worse than the median of the others")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--until", metavar="HH:MM", type=clock_time, dest="deadline", help="begin no run that ends later"
    )
    budget.add_argument(
        "--hours", type=hours_from_now, dest="deadline", help="begin no run that ends later than in so many hours"
    )
    card = "report card of the best checkpoint on this table, at the end (Stage 2)"
    parser.add_argument("--evaluate", type=Path, metavar="CSV", help=card)
    parser.add_argument("--train_script", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("train_flags", nargs="*", metavar="-- --FLAG", help="further flags of every run")
    return parser.parse_args()


def fill_in(args: argparse.Namespace, output: Path) -> None:
    """What the stage decides. Raises InputError: flags that do not go together, or no checkpoint for Stage 2."""
    if args.no_grid and (args.lrs or args.batch_sizes):
        raise InputError("--no_grid runs the script's own lr and batch_size: leave out --lrs and --batch_sizes")
    lr, batch_size = NO_GRID[args.stage]
    args.lrs = args.lrs or ((lr,) if args.no_grid else LRS[args.stage])
    args.batch_sizes = args.batch_sizes or ((batch_size,) if args.no_grid else BATCH_SIZES[args.stage])
    args.epochs = args.epochs or EPOCHS[args.stage]
    if args.stage == 1:
        for flag in ("evaluate", "vision_checkpoint"):
            if getattr(args, flag):
                raise InputError(f"--{flag} belongs to Stage 2: add --stage 2")
        return
    if args.evaluate and not args.evaluate.is_file():
        raise InputError(f"--evaluate: no such table: {args.evaluate}")
    names = [args.vision_checkpoint] if args.vision_checkpoint else [output / name for name in STARTS]
    args.vision_checkpoint = next((path.resolve() for path in names if path.is_file()), None)
    if args.vision_checkpoint is None:
        raise InputError(f"no checkpoint of Stage 1 for Stage 2: {' or '.join(map(str, names))}; train Stage 1 first")


def evaluate(args: argparse.Namespace, checkpoint: Path, model_flags: list[str]) -> int:
    """The report card of the night's best checkpoint, in a folder beside it. Returns the exit status."""
    folder = checkpoint.with_name("overnight_card")
    command = [sys.executable, "-u", "-X", "utf8", str(REPOSITORY / "scripts" / "evaluate_reports.py"), *model_flags]
    command += ["--checkpoint", str(checkpoint), "--csv", str(args.evaluate), "--out", str(folder)]
    command += ["--config", str(args.config)] if args.config else []
    print(f"report card: {subprocess.list2cmdline(command)}", flush=True)
    return call_patiently(command)


def main() -> int:
    args = parse_args()
    config = config_from(args)
    fill_in(args, config.resolved("output_dir"))

    # Imported only now, so that --help and a wrong flag answer at once.
    from engine.training.overnight import Night

    night = Night(args, config)
    handle_stop(signal.default_int_handler)
    try:
        night.search()
    except KeyboardInterrupt:
        raise Interrupted("finished runs are kept; the same command goes on from here") from None
    finally:
        best, summary, checkpoint = night.report.write()
    if not best:
        print(f"error: no run ended with a usable checkpoint; {summary} has the reasons", file=sys.stderr, flush=True)
        return 1
    print(f"best: {best}; {summary}", flush=True)
    return evaluate(args, checkpoint, night.model_flags) if args.evaluate else 0


if __name__ == "__main__":
    run_main(main)
