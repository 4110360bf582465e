"""Preprocess every volume of the tables into the cache, in parallel, before any training.

    python scripts/prepare_data.py
    python scripts/prepare_data.py --csv d:/ct/train.csv --workers 8
    python scripts/prepare_data.py --shard 2/4            the second of four machines
    accelerate launch scripts/prepare_data.py             each process takes its shard (RANK, WORLD_SIZE)

It can be stopped at any moment and started again: finished entries are skipped. Shards may write into one cache_dir,
or each into its own, and the folders are merged by copying. A volume that cannot be prepared is reported in one line;
the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.processes import pool_size
from config.schema import Config, load_config
from config.toy_models import check_toy_models
from engine.cli import (
    Interrupted,
    Parser,
    add_force_flag,
    add_toy_flag,
    positive_int,
    run_main,
    shard,
    shard_of_environment,
)

if TYPE_CHECKING:
    from data.cache import VolumeCache
    from engine.prepare import Files, Work
    from engine.segmentation import SegmentedCache

EXIT_UNUSABLE = 1


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Preprocess all volumes of the tables into the cache")
    parser.add_argument("--config", type=Path, help="configuration file (default: config/paths.yaml)")
    parser.add_argument("--csv", type=Path, nargs="+", help="tables (default: the configuration's two)")
    parser.add_argument("--image_root", type=Path, help="where relative paths start and numbers are looked up")
    parser.add_argument("--cache_dir", type=Path, help="where entries go (default: cache_dir of the configuration)")
    parser.add_argument("--workers", type=positive_int, help="volumes at a time (default: by cores and free memory)")
    parser.add_argument("--shard", type=shard, metavar="I/N", help="the I-th of N parts (default: RANK, WORLD_SIZE)")
    parser.add_argument("--verify", action="store_true", help="also read every slice of finished entries")
    add_force_flag(parser)
    add_toy_flag(parser)
    return parser.parse_args()


def show_segmentation(config: Config, cache: SegmentedCache, files: list[Files]) -> None:
    """Print and draw what the masks say of the segmentation."""
    from data.segmentation_scores import choose_min_lesion
    from engine.figures import draw_segmentation
    from engine.segmentation import describe_segmentation

    compared = [case for pair in files if (case := cache.get(*pair).compared) is not None]
    least = config.min_lesion_mm3 if config.min_lesion_mm3 is not None else choose_min_lesion(compared)
    print(describe_segmentation(compared, least), flush=True)
    if compared:
        figure = Path(config.output_dir) / "segmentation.png"
        draw_segmentation(figure, compared, least)
        print(f"figure: {figure}", flush=True)


def image_problems(volumes: VolumeCache, files: list[Files], work: Work, force: bool) -> int:
    """Print the problems of prepared scans; how many scans cannot be a chest CT, 0 with ``force``."""
    refused = 0
    for pair in files:
        problems = [problem for problem in volumes.get(*pair).problems if problem.level != "note"]
        for problem in problems:
            print(f"{problem.level}: {work.named_in[pair]}: {pair[0]}: {problem}", flush=True)
        refused += any(problem.fatal for problem in problems) and not force
    return refused


def main() -> int:
    args = parse_args()
    from tqdm import tqdm

    from engine.guards import require_room
    from engine.prepare import bytes_needed, default_workers, prepare_all, read_work

    config = load_config(
        args.config,
        cache_dir=str(args.cache_dir.resolve()) if args.cache_dir else None,
        image_root=str(args.image_root.resolve()) if args.image_root else None,
    )
    tables = args.csv or [config.resolved("caption_csv_train")]
    if not args.csv and config.caption_csv_val:
        tables.append(Path(config.caption_csv_val))
    check_toy_models(config.replace(mamba_model=""), tables, args.allow_toy_model)  # no language model is needed here
    work = read_work(tables, config, *(["--csv"] if args.csv else []))
    index, count = args.shard or shard_of_environment()
    files = work.files[index - 1 :: count]
    workers = pool_size(args.workers or default_workers(), len(files))

    from engine.loaders import load_plan
    from engine.segmentation import SegmentedCache, open_cache, segment_all  # torch, which the workers do without

    cache = open_cache(config, load_plan(config))
    volumes = cache.volumes
    require_room(volumes.root, bytes_needed(volumes, files), "the preprocessed volumes")
    part = f", shard {index} of {count}" if count > 1 else ""
    print(f"{len(files)} of {len(work.files)} volumes{part}, {workers} workers, cache {cache.root}", flush=True)

    outcomes = []
    bar = tqdm(total=len(files), desc="preparing volumes", unit="case", dynamic_ncols=True, disable=None)
    try:
        with bar, closing(prepare_all(volumes, files, workers, verify=args.verify)) as results:
            for outcome in results:
                outcomes.append(outcome)
                if outcome.error:
                    tqdm.write(f"error: {work.named_in[outcome.files]}: {outcome.error}")
                bar.update()
    except KeyboardInterrupt:
        raise Interrupted(f"{len(outcomes)} of {len(files)} volumes done; the same command goes on from here") from None
    if isinstance(cache, SegmentedCache):
        usable = [outcome.files for outcome in outcomes if not outcome.error]
        print(
            f"segmented {segment_all(cache, usable, verify=args.verify)} of {len(usable)} volumes with the nnU-Net",
            flush=True,
        )
        show_segmentation(config, cache, usable)
    refused = image_problems(volumes, [outcome.files for outcome in outcomes if not outcome.error], work, args.force)
    failed = sum(bool(outcome.error) for outcome in outcomes)
    prepared = sum(outcome.prepared for outcome in outcomes)
    print(
        f"prepared {prepared}, already there {len(outcomes) - prepared - failed}, failed {failed} "
        f"of {len(files)} volumes; {work.unusable_rows} rows of the tables cannot be used"
        f"{f'; {refused} scans cannot be a chest CT (--force uses them)' if refused else ''}",
        flush=True,
    )
    return EXIT_UNUSABLE if failed or work.unusable_rows or refused else 0


if __name__ == "__main__":
    run_main(main)
