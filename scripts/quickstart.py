"""From nothing to reports: the whole system on synthetic chest CTs, on a CPU, in about ten minutes.

    python scripts/quickstart.py [--out outputs/quickstart] [--seed 42] [--fresh]

On first use .venv is made and the requirements are installed. Then the real scripts run one after the other on
OUT/paths.yaml: phantoms, a small nnU-Net, a tiny Mamba, train.py, train_vlm.py, the report card of held-out cases.
A finished step is not repeated; --fresh repeats all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

import environment
from config.files import write_text  # nothing but the standard library: .venv may not be installed yet


class Step(NamedTuple):
    """One script of the chain."""

    name: str
    title: str
    command: list[str]
    steps: int = 0  # optimizer steps, for the seconds per step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The whole system on synthetic data")
    parser.add_argument("--out", type=Path, default=environment.REPOSITORY / "outputs" / "quickstart")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fresh", action="store_true", help="repeat finished steps")
    return parser.parse_args()


def write_paths_yaml(out: Path) -> Path:
    """Write the configuration of the quick start, which any script can take with ``--config``."""
    out_posix = out.as_posix()
    text = f"""# Written by scripts/quickstart.py; every key is explained in config/paths.yaml.
caption_csv_train: {out_posix}/data/train.csv
caption_csv_val: {out_posix}/data/val.csv
caption_prompt_json: {out_posix}/data/prompts.json
cache_dir: {out_posix}/cache
output_dir: {out_posix}
nnunet_encoder_checkpoint: {out_posix}/nnunet/fold_0/checkpoint_best.pth
mamba_model: {out_posix}/mamba_lm
encoder_target_spatial: 8
train_encoder: false
augment_shift: 2
bridge_depth: 1
bridge_width: 192
max_visual_tokens: 16
"""
    write_text(out / "paths.yaml", text)
    return out / "paths.yaml"


def plan(out: Path, config: Path, seed: int) -> list[Step]:
    """The chain: about 1300 + 300 + 200 + 1000 optimizer steps."""
    cases, batch, seg_steps, lm_steps, align_epochs, caption_epochs = 1600, 16, 1300, 300, 2, 10
    per_epoch = cases // batch
    stage = ["--config", config, "--batch_size", batch]
    chain = [
        ("phantoms", "synthetic chest CTs with reports", 0,
         ["scripts/make_phantoms.py", "--out", out / "data", "--n_train", cases, "--n_val", 64, "--n_test", 120,
          "--max_findings", 1]),
        ("segmentation", "a small nnU-Net for lesions", seg_steps,
         ["scripts/make_tiny_nnunet.py", "--data", out / "data", "--out", out / "nnunet", "--steps", seg_steps]),
        ("language_model", "a tiny Mamba that writes reports", lm_steps,
         ["scripts/make_tiny_lm.py", "--out", out / "mamba_lm", "--steps", lm_steps]),
        ("stage1", "Stage 1: vision and bridge", per_epoch * align_epochs,
         ["train.py", *stage, "--objective", "align", "--epochs", align_epochs, "--lr", "4e-3", "--resume", "auto"]),
        ("stage2", "Stage 2: through the frozen language model", per_epoch * caption_epochs,
         ["train_vlm.py", *stage, "--vision_checkpoint", out / "vision_bridge_best_val.pt", "--epochs", caption_epochs,
          "--lr", "6e-3"]),
        ("scores", "reports for held-out cases, and their report card", 0,
         ["scripts/evaluate_reports.py", "--checkpoint", out / "vision_bridge_vlm_final.pt", "--csv",
          out / "data" / "test.csv", "--out", out / "card", "--maps", 0, "--pointing_cases", 0, "--same_finding",
          "miliary=tree_in_bud", "--max_new_tokens", 120]),
    ]  # fmt: skip
    return [Step(name, title, [*map(str, words), "--seed", str(seed)], steps) for name, title, steps, words in chain]


def run_step(step: Step, out: Path, repeat: bool = False) -> tuple[float, bool]:
    """Run one script unless it has finished with this very command. A failing one ends the quick start.
    Returns the seconds that it took, and whether it ran now."""
    done = out / "done" / f"{step.name}.json"
    record = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if not repeat and record.get("command") == step.command:
        print(f"{step.title}: done before ({record['seconds']:.0f} s)", flush=True)
        return record["seconds"], False
    print(step.title, flush=True)
    done.unlink(missing_ok=True)
    start = time.perf_counter()
    if code := environment.call_patiently([sys.executable, *step.command], cwd=environment.REPOSITORY):
        print(
            f"error: step '{step.name}' failed with status {code}; the same command goes on from here", file=sys.stderr
        )
        sys.exit(code)
    seconds = time.perf_counter() - start
    write_text(done, json.dumps({"command": step.command, "seconds": seconds}))
    return seconds, True


def summarise(out: Path, steps: list[Step], seconds: dict[str, float], seed: int) -> dict:
    """Write OUT/summary.json, and OUT/scores.json with every generated report too; the scores are the report card's."""
    whole_card = json.loads((out / "card" / "report_card.json").read_text(encoding="utf-8"))
    card = whole_card["whole_reports"]
    own, shuffled = (
        {name: score["value"] for name, score in scores.items()} | {"n": scores["garbled_rate"]["n"]}
        for scores in (card["own"], card["shuffled"])
    )
    summary = {
        **own,
        "normal_false_finding_rate": whole_card["audit"]["normal_false_finding_rate"],
        "shuffled_images": shuffled,
        "seed": seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
        "seconds_per_step": {s.name: round(seconds[s.name] / s.steps, 4) for s in steps if s.steps},
    }
    with (out / "card" / "reports.csv").open(encoding="utf-8-sig", newline="") as stream:
        cases = list(csv.DictReader(stream))
    write_text(out / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1))
    write_text(out / "scores.json", json.dumps({**summary, "cases": cases}, ensure_ascii=False, indent=1))
    return {**summary, "cases": cases}


