"""A night of Stage-1 runs over learning rates and batch sizes; in the morning the best one lies ready.

    python scripts/run_overnight_300.py
    python scripts/run_overnight_300.py --epochs 100 --lrs 1e-4 5e-5 2e-5 --batch_sizes 2 4
    python scripts/run_overnight_300.py --no_grid

Each run is a train.py of its own, in a folder of its own, OUTPUT/overnight/STUDY/RUN. Whatever is killed, the same
command goes on: finished runs are kept, the interrupted one goes on from its saved state, the rest follows.
Writes OUTPUT/overnight_best_summary.txt, overnight_leaderboard.csv and vision_bridge_overnight_best.pt.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from config.schema import REPOSITORY, Config, write_config
from engine.cli import (
    EXIT_BAD_INPUT,
    Interrupted,
    add_common_flags,
    config_from,
    positive_float,
    positive_int,
    run_main,
)
from engine.training import overnight_report as report
from engine.training.overnight import STATE_FILE, Point, Result, Search, open_storage, study_name
from engine.training.overnight_run import LOG_FILE, run_training
from engine.training.train_state import StopRequest

LRS, BATCH_SIZES = (1e-4, 5e-5, 2e-5), (2, 4)
NO_GRID_LR, NO_GRID_BATCH_SIZE = 1e-4, 4  # train.py's own
ATTEMPTS = 2  # for what may have been a hiccup of the driver; bad input gets one


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A night of Stage-1 runs; the same command goes on after any stop")
    add_common_flags(parser)
    parser.add_argument("--epochs", type=positive_int, default=100, help="of every run")
    parser.add_argument("--objective", choices=("align", "proxy_l2"), default="align", help="see train.py")
    parser.add_argument("--lrs", type=positive_float, nargs="+", help=f"default: {LRS}")
    parser.add_argument("--batch_sizes", type=positive_int, nargs="+", help=f"default: {BATCH_SIZES}")
    parser.add_argument("--no_grid", action="store_true", help="one run with train.py's own lr and batch_size")
    parser.add_argument(
        "--storage",
        help="optuna storage, for several machines on one search: a database URL, or the path of a journal file in a "
        "shared folder (default: a SQLite file in OUTPUT/overnight)",
    )
    parser.add_argument(
        "--reclaim",
        action="append",
        default=[],
        metavar="HOST",
        help="take over the unfinished runs of a machine that is gone",
    )
    parser.add_argument("--train_script", type=Path, default=REPOSITORY / "train.py", help=argparse.SUPPRESS)
    return parser.parse_args()


def build_search(args: argparse.Namespace, config: Config) -> Search:
    if args.no_grid and (args.lrs or args.batch_sizes):
        raise InputError("--no_grid runs train.py's own lr and batch_size: leave out --lrs and --batch_sizes")
    name = study_name(config, args.objective, args.epochs, args.seed)
    root = config.resolved("output_dir") / "overnight"
    root.mkdir(parents=True, exist_ok=True)
    storage = open_storage(args.storage or f"sqlite:///{(root / 'overnight.db').as_posix()}")
    lrs = (NO_GRID_LR,) if args.no_grid else args.lrs or LRS
    batch_sizes = (NO_GRID_BATCH_SIZE,) if args.no_grid else args.batch_sizes or BATCH_SIZES
    return Search(storage, name, lrs, batch_sizes, root / name)


def prepare(args: argparse.Namespace, config: Config, point: Point, folder: Path) -> list[str]:
    """Make the folder of a run and return the command that trains into it."""
    folder.mkdir(parents=True, exist_ok=True)
    # A copy: editing paths.yaml during the night does not change the runs to come.
    copy = folder / "overnight_config.yaml"
    write_config(config, copy)
    return [
        sys.executable, "-u", str(args.train_script), "--config", str(copy), "--objective", args.objective,
        "--epochs", str(args.epochs), "--seed", str(args.seed), "--lr", repr(point.lr),
        "--batch_size", str(point.batch_size), "--output_dir", str(folder), "--resume", "auto",
        *(["--allow_toy_model"] if args.allow_toy_model else []),
    ]  # fmt: skip


def describe(args: argparse.Namespace, search: Search, output: Path) -> report.Settings:
    flags = ["--config", str(args.config)] if args.config else []
    flags += ["--output_dir", str(args.output_dir)] if args.output_dir else []
    return report.Settings(search.study.study_name, args.objective, args.epochs, args.seed, output, tuple(flags))


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    args = parse_args()
    config = config_from(args)
    search = build_search(args, config)
    settings = describe(args, search, config.resolved("output_dir"))
    mine, begun = search.points, time.monotonic()
    say(f"overnight: {len(mine)} run(s) of {args.epochs} epochs, {ended(search)} ended before; {search.folder}")

    attempts: Counter[Point] = Counter()
    given_up: set[Point] = set()
    with StopRequest() as stop:
        while not stop.wanted and (trial := search.claim(given_up, args.reclaim)) is not None:
            point = Point(**trial.params)
            folder = search.folder_of(point)
            command = prepare(args, config, point, folder)
            label = f"[{min(ended(search) + 1, len(mine))}/{len(mine)}] {point}"
            how = "goes on from its saved state" if (folder / STATE_FILE).exists() else "starts"
            say(f"{label}: {how}; {folder / LOG_FILE}")
            result, status = run_training(command, folder, stop)
            if result is None:
                break
            search.finish(trial, result)
            attempts[point] += 1
            if result.state == "failed" and (status == EXIT_BAD_INPUT or attempts[point] == ATTEMPTS):
                given_up.add(point)
            rows = search.rows()
            _, problems = report.write_report(rows, settings)
            say(f"{label}: {verdict(result)}; elapsed {report.duration(time.monotonic() - begun)}, "
                f"{report.remaining(rows, mine)}")  # fmt: skip
            for line in problems:
                say(f"note: {line}")
        if stop.wanted:
            report.write_report(search.rows(), settings)
            raise Interrupted("finished runs are kept; the same command goes on from here")
    return conclude(search, settings)


def ended(search: Search) -> int:
    """How many points of this command have a result."""
    return sum(row.result is not None for row in search.rows() if row.point in search.points)


def verdict(result: Result) -> str:
    numbers = f"val_loss {result.val_loss:.6g} at epoch {result.epoch}" if result.val_loss is not None else ""
    return ", ".join(text for text in (result.state, numbers, result.reason) if text)


def conclude(search: Search, settings: report.Settings) -> int:
    """The last lines and the exit status."""
    rows = search.rows()
    best, problems = report.write_report(rows, settings)
    elsewhere = [row for row in rows if row.state == "running"]
    for line in problems:
        say(f"note: {line}")
    for row in elsewhere:
        say(f"note: {row.point} is still running {row.reason} (--reclaim {row.host}, if that machine is gone)")
    summary = settings.output / report.SUMMARY
    if best is not None:
        say(f"best: {best.point}, {verdict(best.result)}; {summary}")
    elif not elsewhere:
        print(f"error: no run ended with a usable checkpoint; {summary} has the reasons", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    run_main(main)
