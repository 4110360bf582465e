"""One image → text, with nothing but a checkpoint: it carries the set-up that it was trained with.

    python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_vlm_final.pt --image scan.nii.gz
    python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_best_val.pt --max_visual_tokens 64

Without --image it takes a case of the validation table (--index). The vision part is freed before the
language model is loaded.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

import torch

from config.errors import InputError
from config.schema import Config, keys_with_role, load_config
from data.cache import VolumeCache
from data.caption_table import CaptionRow, question_of, read_caption_table, read_prompts
from data.medical_vlm_dataset import CaptionCollator, Framing, Sample
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.cli import positive_int, run_main
from models.embedding_table import load_embedding_table
from models.mamba_lm import MambaLM, read_lm_config, read_tokenizer
from models.medical_vlm import VisionBridge, generate_reports

GPU_TOKEN_CAP = 32  # with the LLM on a GPU beside other programs; lifted by --max_visual_tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One image to text")
    parser.add_argument("--checkpoint", type=Path, required=True, help="written by train_vlm.py (or train.py)")
    parser.add_argument(
        "--config", type=Path, help="take tables, model folder and cache from here instead of the checkpoint"
    )
    parser.add_argument("--image", type=Path, help="any chest CT as NIfTI; default: a validation case")
    parser.add_argument("--mask", type=Path, help="lesion mask of --image, to choose the slices by")
    parser.add_argument("--index", type=int, default=0, help="which validation case, counted from 0")
    parser.add_argument("--question", help="default: the case's own, or one drawn from the prompt file")
    parser.add_argument("--max_visual_tokens", type=positive_int, help="default: as in training")
    parser.add_argument("--max_new_tokens", type=positive_int, default=80)
    parser.add_argument("--llm_device", choices=("auto", "cpu"), default="cpu", help="auto: the GPU where there is one")
    parser.add_argument("--llm_8bit", action="store_true", help="int8 weights through bitsandbytes (GPU)")
    parser.add_argument("--seed", type=int, default=42, help="for drawing a question")
    return parser.parse_args()


def resolve(args: argparse.Namespace, checkpoint: Checkpoint, device: torch.device) -> Config:
    """The training configuration; what a flag or the device changes in it is said aloud."""
    config = checkpoint.config
    if args.config:
        places = keys_with_role("path") + keys_with_role("place")
        local = load_config(args.config)
        config = config.replace(**{key: getattr(local, key) for key in places})
        said = [key for key in places if getattr(local, key) != getattr(checkpoint.config, key)]
        print(
            f"note: from {args.config}, not from the checkpoint: {', '.join(said) or 'nothing differs'}",
            flush=True,
        )
    trained = config.max_visual_tokens
    tokens = args.max_visual_tokens or (min(trained, GPU_TOKEN_CAP) if device.type != "cpu" else trained)
    if tokens != trained:
        why = (
            "--max_visual_tokens"
            if args.max_visual_tokens
            else f"the GPU cap of {GPU_TOKEN_CAP} (lift it with --max_visual_tokens)"
        )
        print(
            f"note: {tokens} visual tokens because of {why}; the checkpoint was trained with {trained}",
            flush=True,
        )
    return config.replace(max_visual_tokens=tokens)


def choose_case(args: argparse.Namespace, config: Config) -> tuple[Path, Path | None, str, str | None]:
    """Image, mask, question and (where the table has it) reference report."""
    if args.image is None:
        rows = _rows(config, "caption_csv_val")
        if not 0 <= args.index < len(rows):
            raise InputError(f"--index {args.index}: the validation table has cases 0 to {len(rows) - 1}")
        row = rows[args.index]
        return row.image_path, row.mask_path, args.question or _question(row, config, args.seed), row.answer
    if not args.image.is_file():
        raise InputError(f"--image not found: {args.image}; expected a NIfTI file (.nii or .nii.gz)")
    row = _row_of(args.image.resolve(), config)
    if row is None:
        row = CaptionRow(1, args.image.resolve(), "", "", None)
    question = args.question or _question(row, config, args.seed)
    return row.image_path, args.mask or row.mask_path, question, row.answer or None


def _rows(config: Config, key: str) -> list[CaptionRow]:
    root = Path(config.image_root) if config.image_root else None
    return read_caption_table(config.resolved(key), image_root=root, path_map=config.path_map)


def _row_of(image: Path, config: Config) -> CaptionRow | None:
    """The row of this image in one of the tables, for its question and reference; a table that cannot be
    read does not stop the check of an image that needs none."""
    for key in ("caption_csv_val", "caption_csv_train"):
        try:
            for row in _rows(config, key):
                if row.image_path.resolve() == image:
                    return row
        except InputError as error:
            print(f"note: no reference report looked up in {key}: {error}", flush=True)
    return None


def _question(row: CaptionRow, config: Config, seed: int) -> str:
    prompts = read_prompts(Path(config.caption_prompt_json)) if config.caption_prompt_json else []
    if not row.question and not prompts:
        raise InputError("no question: give --question, or set caption_prompt_json in the configuration")
    return question_of(row, prompts, seed)


def check_language_model(checkpoint: Checkpoint, config: Config) -> None:
    """Raises: InputError when the model's width is not the one the tokens were trained for."""
    width = read_lm_config(config.mamba_model).hidden_size
    trained = checkpoint.llm
    if width != trained["width"]:
        raise InputError(
            f"mamba_model '{config.mamba_model}' has width {width}, {checkpoint.path} was trained for width "
            f"{trained['width']} ('{trained['name']}'): use that model"
        )
    if config.mamba_model != trained["name"]:
        print(
            f"note: language model {config.mamba_model}; the checkpoint was trained with {trained['name']}",
            flush=True,
        )


