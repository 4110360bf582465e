"""Evaluate the reports of a checkpoint: quality, dependence on the image, confidence of each sentence, saliency maps.

    python scripts/evaluate_reports.py --checkpoint outputs/vision_bridge_vlm_best_val.pt --csv test.csv \\
        --out outputs/card
    accelerate launch scripts/evaluate_reports.py --checkpoint outputs/vision_bridge_vlm_best_val.pt --csv test.csv \\
        --out outputs/card

Writes OUT/report_card.json, report_card.md, report_card.html (with its figures embedded), reports.csv, maps/*.png and
maps/*.nii.gz. The generated reports are kept in OUT/generations-*.jsonl: a second start resumes from them.
Every measure is defined in docs/evaluation.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, add_force_flag, add_model_flags, add_view_flag, positive_int, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Evaluate the reports of a checkpoint")
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="written by train_vlm.py")
    add("--csv", type=Path, required=True, help="table of held-out cases")
    add("--out", type=Path, required=True, help="folder of the report card")
    add("--config", type=Path, help="take tables, model folder and cache from here instead of the checkpoint")
    add("--batch_size", type=positive_int, default=16, help="cases generated together, per process")
    add("--limit", type=positive_int, help="only the first so many cases")
    add("--max_new_tokens", type=positive_int, default=300, help="a report is cut there")
    add("--calibration_csv", type=Path, help="cases to calibrate confidence on; default: caption_csv_val")
    add("--abstain_below", type=float, default=0.5, help="surer sentences are not marked")
    add("--samples", type=int, default=0, help="reports sampled per case, for agreement; 0: none")
    add("--corrections", type=int, default=0, help="cases written again with one point of the prompt changed")
    add("--maps", type=int, default=12, help="cases whose maps are saved as PNG and NIfTI")
    add("--pointing_cases", type=int, help="at most so many cases for the pointing game; default: all")
    add("--attribution", choices=("evidence", "integrated", "occlusion"), default="evidence", help="of the maps")
    add("--mask_labels", nargs="+", metavar="N=FINDING", help="names of mask values, or nnU-Net's dataset.json")
    add("--same_finding", nargs="+", metavar="A=B", help="count finding A as B, in reports and references alike")
    add("--language", choices=("auto", "zh", "en"), default="auto", help="of the reports")
    add("--seed", type=int, default=42, help="of every random number")
    add_view_flag(parser)
    add_force_flag(parser)
    add_model_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from engine.evaluation.pipeline import evaluate

    evaluate(args)


if __name__ == "__main__":
    run_main(main)
