"""From nothing to reports: the whole system on synthetic chest CTs, on a CPU, in about ten minutes.

    python scripts/quickstart.py [--out outputs/quickstart] [--seed 42] [--fresh]

Makes .venv and installs the requirements on first use. Then it runs the real scripts, one after the other, on
OUT/paths.yaml, which stays there for any of them: phantoms, a small nnU-Net, a tiny Mamba, train.py,
train_vlm.py, reports for held-out cases. A finished step is not repeated; --fresh repeats all.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import environment

HELD_OUT = 120
SHOWN = 3


@dataclass(frozen=True)
class Step:
    """One script of the chain. ``steps``: optimizer steps, for the seconds per step; 0 where there are none."""

    name: str
    title: str
    command: list[str]
    steps: int = 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The whole system on synthetic data")
    parser.add_argument("--out", type=Path, default=environment.REPOSITORY / "outputs" / "quickstart")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fresh", action="store_true", help="repeat finished steps")
    return parser.parse_args()


def write_paths_yaml(out: Path) -> Path:
    """The configuration of the quick start, for its own steps and for whoever goes on from it."""
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
    path = out / "paths.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def plan(out: Path, config: Path, seed: int) -> list[Step]:
    train_cases, val_cases = 1600, 64
    seg_steps, lm_steps = 1800, 300
    align_epochs, caption_epochs, batch = 2, 10, 16
    per_epoch = -(-train_cases // batch)
    data, s = str(out / "data"), str(seed)
    return [
        Step("phantoms", "synthetic chest CTs with reports",
             ["scripts/make_phantoms.py", "--out", data, "--n_train", str(train_cases), "--n_val", str(val_cases),
              "--n_test", str(HELD_OUT), "--max_findings", "1", "--seed", s]),
        Step("segmentation", "a small nnU-Net for lesions",
             ["scripts/make_tiny_nnunet.py", "--data", data, "--out", str(out / "nnunet"), "--steps", str(seg_steps),
              "--seed", s], seg_steps),
        Step("language_model", "a tiny Mamba that writes reports",
             ["scripts/make_tiny_lm.py", "--out", str(out / "mamba_lm"), "--steps", str(lm_steps),
              "--seed", s], lm_steps),
        Step("stage1", "Stage 1: vision and bridge",
             ["train.py", "--config", str(config), "--objective", "align", "--epochs", str(align_epochs),
              "--batch_size", str(batch), "--lr", "4e-3", "--seed", s, "--resume", "auto"], per_epoch * align_epochs),
        Step("stage2", "Stage 2: through the frozen language model",
             ["train_vlm.py", "--config", str(config), "--vision_checkpoint", str(out / "vision_bridge_best_val.pt"),
              "--epochs", str(caption_epochs), "--batch_size", str(batch), "--lr", "6e-3", "--seed", s],
             per_epoch * caption_epochs),
        Step("scores", "reports for held-out cases",
             ["scripts/score_phantoms.py", "--checkpoint", str(out / "vision_bridge_vlm_final.pt"), "--data", data,
              "--out", str(out / "scores.json"), "--seed", s]),
    ]  # fmt: skip


def done_before(step: Step, out: Path) -> float | None:
    """The seconds that the step took when it finished with this very command; None if it has not."""
    done = out / "done" / f"{step.name}.json"
    if not done.is_file():
        return None
    record = json.loads(done.read_text(encoding="utf-8"))
    return record["seconds"] if record["command"] == step.command else None


def run_step(step: Step, out: Path) -> float:
    """Run one script; returns its seconds. A failing one ends the quick start with its status."""
    done = out / "done" / f"{step.name}.json"
    done.unlink(missing_ok=True)
    start = time.perf_counter()
    code = environment.call_patiently([sys.executable, *step.command], cwd=environment.REPOSITORY)
    if code != 0:
        print(
            f"error: step '{step.name}' failed with status {code}; the same command goes on from here", file=sys.stderr
        )
        sys.exit(code)
    seconds = time.perf_counter() - start
    done.parent.mkdir(parents=True, exist_ok=True)
    done.write_text(json.dumps({"command": step.command, "seconds": seconds}), encoding="utf-8")
    return seconds


def summarise(out: Path, steps: list[Step], seconds: dict[str, float], seed: int) -> dict:
    """Write OUT/summary.json; every score is the one that score_phantoms.py measured."""
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    cases = scores.pop("cases")
    summary = {
        **scores,
        "seed": seed,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "seconds_total": round(sum(seconds.values()), 1),
        "seconds_per_step": {s.name: round(seconds[s.name] / s.steps, 4) for s in steps if s.steps},
    }
    (out / "summary.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")
    return {**summary, "cases": cases}


def show(out: Path, summary: dict) -> None:
    """Three held-out cases as a table, with a picture of the slice that the model saw."""
    from rich.console import Console
    from rich.table import Table

    from data.imaging.reader import read_mask, read_volume
    from engine.figures import draw_case

    table = Table(title="held-out cases", show_lines=True)
    for heading in ("picture", "reference", "generated"):
        table.add_column(heading, overflow="fold")  # Chinese has no spaces to break at
    # Spread over the split, so that they are not all of one kind; not chosen by how good they are.
    cases = summary["cases"][:: max(1, len(summary["cases"]) // SHOWN)][:SHOWN]
    for number, case in enumerate(cases):
        picture = out / f"held_out_{number}.png"
        volume = read_volume(case["image"])
        draw_case(picture, volume, read_mask(case["mask"], volume))
        table.add_row(str(picture), case["reference"], case["generated"])
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    keys = ("location_acc", "type_acc", "size_within_4mm", "exact_acc", "garbled_rate")
    for name, scores in (("own image", summary), ("shuffled images", summary["shuffled_images"])):
        print(f"{name:>16}: " + "  ".join(f"{key} {scores[key]:.3f}" for key in keys) + f"  (n {scores['n']})")
    print(
        f"{summary['seconds_total']:.0f} s in all; {out / 'summary.json'}; go on with --config {out / 'paths.yaml'}",
        flush=True,
    )


def main() -> None:
    sys.path.insert(0, str(environment.REPOSITORY))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    args = parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    steps = plan(out, write_paths_yaml(out), args.seed)
    seconds: dict[str, float] = {}
    repeat = args.fresh
    for number, step in enumerate(steps, start=1):
        before = None if repeat else done_before(step, out)
        print(
            f"[{number}/{len(steps)}] {step.title}" + (f": done before ({before:.0f} s)" if before else ""), flush=True
        )
        repeat = before is None  # what follows a step that ran anew builds on its new result
        seconds[step.name] = run_step(step, out) if before is None else before
    show(out, summarise(out, steps, seconds, args.seed))


if __name__ == "__main__":
    if os.environ.get("MAMBA_CT_INSIDE") == "1":
        main()
    else:
        parse_args()  # a wrong flag is told before anything is installed
        environment.run_inside(Path(__file__).resolve())
