"""Generate reports for held-out synthetic cases and compare them with what is drawn in the images.

    python scripts/score_phantoms.py --checkpoint outputs/quickstart/vision_bridge_vlm_final.pt \\
        --data outputs/quickstart/data --out outputs/quickstart/scores.json

The same with the images shuffled between cases tells whether the text depends on the image at all.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

import torch
from tqdm import tqdm

from config.errors import InputError
from config.schema import load_config
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.phantom.dataset import load_cases
from data.phantom.finding import Finding
from data.phantom.report import score_reports
from engine.checkpoint import load_checkpoint
from engine.cli import positive_int, run_main
from engine.segmentation import open_cache
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM

MAX_QUESTION_TOKENS = 128


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score generated reports on synthetic cases")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder that make_phantoms.py wrote")
    parser.add_argument("--config", type=Path, help="take model folder and cache from here instead of the checkpoint")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--language", choices=("zh", "en"), default="zh")
    parser.add_argument("--batch_size", type=positive_int, default=16)
    parser.add_argument("--max_new_tokens", type=positive_int, default=120)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True, help="JSON with scores and every generated report")
    return parser.parse_args()


def load_model(args: argparse.Namespace) -> tuple[MedicalVLM, MedicalVLMDataset]:
    """The checkpoint's model, and the split it is scored on."""
    checkpoint = load_checkpoint(args.checkpoint)
    config = load_config(args.config) if args.config else checkpoint.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=device, adapters=checkpoint.adapters)
    vision = checkpoint.build_vision().to(device).eval()
    config = checkpoint.config.replace(
        cache_dir=config.cache_dir, caption_prompt_json=str(args.data / "prompts.json"), image_root=None
    )
    table = args.data / f"{args.split}.csv"
    dataset = MedicalVLMDataset.from_config(
        config, table, open_cache(config, checkpoint.preprocess_plan), vision.encoder, args.seed
    )
    return MedicalVLM(vision, lm).eval(), dataset


def generate_all(
    model: MedicalVLM, dataset: MedicalVLMDataset, args: argparse.Namespace, order: list[int], name: str
) -> list[str]:
    """Reports for the questions of all cases, case i with the image of case ``order[i]``."""
    collator = CaptionCollator(model.lm.tokenizer, MAX_QUESTION_TOKENS, 1)  # answers are not read
    device = next(model.parameters()).device
    texts: list[str] = []
    bar = tqdm(total=len(order), desc=name, unit="case", dynamic_ncols=True, disable=None)
    for first in range(0, len(order), args.batch_size):
        cases = range(first, min(first + args.batch_size, len(order)))
        samples = [replace(dataset[order[case]], question=dataset.questions[case]) for case in cases]
        batch = {key: value.to(device) for key, value in collator(samples).items()}
        texts += model.generate(batch, args.max_new_tokens)
        bar.update(len(samples))
    bar.close()
    return texts


def shuffled_order(count: int, seed: int) -> list[int]:
    """A permutation in which no case keeps its own image."""
    around = list(range(count))
    random.Random(seed).shuffle(around)
    order = [0] * count
    for position, case in enumerate(around):
        order[case] = around[(position + 1) % count]
    return order


def main() -> None:
    args = parse_args()
    truth_of = load_cases(args.data / "cases.json")
    model, dataset = load_model(args)
    if len(dataset) < 2:
        raise InputError(
            f"{args.data / args.split}.csv has {len(dataset)} case; at least 2 are needed to shuffle images"
        )
    names = [row.image_path.name.removesuffix(".nii.gz") for row in dataset.rows]
    truth: list[list[Finding]] = [truth_of[name] for name in names]

    own = generate_all(model, dataset, args, list(range(len(dataset))), "held-out reports")
    order = shuffled_order(len(dataset), args.seed)
    # The shuffled image's report answers the original case's findings: right only by chance.
    other = generate_all(model, dataset, args, order, "shuffled images")
    scores = score_reports(truth, own, args.language)
    scores["shuffled_images"] = score_reports(truth, other, args.language)
    cases = [
        {"image": str(row.image_path), "mask": str(row.mask_path), "reference": row.answer, "generated": text}
        for row, text in zip(dataset.rows, own, strict=True)
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**scores, "cases": cases}, ensure_ascii=False, indent=1), encoding="utf-8")
    shown = {key: value for key, value in scores.items() if key != "shuffled_images"}
    print("scores:", json.dumps(shown), flush=True)
    print("shuffled images:", json.dumps(scores["shuffled_images"]), flush=True)


if __name__ == "__main__":
    run_main(main)
