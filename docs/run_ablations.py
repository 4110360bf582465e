"""Ablations: the baseline with one choice changed at a time, equal steps, scored on held-out synthetic cases.

    python scripts/quickstart.py
    python docs/run_ablations.py --base outputs/quickstart/paths.yaml --data outputs/quickstart/data

Every variant is trained with the same number of optimizer steps, cases and seeds. OUT/ablations.md, OUT/ablations.json
and a folder for each variant and seed are written; started again, the script goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not docs/

from engine.cli import Parser, positive_float, positive_int, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Ablations on synthetic data, in one table")
    parser.add_argument("--base", type=Path, required=True, help="configuration of the baseline")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_phantoms.py wrote")
    parser.add_argument("--out", type=Path, default=Path("outputs/ablations"))
    parser.add_argument("--epochs", type=positive_int, default=4, help="of Stage 2")
    parser.add_argument("--stage1_epochs", type=positive_int, default=1)
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--lr", type=positive_float, default=6e-3, help="of Stage 2")
    parser.add_argument("--stage1_lr", type=positive_float, default=4e-3)
    parser.add_argument("--max_new_tokens", type=positive_int, default=300, help="a report is cut there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--only", nargs="+", help="axes or variants (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import torch

from config.errors import InputError
from config.files import write_text
from config.schema import REPOSITORY, Config, load_config, write_config
from models.nnunet.checkpoint import load_nnunet_checkpoint, save_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet
from models.vim_bridge import grid_side

BASELINE = "baseline"
STAGE1 = "align"  # the baseline's start of Stage 2
COLUMNS = ("exact_acc", "location_acc", "type_acc", "size_within_4mm")  # scores of a report card


@dataclass(frozen=True)
class Variant:
    """One change against the baseline: of configuration keys, of the start of Stage 2 ("scratch" gives Stage 2 the
    epochs of both stages), of Stage-2 flags, or to an nnU-Net with random weights."""

    axis: str
    name: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    start: str = STAGE1
    flags: tuple[str, ...] = ()
    random_encoder: bool = False


def variants(base: Config) -> list[Variant]:
    """The baseline and every variant that differs from it. An RoI without ``roi_side`` has half of the token grid.

    Raises InputError: the baseline's slices and RoIs need more than 49 visual tokens.
    """
    side = base.roi_side or max(base.encoder_target_spatial // 2, 1)
    # The budget of a baseline without RoIs has no room for them: one overview token a slice is added.
    budget = max(base.max_visual_tokens, (base.slices or 1) * (side**2 + 1))
    found = [
        Variant(BASELINE, BASELINE),
        Variant("Stage-1 start", "scratch", start="scratch"),
        Variant("Stage-1 start", "proxy_l2", start="proxy_l2"),
        Variant("CMI", "off", {"use_cmi": False}),
        Variant("CMI", "on", {"use_cmi": True}),
        Variant("RoI", "off", {"roi_side": None, "roi_policy": "centre"}),
        Variant("RoI", "centre", {"roi_side": side, "roi_policy": "centre"}),
        Variant("RoI", "lesion", {"roi_side": side, "roi_policy": "lesion", "max_visual_tokens": budget}),
        *(_tokens(base, budget) for budget in (49, 196, 784)),
        *(Variant("augmentation", f"shift {n}", {"augment_shift": n}) for n in (0, 2, 6)),
        Variant("augmentation", "rotate 5", {"augment_rotate": 5.0}),
        Variant("augmentation", "noise 0.2", {"augment_noise": 0.2}),
        Variant("language model", "LoRA, rank 8", flags=("--lora_rank", "8")),
        Variant("encoder", "random, trained", {"train_encoder": True}, random_encoder=True),
        Variant("encoder", "nnU-Net, trained on", {"train_encoder": True}),
        Variant("encoder", "nnU-Net, frozen", {"train_encoder": False}),
    ]
    other = [v.start != STAGE1 or v.flags or v.random_encoder or base.replace(**v.keys) != base for v in found]
    return [v for v, differs in zip(found, other, strict=True) if differs or v.axis == BASELINE]


def _tokens(base: Config, budget: int) -> Variant:
    """Another budget of visual tokens, with a grid of at least as many features."""
    local = base.roi_side**2 if base.roi_policy == "lesion" and base.roi_side else 0
    grid = max(base.encoder_target_spatial, grid_side(budget, base.slices or 1, budget, local))
    return Variant("visual tokens", str(budget), {"max_visual_tokens": budget, "encoder_target_spatial": grid})


def chosen(all_variants: list[Variant], only: list[str] | None) -> list[Variant]:
    """The baseline and the variants of these axes or names. Raises InputError for an unknown name."""
    names = {name for variant in all_variants for name in (variant.axis, variant.name)}
    for name in set(only or ()) - names:
        raise InputError(f"--only {name}: there is no such axis or variant; known: {', '.join(sorted(names))}")
    return [v for v in all_variants if not only or v.axis in (BASELINE, *only) or v.name in only]


def write_random_encoder(config: Config, path: Path, seed: int) -> None:
    """The baseline's nnU-Net with random weights, as before its training."""
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    torch.manual_seed(seed)
    network = SegmentationUNet(source.architecture)
    save_nnunet_checkpoint(path, network.state_dict_nnunet(), source.plans, source.configuration, source.dataset_json)


