"""Check the data before any training: tables, images, masks and reports, all problems at once.

    python scripts/check_data.py --csv d:/ct/train.csv --val_csv d:/ct/val.csv --out outputs/data_check
    python scripts/check_data.py --config my_paths.yaml --quick

Writes OUT/problems.csv, OUT/findings.csv (what is read from each report) and OUT/contact_sheet.html (with
contact_sheet.png), which shows what the model will see, and each report beside what is read from it.
Exit code 1 if any row cannot be used. --quick reads headers only; training does that by itself.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Check tables and images before training")
    parser.add_argument("--csv", type=Path, help="training table (default: the configuration's tables)")
    parser.add_argument("--val_csv", type=Path, help="validation table, compared with the training table")
    parser.add_argument("--image_root", type=Path, help="where relative paths start and numbers are looked up")
    parser.add_argument("--config", type=Path, help="configuration file (default: config/paths.yaml)")
    parser.add_argument("--out", type=Path, default=Path("outputs/data_check"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="headers only, no voxel is read, no contact sheet")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

from tqdm import tqdm

from config.errors import InputError, counted
from config.files import write_csv
from config.schema import Config, load_config
from data.checks.data_check import CheckedImage, check_image, check_validation, compare_rows
from data.checks.problems import Problem, from_error
from data.report_language.labeller import label_report, report_labels
from data.tables.caption_table import NAMED_BY, TableScan, read_prompts, scan_caption_table
from engine.figures import ModelView, draw_case, write_sheet

RARE = 10  # reports: of fewer, a model learns the words by heart at best
OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))


def read_tables(args: argparse.Namespace, config: Config) -> tuple[dict[str, TableScan], list[Problem]]:
    """Both tables read to their ends; one that cannot be read is a problem of its own."""
    tables = {"train": (args.csv, "--csv") if args.csv else (config.resolved("caption_csv_train"), NAMED_BY)}
    if args.val_csv:
        tables["val"] = args.val_csv, "--val_csv"
    elif config.caption_csv_val and not args.csv:
        tables["val"] = Path(config.caption_csv_val), NAMED_BY
    scans, problems = {}, []
    for name, (path, named_by) in tables.items():
        try:
            scan = scan_caption_table(path, config.table_root, config.path_map, named_by)
        except InputError as error:
            problems.append(replace(from_error(0, path, error), table=name))
            continue
        scans[name] = scan
        print("\n  ".join([f"{name}: {path}, {len(scan.rows)} rows can be read", *scan.notes]), flush=True)
        problems += [replace(problem, table=name) for problem in (*scan.problems, *question_problems(scan, config))]
    return scans, problems


def question_problems(scan: TableScan, config: Config) -> list[Problem]:
    """A problem where rows have no question and the prompt file gives none."""
    empty = [row.number for row in scan.rows if not row.question]
    try:
        prompts = read_prompts(Path(config.caption_prompt_json)) if empty and config.caption_prompt_json else []
    except InputError as error:
        return [from_error(0, config.caption_prompt_json, error)]
    if prompts or not empty:
        return []
    words = f"{len(empty)} rows have no question (first row {empty[0]})"
    return [Problem(0, words, "fill them in, or set caption_prompt_json in the configuration")]


def model_view(config: Config) -> Callable[[CheckedImage], ModelView] | None:
    """A function from a case to the encoder's input, made by the code of training; None without an encoder."""
    if not (config.nnunet_encoder_checkpoint and Path(config.nnunet_encoder_checkpoint).is_file()):
        print("no nnunet_encoder_checkpoint: the sheet shows the scans, not the encoder's input", flush=True)
        return None
    from data.view_selection import ViewSelection
    from engine.loaders import load_encoder
    from engine.segmentation import open_cache

    encoder, plan = load_encoder(config)
    selection = ViewSelection.from_config(config, plan, encoder)
    cache = open_cache(config, plan)
    intensity, grey = plan.intensity[0], (-2.0, 2.0)
    if intensity is not None and plan.normalization_schemes[0] == "CTNormalization":
        limits = (intensity.percentile_00_5, intensity.percentile_99_5)
        grey = tuple((value - intensity.mean) / intensity.std for value in limits)

    def view(checked: CheckedImage) -> ModelView:
        cached = cache.get(checked.row.image_path, checked.row.mask_path)
        images, position, _ = selection.select(cached)
        depth = len(checked.volume.array)
        planes = images[:, 0] if encoder.dim == 2 else images[0, [images.shape[1] // 2]]
        slices = [min(max(round(float(p) * depth - 0.5), 0), depth - 1) for p in position]
        along_rows = cached.axcodes[2 - plan.transpose_forward[2]]
        return ModelView(planes, grey, slices, (OPPOSITE[along_rows], along_rows))

    return view


def write_findings(scans: dict[str, TableScan], path: Path) -> list[Problem]:
    """What is read from each report, as CSV beside the text; a note for findings that are too rare to learn."""
    counts: Counter[str] = Counter()
    lines = [["table", "row", "finding", "polarity", "section", "as read", "words", "report"]]
    for name, table in scans.items():
        for row in table.rows:
            found = label_report(row.answer)
            for one in found:
                words = row.answer[one.start : one.end]
                line = [one.finding, one.polarity, one.section, one.describe(), words, row.answer]
                lines.append([name, row.number, *line])
            if name == "train":
                counts.update(finding for finding, polarity in report_labels(found).items() if polarity == "present")
    write_csv(path, lines)
    shown = ", ".join(f"{finding} {count}" for finding, count in counts.most_common())
    print(f"findings of the training reports: {shown or 'none were read'}; all: {path}", flush=True)
    rare = [f"{finding} ({count})" for finding, count in counts.most_common() if count < RARE]
    if not rare:
        return []
    words = f"{len(rare)} findings are in fewer than {RARE} training reports: {', '.join(rare)}"
    return [Problem(0, words, "too rare to learn: reports will hardly name them", level="note", table="train")]


def check_images(
    scans: dict[str, TableScan], args: argparse.Namespace, config: Config
) -> list[tuple[CheckedImage, str, Path | None]]:
    """Check every image once. Returns each with its table and its figure, without its voxels."""
    view = None if args.quick else model_view(config)
    cases = []
    rows = [(name, row) for name, table in scans.items() for row in table.rows]
    for name, row in tqdm(rows, desc="checking images", unit="case", dynamic_ncols=True, disable=None):
        checked, figure = check_image(row, quick=args.quick), None
        if checked.volume is not None:
            figure = args.out / "cases" / f"{name}_{row.number:04d}.png"
            try:
                seen = view(checked) if view and not any(p.fatal for p in checked.problems) else None
                text = f"row {row.number}\n{row.image_path.name}\n\n{row.answer}"
                draw_case(figure, checked.volume, checked.mask, seen, text)
            except InputError as error:  # preprocessing refuses the image
                checked.problems.append(from_error(row.number, row.image_path, error))
                figure = None
        cases.append((replace(checked, volume=None, mask=None), name, figure))  # all volumes do not fit into memory
    return cases


def main() -> int:
    args = parse_args()
    config = load_config(args.config, image_root=str(args.image_root.resolve()) if args.image_root else None)
    if config.table_root is not None and not config.table_root.is_dir():
        problem = f"image_root is no folder: {config.table_root}"
        raise InputError(f"{problem}; set --image_root, or image_root in the configuration")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    scans, problems = read_tables(args, config)
    problems += write_findings(scans, args.out / "findings.csv")
    cases = check_images(scans, args, config)
    digests = {checked.row.image_path: checked.digest for checked, *_ in cases if checked.digest}
    train, val = (scans[name].rows if name in scans else [] for name in ("train", "val"))
    problems += [replace(problem, table=name) for checked, name, _ in cases for problem in checked.problems]
    problems += [*check_validation(val), *compare_rows(train, val, digests)]
    problems = sorted(set(problems), key=lambda p: (p.table, p.row, p.level, p.problem))

    for problem in problems:
        if problem.level != "note":
            print(f"{problem.level}: {problem.table}, {problem}  [{problem.image}]", flush=True)
    if not args.quick:
        print(f"contact sheet: {write_sheet(cases, problems, args.out)}", flush=True)
    header = ["row", "image", "problem", "remedy", "level", "table"]
    write_csv(
        args.out / "problems.csv",
        [header, *([p.row or "", p.image, p.problem, p.remedy, p.level, p.table] for p in problems)],
    )
    levels = Counter(problem.level for problem in problems)
    unusable = len({(p.table, p.row) for p in problems if p.fatal})
    counts = ", ".join(counted(levels[level], level) for level in ("warning", "note"))
    counts = f"{counted(levels['error'], 'error')} in {counted(unusable, 'row')}, {counts}"
    print(f"{counted(len(cases), 'image')} checked: {counts}; list: {args.out / 'problems.csv'}", flush=True)
    return 1 if unusable else 0


if __name__ == "__main__":
    run_main(main)
