"""The curves of one or many trainings: a figure and one HTML page with a table, from the logs in their folders.

    python scripts/plot_runs.py outputs
    python scripts/plot_runs.py outputs/overnight outputs/try/stage2_log.jsonl --out outputs/curves

A folder counts with all folders below it. Running trainings are shown as far as they are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.schema import REPOSITORY
from engine.cli import Parser, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Curves of trainings")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders, or stage1_log.jsonl and stage2_log.jsonl")
    out = REPOSITORY / "outputs" / "curves"
    parser.add_argument("--out", type=Path, default=out, help="folder of curves.png and curves.html")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    # Imported only now, so that --help and a wrong flag answer at once.
    from engine.training.curves import draw_runs, find_runs, write_page

    runs = find_runs(args.runs)
    for run in sorted(runs, key=lambda run: run.best["val_loss"] if run.best else float("inf")):
        best = (
            f"lowest val_loss {run.best['val_loss']:.6f} at epoch {run.best['epoch']}" if run.best else "no epoch yet"
        )
        damaged = f", {run.damaged} damaged lines left out" if run.damaged else ""
        print(f"{run.name}: {best}, {len(run.epochs)} validations{damaged}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_runs(runs, args.out / "curves.png")
    write_page(args.out / "curves.html", runs, ", ".join(place.name or str(place) for place in args.runs))
    print(f"wrote {args.out / 'curves.png'} and {args.out / 'curves.html'}", flush=True)


if __name__ == "__main__":
    run_main(main)
