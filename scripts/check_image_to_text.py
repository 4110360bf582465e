"""One image to text, from a checkpoint alone: it carries the set-up that it was trained with.

    python scripts/check_image_to_text.py --image scan.nii.gz
    python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_best_val.pt --max_visual_tokens 64

Without --checkpoint the newest stage's checkpoint in outputs/ is used, without --image a case of the validation table.
Several questions read the image once: the language model's state after the image is kept, and can be saved
(--save_prefix) and used again later (--prefix). The steps are in engine/image_to_text.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from engine.cli import add_model_flags, find_checkpoint, positive_int, run_main

GPU_TOKEN_CAP = 32  # with the LLM on a GPU beside other programs; --max_visual_tokens overrides it


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One image to text")
    parser.add_argument("--checkpoint", type=Path, help="default: the latest stage's in output_dir")
    parser.add_argument(
        "--config", type=Path, help="take tables, model folder and cache from here instead of the checkpoint"
    )
    parser.add_argument("--image", type=Path, help="any chest CT (NIfTI, DICOM, ...); default: a validation case")
    parser.add_argument("--mask", type=Path, help="lesion mask of --image, to choose the slices by")
    parser.add_argument("--index", type=int, default=0, help="which validation case, counted from 0")
    parser.add_argument(
        "--question", action="append", help="may be repeated; default: the case's own, or one of the prompt file"
    )
    parser.add_argument("--max_visual_tokens", type=positive_int, help="default: as in training")
    parser.add_argument("--max_new_tokens", type=positive_int, default=80)
    parser.add_argument("--llm_device", choices=("auto", "cpu"), default="cpu", help="auto: the GPU where there is one")
    parser.add_argument("--llm_8bit", action="store_true", help="int8 weights through bitsandbytes (GPU)")
    parser.add_argument("--llm_int8", action="store_true", help="int8 weights by our own layers (CPU and GPU)")
    parser.add_argument("--seed", type=int, default=42, help="for drawing a question, and for sampling")
    parser.add_argument("--save_prefix", type=Path, metavar="FILE", help="keep the state after reading the image")
    parser.add_argument("--prefix", type=Path, metavar="FILE", help="ask about the image of such a state: no vision")
    parser.add_argument("--stream", action="store_true", help="show the text while it is written")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: sampling")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest of this probability")
    parser.add_argument("--num_beams", type=int, default=1, help="beam search with so many")
    parser.add_argument("--repetition_penalty", type=float, default=1.0, help="above 1: against repeated tokens")
    parser.add_argument("--no_repeat_ngram_size", type=int, default=0, help="no run of so many tokens twice")
    parser.add_argument("--stop", action="append", metavar="TEXT", help=r"end before this text (\n: a new line)")
    parser.add_argument("--stop_at_restart", action="store_true", help="end where the report begins once more")
    add_model_flags(parser)
    return parser.parse_args()


def check_flags(args: argparse.Namespace) -> None:
    """Raises: InputError for a file that is not there, or flags that contradict each other."""
    if args.llm_8bit and args.llm_int8:
        from models.language_model.quantisation import CONTRADICTION

        raise InputError(CONTRADICTION)
    if args.stream and args.num_beams > 1:
        raise InputError("--stream with --num_beams: beams choose their text at the end only; leave one of them out")
    if args.image and not args.image.exists():
        raise InputError(f"--image not found: {args.image}; expected a CT as NIfTI, .mha, .nrrd or a DICOM series")
    if "" in (args.question or []):
        raise InputError("--question '': expected a question")
    for name, path in (("--save_prefix", args.save_prefix), ("--prefix", args.prefix)):
        if path and path.is_dir():
            raise InputError(f"{name} {path} is a folder: expected the name of a file")
    if args.prefix:
        others = {"mask": None, "index": 0, "max_visual_tokens": None, "save_prefix": None}
        for flag in [name for name, default in others.items() if getattr(args, name) != default]:
            raise InputError(f"--prefix holds an image that was read before: leave out --{flag}, or --prefix")


def main() -> None:
    # ---------------------------------------------------------------- flags, then the packages that take seconds
    args = parse_args()
    check_flags(args)
    path = args.checkpoint or find_checkpoint(args.config)
    from engine import image_to_text as steps
    from engine.checkpoint import load_checkpoint
    from models.language_model.mamba_lm import MambaLM
    from models.language_model.prefix_state import PrefixIdentity

    # ---------------------------------------------------------------- configuration and image
    options = steps.writing_options(args)
    llm_device = steps.best_device() if args.llm_device == "auto" else "cpu"
    checkpoint = load_checkpoint(path)
    config = steps.run_config(args, checkpoint, GPU_TOKEN_CAP if llm_device != "cpu" else None)
    steps.check_models(checkpoint, config)
    visuals, state, identity = [], None, None
    if args.prefix:
        case, state, identity = steps.load_prefix(args, checkpoint, config)
    else:
        case, visuals = steps.read_image(args, checkpoint, config)

    # ---------------------------------------------------------------- language model
    weights = {"load_in_8bit": args.llm_8bit, "int8": args.llm_int8, "adapters": checkpoint.adapters}
    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=llm_device, **weights)
    reading, origin = 0.0, "the image read with the question"
    if identity is not None:
        identity.check(PrefixIdentity.of_model(lm), str(args.prefix))
        origin = f"the image's state read from {args.prefix}"
    elif args.save_prefix or (len(case.questions) > 1 and not checkpoint.has_cmi):
        state, reading = steps.read_once(args, checkpoint, config, lm, visuals[0], case)
        origin = f"{reading:.2f} s of it for the image"

    # ---------------------------------------------------------------- questions and answers
    print(f"输入图像: {case.image}")
    for number, ids in enumerate(steps.encode(case.questions, lm.tokenizer, config)):
        print(f"问题: {case.questions[number]}", flush=True)
        if case.reference and number == 0:
            print(f"参考报告: {case.reference}", flush=True)
        print("生成文本: ", end="", flush=True)
        source = visuals[min(number, len(visuals) - 1)] if state is None else state
        seconds = steps.answer(lm, ids, source, args, options)
        print(f"time to first token: {seconds + reading:.2f} s ({origin})", flush=True)
        if reading:
            reading, origin = 0.0, "the image's state reused"


if __name__ == "__main__":
    run_main(main)
