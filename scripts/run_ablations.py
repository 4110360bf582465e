"""Which choices matter: the baseline with one thing changed at a time, equal steps, scored on held-out phantoms.

    python scripts/quickstart.py
    python scripts/run_ablations.py --base outputs/quickstart/paths.yaml --data outputs/quickstart/data

Writes OUT/ablations.md and OUT/ablations.json after each variant, a folder for each variant and seed, and goes on where
it was stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from config.schema import REPOSITORY, Config, load_config, write_config
from data.phantom.dataset import load_cases
from engine.cli import positive_float, positive_int, run_main
from engine.evaluation.ablation import BASELINE, Outcome, Variant, markdown, read_losses, score_cases, variants

RANDOM_ENCODER = "random_encoder.pth"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ablations on synthetic data, in one table")
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


def chosen(all_variants: list[Variant], only: list[str] | None) -> list[Variant]:
    """Raises InputError for a name that no axis and no variant has."""
    if not only:
        return all_variants
    names = {name for variant in all_variants for name in (variant.axis, variant.name)}
    if unknown := set(only) - names:
        raise InputError(
            f"--only {sorted(unknown)[0]}: there is no such axis or variant; known: {', '.join(sorted(names))}"
        )
    return [variant for variant in all_variants if variant.axis in (BASELINE, *only) or variant.name in only]


def write_random_encoder(config: Config, path: Path, seed: int) -> None:
    """The baseline's nnU-Net with the weights that it had before training."""
    import torch

    from models.nnunet.checkpoint import load_nnunet_checkpoint, save_nnunet_checkpoint
    from models.nnunet.unet import SegmentationUNet

    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    torch.manual_seed(seed)
    network = SegmentationUNet(source.architecture)
    save_nnunet_checkpoint(path, network.state_dict_nnunet(), source.plans, source.configuration, source.dataset_json)


def commands_of(args: argparse.Namespace, variant: Variant, seed: int, folder: Path) -> list[list[str]]:
    """Stage 1 (none from scratch), Stage 2, scores. From scratch, Stage 2 has the epochs of both."""
    common = ["--config", str(folder / "paths.yaml"), "--batch_size", str(args.batch_size), "--seed", str(seed)]
    stage1 = ["train.py", *common, "--objective", variant.start, "--epochs", str(args.stage1_epochs),
              "--lr", str(args.stage1_lr)]  # fmt: skip
    scratch = variant.start == "scratch"
    start = ["--from_scratch"] if scratch else ["--vision_checkpoint", str(folder / "vision_bridge_best_val.pt")]
    epochs = args.epochs + (args.stage1_epochs if scratch else 0)
    stage2 = [
        "train_vlm.py",
        *common,
        *start,
        "--epochs",
        str(epochs),
        "--lr",
        str(args.lr),
        "--allow_collapsed",
        *variant.flags,
    ]
    scores = ["scripts/score_phantoms.py", "--checkpoint", str(folder / "vision_bridge_vlm_final.pt"),
              "--data", str(args.data), "--out", str(folder / "scores.json"), "--seed", str(seed),
              "--max_new_tokens", str(args.max_new_tokens)]  # fmt: skip
    return [*([] if scratch else [stage1]), stage2, scores]


def run_variant(args: argparse.Namespace, base: Config, variant: Variant, seed: int) -> tuple[Path, float]:
    """Run what has not been run with these very commands; its folder, and the seconds of the three commands.

    Raises:
        InputError: one of them failed; the message names its log.
    """
    folder = args.out / f"{variant.folder}_seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    keys = {**variant.keys, "output_dir": str(folder)}
    if variant.random_encoder:
        path = args.out / RANDOM_ENCODER
        if not path.is_file():
            write_random_encoder(base, path, seed)
        keys["nnunet_encoder_checkpoint"] = str(path)
    config = base.replace(**keys)
    commands = commands_of(args, variant, seed, folder)
    wanted = {"commands": commands, "config": config.to_dict()}
    done = folder / "done.json"
    if done.is_file():
        record = json.loads(done.read_text(encoding="utf-8"))
        if {key: record.get(key) for key in wanted} == json.loads(json.dumps(wanted)):
            return folder, record["seconds"]
    write_config(config, folder / "paths.yaml")
    started = time.perf_counter()
    with (folder / "run.log").open("a", encoding="utf-8") as log:
        for command in commands:
            code = subprocess.run(
                [sys.executable, *command], cwd=REPOSITORY, stdout=log, stderr=log, check=False
            ).returncode
            if code:
                raise InputError(
                    f"{variant.axis} {variant.name}: {command[0]} ended with status {code}, see {log.name}; "
                    "mend that, and the same command goes on from here"
                )
    seconds = time.perf_counter() - started
    done.write_text(json.dumps({**wanted, "seconds": seconds}), encoding="utf-8")
    return folder, seconds


def judge(args: argparse.Namespace, variant: Variant, seed: int, folder: Path, seconds: float) -> Outcome:
    truth = load_cases(args.data / "cases.json")
    cases = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["cases"]
    names = [Path(case["image"]).name.removesuffix(".nii.gz") for case in cases]
    scores = score_cases([truth[name] for name in names], [case["generated"] for case in cases])
    return Outcome(variant, seed, scores, read_losses(folder / "stage2_log.jsonl"), seconds)


def write_table(args: argparse.Namespace, outcomes: list[Outcome]) -> None:
    """What has come out so far, as Markdown and as JSON."""
    n = outcomes[0].scores["exact_acc"].n
    about = (
        f"Held-out synthetic cases: {n}. Stage 1: {args.stage1_epochs} epochs, Stage 2: {args.epochs} (from scratch: "
        f"{args.epochs + args.stage1_epochs}), batch {args.batch_size}. In brackets: 95 % bootstrap intervals."
    )
    command = " ".join(["python", "scripts/run_ablations.py", *sys.argv[1:]])
    (args.out / "ablations.md").write_text(markdown(outcomes, [command], about), encoding="utf-8")
    rows = [
        {"axis": o.variant.axis, "variant": o.variant.name, "keys": dict(o.variant.keys), "seed": o.seed,
         "scores": {name: score.as_dict() for name, score in o.scores.items()}, "val_loss": list(o.loss),
         "seconds": o.seconds}
        for o in outcomes
    ]  # fmt: skip
    (args.out / "ablations.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def main() -> None:
    args = parse_args()
    args.out, args.data = args.out.resolve(), args.data.resolve()
    base = load_config(args.base)
    todo = [(variant, seed) for variant in chosen(variants(base), args.only) for seed in args.seeds]
    outcomes: list[Outcome] = []
    for number, (variant, seed) in enumerate(todo, start=1):
        folder, seconds = run_variant(args, base, variant, seed)
        outcomes.append(judge(args, variant, seed, folder, seconds))
        write_table(args, outcomes)
        shown = ", ".join(f"{name} {score}" for name, score in outcomes[-1].scores.items())
        print(f"[{number}/{len(todo)}] {variant.axis}: {variant.name}, seed {seed}: {shown}", flush=True)
    print(f"table: {args.out / 'ablations.md'}", flush=True)


if __name__ == "__main__":
    run_main(main)
