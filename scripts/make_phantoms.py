"""Make the built-in data set of synthetic chest CTs with reports.

python scripts/make_phantoms.py --out outputs/phantoms --n_train 300 --n_val 40 --n_test 40
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os

from rich.progress import Progress

from config.errors import InputError
from data.phantom_dataset import DatasetPaths, make_dataset


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set; completed if begun")
    parser.add_argument("--n_train", type=int, default=300)
    parser.add_argument("--n_val", type=int, default=40)
    parser.add_argument("--n_test", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal files")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="of reports and questions")
    parser.add_argument(
        "--max_findings", type=int, default=1, help="findings in an abnormal case: 1 to this many"
    )
    parser.add_argument("--normal_share", type=float, default=0.1, help="share of healthy chests")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    parser.add_argument(
        "--contact_sheet", action="store_true", help="also write contact_sheet.png into --out"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> DatasetPaths:
    args = parse_args(argv)
    total = args.n_train + args.n_val + args.n_test
    with Progress() as bar:
        task = bar.add_task("phantoms", total=total)
        paths = make_dataset(
            args.out,
            args.n_train,
            args.n_val,
            args.n_test,
            args.seed,
            language=args.language,
            max_findings=args.max_findings,
            normal_share=args.normal_share,
            workers=args.workers,
            progress=lambda done, _: bar.update(task, completed=done),
        )
    print(
        f"{total} cases in {paths.root}: {paths.train_csv.name}, {paths.val_csv.name}, {paths.test_csv.name}"
    )
    return paths


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