def show(out: Path, summary: dict, number: int = 3) -> None:
    """Print some held-out cases as a table, each with a figure of the slice that the model was shown."""
    from rich.console import Console
    from rich.table import Column, Table

    from data.imaging.reader import read_mask, read_volume
    from engine.figures import draw_case

    # Chinese has no spaces to break lines at.
    columns = [Column(heading, overflow="fold") for heading in ("figure", "reference", "generated")]
    table = Table(*columns, title="held-out cases", show_lines=True)
    # Spread over the split, so that they are not all of one kind; not chosen by how good they are.
    cases = summary["cases"][:: max(1, len(summary["cases"]) // number)][:number]
    for index, case in enumerate(cases):
        volume, figure = read_volume(case["image_path"]), out / f"held_out_{index}.png"
        draw_case(figure, volume, read_mask(out / "data" / "masks" / volume.path.name, volume))
        table.add_row(str(figure), case["reference"], case["generated"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    keys = ("location_acc", "type_acc", "size_within_4mm", "exact_acc", "garbled_rate", "missed_lesion_rate")
    for name, scores in (("own image", summary), ("shuffled images", summary["shuffled_images"])):
        print(f"{name:>16}: " + "  ".join(f"{key} {scores[key]:.3f}" for key in keys) + f"  (n {scores['n']})")
    print(f"{summary['seconds_total']:.0f} s in all; {out / 'summary.json'}; report card: {out / 'card'}; "
          f"go on with --config {out / 'paths.yaml'}", flush=True)  # fmt: skip


def main() -> None:
    args = parse_args()
    out = args.out.resolve()
    steps = plan(out, write_paths_yaml(out), args.seed)
    seconds: dict[str, float] = {}
    repeat = args.fresh
    for number, step in enumerate(steps, start=1):
        print(f"[{number}/{len(steps)}] ", end="")
        seconds[step.name], repeat = run_step(step, out, repeat)  # the steps after one that ran use its new result
    show(out, summarise(out, steps, seconds, args.seed))


if __name__ == "__main__":
    if os.environ.get("MAMBA_CT_INSIDE") == "1":
        main()
    else:
        parse_args()  # a wrong flag is reported before anything is installed
        environment.run_inside(Path(__file__).resolve())
