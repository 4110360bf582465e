"""Preprocess every volume of the tables into the cache, in parallel, before any training.

    python scripts/prepare_data.py
    python scripts/prepare_data.py --csv d:/ct/train.csv --workers 8
    python scripts/prepare_data.py --shard 2/4            the second of four machines
    accelerate launch scripts/prepare_data.py             each process takes its shard (RANK, WORLD_SIZE)

Stop it at any moment and run it again: what is there is skipped. Shards may write into one cache_dir, or each into
its own: the folders can be merged by copying. Every volume that cannot be prepared is one line; exit code 1 then.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from tqdm import tqdm

from config.schema import Config, load_config
from data.tables.caption_table import scan_caption_table
from engine.cli import Interrupted, positive_int, run_main, shard
from engine.prepare import Files, Outcome, default_workers, prepare_all, unique_files

EXIT_UNUSABLE = 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Preprocess all volumes of the tables into the cache")
    parser.add_argument("--config", type=Path, help="configuration file (default: config/paths.yaml)")
    parser.add_argument("--csv", type=Path, nargs="+", help="tables (default: the configuration's two)")
    parser.add_argument("--image_root", type=Path, help="where relative paths start and numbers are looked up")
    parser.add_argument("--cache_dir", type=Path, help="where entries go (default: cache_dir of the configuration)")
    parser.add_argument("--workers", type=positive_int, help="volumes at a time (default: by cores and free memory)")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="the I-th of N parts (default: RANK, WORLD_SIZE)")
    parser.add_argument("--verify", action="store_true", help="also read every slice of the entries that are there")
    return parser.parse_args()


def shard_of_environment() -> tuple[int, int]:
    """As torchrun and accelerate tell their processes; the whole where nobody does."""
    return int(os.environ.get("RANK", 0)) + 1, int(os.environ.get("WORLD_SIZE", 1))


@dataclass
class Work:
    """What is to be prepared, who asked for it (``table, row N``), and how many rows cannot be used at all."""

    files: list[Files] = field(default_factory=list)
    asked_by: dict[Files, str] = field(default_factory=dict)
    unusable_rows: int = 0


def work_of(tables: Iterable[Path], config: Config) -> Work:
    """All tables read to their ends; a row that cannot be used is printed.

    Raises:
        InputError: a table cannot be read at all.
    """
    rows, work = [], Work()
    for table in tables:
        scan = scan_caption_table(
            table, image_root=Path(config.image_root) if config.image_root else None, path_map=config.path_map
        )
        for problem in scan.problems:
            if problem.fatal:
                work.unusable_rows += 1
                print(f"error: {table}, {problem}", flush=True)
        for row in scan.rows:
            work.asked_by.setdefault((row.image_path, row.mask_path), f"{table}, row {row.number}")
        rows += scan.rows
    work.files = unique_files(rows)
    return work


def main() -> int:
    args = parse_args()
    config = load_config(
        args.config,
        cache_dir=str(args.cache_dir.resolve()) if args.cache_dir else None,
        image_root=str(args.image_root.resolve()) if args.image_root else None,
    )
    tables = args.csv or [config.resolved("caption_csv_train")]
    if not args.csv and config.caption_csv_val:
        tables.append(Path(config.caption_csv_val))
    work = work_of(tables, config)
    index, count = args.shard or shard_of_environment()
    files = work.files[index - 1 :: count]
    workers = min(args.workers or default_workers(), max(len(files), 1))

    from engine.loaders import load_plan
    from engine.segmentation import SegmentedCache, open_cache, segment_all  # torch, which the workers do without

    cache = open_cache(config, load_plan(config))
    volumes = cache.volumes if isinstance(cache, SegmentedCache) else cache
    part = f", shard {index} of {count}" if count > 1 else ""
    print(f"{len(files)} of {len(work.files)} volumes{part}, {workers} workers, cache {cache.root}", flush=True)

    outcomes: list[Outcome] = []
    bar = tqdm(total=len(files), desc="preparing volumes", unit="case", dynamic_ncols=True, disable=None)
    try:
        with bar, closing(prepare_all(volumes, files, workers, verify=args.verify)) as results:
            for outcome in results:
                outcomes.append(outcome)
                if outcome.error:
                    tqdm.write(f"error: {work.asked_by[outcome.files]}: {outcome.error}")
                bar.update()
    except KeyboardInterrupt:
        raise Interrupted(f"{len(outcomes)} of {len(files)} volumes done; the same command goes on from here") from None
    if isinstance(cache, SegmentedCache):
        usable = [outcome.files for outcome in outcomes if not outcome.error]
        print(f"segmented {segment_all(cache, usable)} of {len(usable)} volumes with the nnU-Net", flush=True)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    prepared = sum(outcome.prepared for outcome in outcomes)
    print(
        f"prepared {prepared}, already there {len(outcomes) - prepared - failed}, failed {failed} "
        f"of {len(files)} volumes; {work.unusable_rows} rows of the tables cannot be used",
        flush=True,
    )
    return EXIT_UNUSABLE if failed or work.unusable_rows else 0


if __name__ == "__main__":
    run_main(main)
