"""What a user has: 315 cases, an nnU-Net with one class, a language model that never read a report.

    python scripts/run_user_setting.py u1 --seed 1 --out outputs/u1_seed1
    python scripts/run_user_setting.py u3 --seed 1 --out outputs/u3_no_stage0 --no_stage0
    python scripts/run_user_setting.py u3 --seed 1 --out outputs/u3_measured --set findings_prompt=measured

u1: one finding in each case; u3: one to three. The real scripts run one after the other: phantoms, a small nnU-Net on
the masks of the training cases, Stage 0 on their reports, train.py and train_vlm.py as README has them for one's own
data, and the report card of 300 held-out cases without masks; then the pointing game, and the segmentation of some of
them beside their masks. Writes OUT/summary.json. Started again, it goes on where it stopped. The language model is made
once, beside OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.files import write_text
from engine import chain
from engine.cli import Parser, positive_int, run_main

_LENGTHS = {"stage0_steps": 1600, "align_epochs": 30, "caption_epochs": 15}
_README = {"batches": (4, 1), "rates": ("1e-4", "2e-5")}  # its commands for one's own data
SETTINGS = {
    "u1": chain.Setting(315, 64, 300, max_findings=1, **_LENGTHS, **_README),
    # Copying three findings is learnt later than copying one.
    "u3": chain.Setting(315, 64, 300, 3, **_LENGTHS | {"stage0_steps": 4000}, max_new_tokens=300, **_README),
}
LANGUAGE_MODEL_SEED = 42  # one language model for all seeds of a setting
CORRECTED_CASES = 200
MASKED_CASES = 100  # held-out cases of the pointing game and of the segmentation's scores


def parse_args() -> argparse.Namespace:
    parser = Parser(description="A user's setting on synthetic data, from the scans to the scores")
    parser.add_argument("setting", choices=("u1", "u3"), help="one finding in each case, or one to three")
    parser.add_argument("--seed", type=int, default=1, help="of the data set and of every training")
    parser.add_argument("--out", type=Path, required=True, help="folder of this run")
    parser.add_argument("--language_model", type=Path, help="default: made once, as mamba_general beside OUT")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="configuration keys to change")
    parser.add_argument("--no_stage0", action="store_true", help="the language model stays as it was pre-trained")
    parser.add_argument("--lora_rank", type=positive_int, help="of train_vlm.py")
    parser.add_argument("--stage0_steps", type=positive_int, help="at most")
    parser.add_argument("--align_epochs", type=positive_int, help="of Stage 1")
    parser.add_argument("--caption_epochs", type=positive_int, help="of Stage 2")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

from config.errors import InputError
from config.schema import load_config
from data.segmentation_scores import scores
from data.tables.caption_table import read_caption_table
from engine.checkpoint import load_checkpoint
from engine.segmentation import open_cache


def changed_keys(pairs: list[str]) -> dict[str, str]:
    """``KEY=VALUE`` → {KEY: VALUE}. Raises InputError: a pair without a key or a value."""
    found = dict(pair.partition("=")[::2] for pair in pairs)
    for key, value in found.items():
        if not key or not value:
            raise InputError(f"--set {f'{key}={value}' if value else key}: expected KEY=VALUE")
    return found


def plan(args: argparse.Namespace) -> list[chain.Step]:
    """Write OUT/paths.yaml; the chain on it. Raises InputError: an unknown key, or a wrong value."""
    changes = {name: getattr(args, name) for name in _LENGTHS if getattr(args, name)}
    setting = SETTINGS[args.setting]._replace(**changes)
    out, seed = args.out, args.seed
    models = chain.Models(out / "nnunet" / "fold_0" / "checkpoint_best.pth", args.language_model)
    keys = changed_keys(args.set)
    load_config(chain.write_paths_yaml(out, models, not args.no_stage0, keys))
    # Slices that follow masks need them for held-out cases too.
    table = "test.csv" if keys.get("slice_policy") == "mask" else "test_no_masks.csv"
    return [
        chain.phantoms(setting, out, seed),
        chain.segmentation(out, seed),
        *([] if args.no_stage0 else [chain.stage0(setting, out, seed)]),
        *chain.training(setting, out, seed, args.lora_rank or 0),
        chain.scores(setting, out, seed, table, CORRECTED_CASES),
        chain.pointing(setting, out, seed, MASKED_CASES),
    ]


def segmentation_scores(out: Path) -> dict[str, float | None]:
    """The segmentation of the held-out cases of the pointing game, beside their masks; empty where masks are used."""
    checkpoint = load_checkpoint(out / chain.CHECKPOINT)
    cache = open_cache(checkpoint.config, checkpoint.preprocess_plan)
    rows = read_caption_table(out / "data" / "test.csv")[:MASKED_CASES]
    compared = [cache.get(row.image_path, row.mask_path).compared for row in rows]
    known = [case for case in compared if case is not None]
    return asdict(scores(known, checkpoint.config.min_lesion_mm3 or 0.0)) if known else {}


def main() -> None:
    args = parse_args()
    args.out = args.out.resolve()
    first, made_here = {}, args.language_model is None
    args.language_model = args.language_model or args.out.parent / "mamba_general"
    steps = plan(args)
    if made_here:
        made = chain.language_model(args.language_model, LANGUAGE_MODEL_SEED)
        first = {made.name: chain.run_step(made, args.out.parent)[0]}
    seconds = first | chain.run_steps(steps, args.out)
    card = chain.read_card(args.out / "card")
    found = chain.main_scores(card) | {
        "pointing_game": chain.read_card(args.out / "pointing")["pointing_game"],
        "segmentation": segmentation_scores(args.out),
        "setting": args.setting,
        "seed": args.seed,
        "flags": sys.argv[1:],
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
    }
    write_text(args.out / "summary.json", json.dumps(found, ensure_ascii=False, indent=1))
    print(chain.compared(found))
    print(f"{found['seconds_total']:.0f} s in all; {args.out / 'summary.json'}; {found['verdict']}", flush=True)


if __name__ == "__main__":
    run_main(main)
