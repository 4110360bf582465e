"""From nothing to reports: the whole system on synthetic chest CTs, on a CPU, in about six minutes.

    python scripts/quickstart.py [--out outputs/quickstart] [--seed 42] [--fresh] [--from_scratch]

On first use .venv is made and the requirements are installed. Then the real scripts run one after the other on
OUT/paths.yaml: phantoms, train.py, train_vlm.py, the report card of held-out cases without masks. In assets/ lie what a
user would bring, a small nnU-Net and a tiny Mamba that never read a report, and what Stage 0 makes of these training
reports, which takes ten minutes; --from_scratch makes all three anew.
A finished step is not repeated; --fresh repeats all.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.files import write_text  # nothing but the standard library: .venv may not be installed yet
from engine import chain
from engine.environment import REPOSITORY, run_inside

SETTING = chain.Setting(
    train=315, val=40, test=60, max_findings=1, stage0_steps=1600, align_epochs=12, caption_epochs=8
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The whole system on synthetic data")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "outputs" / "quickstart")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--fresh", action="store_true", help="repeat finished steps")
    parser.add_argument("--from_scratch", action="store_true", help="make the models and adapters of assets/ anew, too")
    return parser.parse_args()


def plan(out: Path, seed: int, from_scratch: bool = False) -> list[chain.Step]:
    """Write OUT/paths.yaml; the chain on it."""
    models, made = chain.Models(chain.SHIPPED_NNUNET, chain.SHIPPED_LANGUAGE_MODEL), []
    keys = {"language_model_adapters": chain.SHIPPED_ADAPTERS}
    if from_scratch:
        models, keys = chain.Models(out / "nnunet" / "fold_0" / "checkpoint_best.pth", out / "mamba_general"), {}
        made = [chain.segmentation(out, seed), chain.language_model(models.language_model, seed)]
        made.append(chain.stage0(SETTING, out, seed))
    chain.write_paths_yaml(out, models, keys=keys)
    trained = chain.training(SETTING, out, seed)
    return [chain.phantoms(SETTING, out, seed), *made, *trained, chain.scores(SETTING, out, seed)]


def summarise(out: Path, steps: list[chain.Step], seconds: dict[str, float], seed: int) -> dict:
    """Write OUT/summary.json, and OUT/scores.json with every generated report too; the scores are the report card's."""
    card = chain.read_card(out / "card")
    own, shuffled = (
        {name: score["value"] for name, score in scores.items()} | {"n": scores["garbled_rate"]["n"]}
        for scores in (card["whole_reports"]["own"], card["whole_reports"]["shuffled"])
    )
    summary = {
        **own,
        **chain.main_scores(card),
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
    print(chain.compared(summary))
    print(f"{summary['seconds_total']:.0f} s in all; {out / 'summary.json'}; report card: {out / 'card'}; "
          f"go on with --config {out / 'paths.yaml'}", flush=True)  # fmt: skip


def main() -> None:
    args = parse_args()
    out = args.out.resolve()
    steps = plan(out, args.seed, args.from_scratch)
    seconds = chain.run_steps(steps, out, args.fresh)
    show(out, summarise(out, steps, seconds, args.seed))


if __name__ == "__main__":
    if os.environ.get("MAMBA_CT_INSIDE") == "1":
        main()
    else:
        parse_args()  # a wrong flag is reported before anything is installed
        run_inside(Path(__file__).resolve())