@torch.no_grad()
def look(vision: VisionBridge, config: Config, batch: dict) -> torch.Tensor:
    """Visual tokens (1, L, D). CMI needs the question's embeddings: the table alone is loaded for it."""
    if vision.cmi is None:
        return vision(batch["images"], batch["slice_position"])
    question = load_embedding_table(config.mamba_model)[batch["question_ids"]]
    return vision(batch["images"], batch["slice_position"], question, batch["question_mask"])


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if args.llm_device == "auto" and torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(args.checkpoint)
    config = resolve(args, checkpoint, device)
    check_language_model(checkpoint, config)
    if checkpoint.stage == "vision":
        print(
            "note: this is a Stage-1 checkpoint; its tokens never met the language model, so the text is no report yet "
            "(train_vlm.py comes next)",
            flush=True,
        )
    if checkpoint.collapsed:
        print(
            "warning: this checkpoint is stamped as collapsed: its tokens say nothing about the image",
            flush=True,
        )

    image, mask, question, reference = choose_case(args, config)
    if mask is None and config.slice_policy == "mask":
        print("note: no lesion mask: the model sees the middle of the scan and may miss a lesion elsewhere", flush=True)
    plan = checkpoint.preprocess_plan
    vision = checkpoint.build_vision().eval()
    vision.bridge.max_visual_tokens = config.max_visual_tokens
    framing = Framing(plan, vision.encoder.total_stride, config.slices, config.slice_policy)
    images, position = framing(VolumeCache(Path(config.cache_dir), plan).get(image, mask))
    collator = CaptionCollator(read_tokenizer(config.mamba_model), config.max_question_tokens, config.max_answer_tokens)
    batch = collator([Sample(images, position, question, "", 0)])
    visual = look(vision, config, batch)
    del vision
    gc.collect()

    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=device, load_in_8bit=args.llm_8bit)
    on_device = {key: batch[key].to(device) for key in ("question_ids", "question_mask")}
    [text] = generate_reports(lm, visual.to(device), on_device, args.max_new_tokens)
    print(f"输入图像: {image}")
    print(f"问题: {question}")
    if reference:
        print(f"参考报告: {reference}")
    print(f"生成文本: {text}", flush=True)


if __name__ == "__main__":
    run_main(main)