def commands_of(args: argparse.Namespace, variant: Variant, seed: int, folder: Path) -> list[list[str]]:
    """Stage 1 (none from scratch), Stage 2, evaluation on the test table."""
    common = ["--config", folder / "paths.yaml", "--batch_size", args.batch_size, "--seed", seed]
    stage1 = ["train.py", *common, "--objective", variant.start, "--epochs", args.stage1_epochs, "--lr", args.stage1_lr]
    start, epochs = ["--vision_checkpoint", folder / "vision_bridge_best_val.pt"], args.epochs
    if variant.start == "scratch":
        start, epochs = ["--from_scratch"], args.epochs + args.stage1_epochs
    stage2 = ["train_vlm.py", *common, *start, "--epochs", epochs, "--lr", args.lr, "--allow_collapsed", *variant.flags]
    # Confidence is not compared: the evaluated table is named for calibration, so that no other is generated.
    table, model = args.data / "test.csv", folder / "vision_bridge_vlm_final.pt"
    card = ["scripts/evaluate_reports.py", *common, "--checkpoint", model, "--csv", table, "--calibration_csv", table]
    card += ["--out", folder / "card", "--maps", 0, "--pointing_cases", 0, "--same_finding", "miliary=tree_in_bud"]
    card += ["--max_new_tokens", args.max_new_tokens]
    commands = [stage2, card] if variant.start == "scratch" else [stage1, stage2, card]
    return [[str(part) for part in command] for command in commands]


def run_variant(args: argparse.Namespace, base: Config, variant: Variant, seed: int) -> dict[str, Any]:
    """Run what has not been run with these very commands. Returns a row of the table: scores with 95 % intervals,
    validation loss in nats per token after each epoch of Stage 2, and the seconds of the three commands.

    Raises InputError: one of them failed; the message names its log.
    """
    folder = args.out / f"{variant.axis}_{variant.name}_seed{seed}".replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    config = base.replace(**variant.keys, output_dir=str(folder))
    if variant.random_encoder:
        path = args.out / "random_encoder.pth"
        if not path.is_file():
            write_random_encoder(base, path, seed)
        config = config.replace(nnunet_encoder_checkpoint=str(path))
    wanted = {"commands": commands_of(args, variant, seed, folder), "config": config.to_dict()}
    done = folder / "done.json"
    record = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if {key: record.get(key) for key in wanted} != json.loads(json.dumps(wanted)):
        write_config(config, folder / "paths.yaml")
        started = time.perf_counter()
        with (folder / "run.log").open("a", encoding="utf-8") as log:
            for line in wanted["commands"]:
                call = [sys.executable, *line]
                if code := subprocess.run(call, cwd=REPOSITORY, stdout=log, stderr=log, check=False).returncode:
                    problem = f"{variant.axis} {variant.name}: {line[0]} ended with status {code}, see {log.name}"
                    raise InputError(f"{problem}; fix that, and the same command goes on from here")
        record = {**wanted, "seconds": time.perf_counter() - started}
        write_text(done, json.dumps(record))
    scores = json.loads((folder / "card" / "report_card.json").read_text(encoding="utf-8"))["whole_reports"]["own"]
    log = [json.loads(line) for line in (folder / "stage2_log.jsonl").read_text(encoding="utf-8").splitlines()]
    row = {"axis": variant.axis, "variant": variant.name, "keys": dict(variant.keys), "seed": seed, "scores": scores}
    losses = [epoch["val_loss"] for epoch in log if epoch.get("val_loss") is not None]
    return {**row, "val_loss": losses, "seconds": record["seconds"]}


def write_table(args: argparse.Namespace, rows: Sequence[Mapping[str, Any]]) -> None:
    """The finished runs as Markdown and as JSON."""
    head = ["", "variant", "seed", *COLUMNS, "validation loss by epoch", "seconds"]
    table = [head, ["---"] * len(head)]
    for row in rows:
        losses = " ".join(f"{loss:.3f}" for loss in row["val_loss"])
        scores = [shown(row["scores"][name]) for name in COLUMNS]
        table.append([row["axis"], row["variant"], str(row["seed"]), *scores, losses, f"{row['seconds']:.0f}"])
    cases = rows[0]["scores"]["exact_acc"]["n"]
    lines = [
        f"Held-out synthetic cases: {cases}. Epochs: {args.stage1_epochs} of Stage 1, {args.epochs} of Stage 2 (from "
        f"scratch: the sum). Batch: {args.batch_size}. In brackets: 95 % bootstrap intervals.\n",
        *(f"| {' | '.join(cells)} |" for cells in table),
        f"\n```bash\n{' '.join(['python', 'docs/run_ablations.py', *sys.argv[1:]])}\n```\n",
    ]
    write_text(args.out / "ablations.md", "\n".join(lines))
    write_text(args.out / "ablations.json", json.dumps(rows, ensure_ascii=False, indent=1))


def shown(score: Mapping[str, Any]) -> str:
    """A score of a report card with its interval; null where the table has no such case."""
    return "none" if score["value"] is None else "{:.3f} [{:.3f}, {:.3f}]".format(score["value"], *score["interval"])


def main() -> None:
    args = parse_args()
    args.out, args.data = args.out.resolve(), args.data.resolve()
    base = load_config(args.base)
    todo = [(variant, seed) for variant in chosen(variants(base), args.only) for seed in args.seeds]
    rows = []
    for number, (variant, seed) in enumerate(todo, start=1):
        rows.append(run_variant(args, base, variant, seed))
        write_table(args, rows)
        scores = ", ".join(f"{name} {shown(score)}" for name, score in rows[-1]["scores"].items())
        print(f"[{number}/{len(todo)}] {variant.axis}: {variant.name}, seed {seed}: {scores}", flush=True)
    print(f"table: {args.out / 'ablations.md'}", flush=True)


if __name__ == "__main__":
    run_main(main)
