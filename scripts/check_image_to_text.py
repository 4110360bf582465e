"""One image → text, with nothing but a checkpoint: it carries the set-up that it was trained with.

    python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_vlm_final.pt --image scan.nii.gz
    python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_best_val.pt --max_visual_tokens 64

Without --image it takes a case of the validation table (--index). The vision part is freed before the
language model is loaded. Several questions read the image once: the language model's state after it is kept,
and can be saved (--save_prefix) and taken up later (--prefix).
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import time
import warnings
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config.errors import InputError
from config.schema import Config, keys_with_role, load_config
from data.cache import file_digest
from data.medical_vlm_dataset import encode_prompt
from data.tables.caption_table import CaptionRow, question_of, read_caption_table, read_prompts
from data.view_selection import ViewSelection
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.cli import positive_int, run_main
from engine.segmentation import open_cache
from models.language_model.decoding import INCOMPLETE, CharacterStream, Decoding, FirstTokenClock, StopRule
from models.language_model.embedding_table import load_embedding_table
from models.language_model.mamba_lm import MambaLM, lm_identity, read_lm_config, read_tokenizer
from models.language_model.prefix_state import PrefixIdentity, PrefixState, answer_from_state, lm_size
from models.language_model.quantisation import CONTRADICTION
from models.medical_vlm import generate_reports

GPU_TOKEN_CAP = 32  # with the LLM on a GPU beside other programs; lifted by --max_visual_tokens


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One image to text")
    parser.add_argument("--checkpoint", type=Path, required=True, help="written by train_vlm.py (or train.py)")
    parser.add_argument(
        "--config", type=Path, help="take tables, model folder and cache from here instead of the checkpoint"
    )
    parser.add_argument("--image", type=Path, help="any chest CT (NIfTI, DICOM, …); default: a validation case")
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
    return parser.parse_args()


def check_flags(args: argparse.Namespace) -> tuple[Decoding, StopRule]:
    """How to write. Raises: InputError for a value out of range, or flags that contradict each other."""
    decoding = Decoding(
        args.temperature, args.top_p, args.num_beams, args.repetition_penalty, args.no_repeat_ngram_size
    )
    stop = StopRule([text.replace("\\n", "\n") for text in args.stop or []], at_restart=args.stop_at_restart)
    if args.llm_8bit and args.llm_int8:
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
    return decoding, stop


@dataclass
class Case:
    """An image, what is asked about it, and the report that a table has of it."""

    image: Path
    mask: Path | None
    questions: list[str]
    reference: str | None


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
    if args.prefix:
        return config
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


def choose_case(args: argparse.Namespace, config: Config) -> Case:
    """What to ask about; the reference report where a table has one."""
    if args.image is None:
        rows = _rows(config, "caption_csv_val")
        if not 0 <= args.index < len(rows):
            raise InputError(f"--index {args.index}: the validation table has cases 0 to {len(rows) - 1}")
        row, mask = rows[args.index], rows[args.index].mask_path
    else:
        row = _row_of(args.image.resolve(), config) or CaptionRow(1, args.image.resolve(), "", "", None)
        mask = args.mask or row.mask_path
    return Case(row.image_path, mask, args.question or [_question(row, config, args.seed)], row.answer or None)


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


def say_what_it_is(checkpoint: Checkpoint) -> None:
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


def made_from(checkpoint: Checkpoint, config: Config) -> dict[str, str]:
    """Digests of what turns an image into visual tokens."""
    framing = [checkpoint.preprocess_plan.to_dict(), config.slices, config.slice_policy]
    preprocessing = blake2b(json.dumps(framing, sort_keys=True).encode(), digest_size=20).hexdigest()
    return {"vision": file_digest(checkpoint.path).hex(), "preprocessing": preprocessing}


def take_up(
    args: argparse.Namespace, checkpoint: Checkpoint, config: Config
) -> tuple[Case, PrefixState, PrefixIdentity]:
    """The image of --prefix, checked against the checkpoint, the size of the language model, and --image."""
    state, identity = PrefixState.load(args.prefix)
    image = file_digest(args.image).hex() if args.image else ""
    size = lm_size(lm_identity(config.mamba_model))
    identity.check(PrefixIdentity(lm_size=size, image=image, **made_from(checkpoint, config)), str(args.prefix))
    row = CaptionRow(1, Path(identity.image_name), "", "", None)
    return Case(row.image_path, None, args.question or [_question(row, config, args.seed)], None), state, identity


@torch.no_grad()
def look(checkpoint: Checkpoint, config: Config, case: Case, questions: list[Tensor]) -> list[Tensor]:
    """Visual tokens (1, L, D): once, or with CMI once for each question, on which they depend then.

    CMI needs the questions' embeddings: the table alone is loaded for them.
    """
    plan = checkpoint.preprocess_plan
    vision = checkpoint.build_vision().eval()
    vision.bridge.max_visual_tokens = config.max_visual_tokens
    framing = ViewSelection.from_config(config, plan, vision.encoder)
    view = framing(open_cache(config, plan).get(case.image, case.mask))
    images, position, roi = (part[None] for part in view)
    if vision.cmi is None:
        return [vision(images, position, roi=roi)]
    table = load_embedding_table(config.mamba_model)
    return [vision(images, position, table[ids][None], torch.ones_like(ids)[None], roi=roi) for ids in questions]


def see(args: argparse.Namespace, checkpoint: Checkpoint, config: Config) -> tuple[Case, list[Tensor]]:
    """The case and its visual tokens: one for all questions, or with CMI one for each."""
    if checkpoint.has_cmi and args.save_prefix:
        raise InputError(
            f"--save_prefix: {checkpoint.path} has CMI, its visual tokens depend on the question, so there is no state "
            "to keep; leave the flag out"
        )
    case = choose_case(args, config)
    if checkpoint.has_cmi and len(case.questions) > 1:
        print("note: with CMI the visual tokens depend on the question: the image is read for each anew", flush=True)
    if case.mask is None and config.slice_policy == "mask":
        print("note: no lesion mask: the model sees the middle of the scan and may miss a lesion elsewhere", flush=True)
    if config.roi_policy == "lesion" and case.mask is None and config.slice_policy != "nnunet":
        print("note: no lesion is known, so the tokens around it look at the centre", flush=True)
    visuals = look(checkpoint, config, case, encode(case.questions, read_tokenizer(config.mamba_model), config))
    gc.collect()  # the vision part is gone before the language model comes
    return case, visuals


def encode(questions: list[str], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Tensor]:
    return [torch.tensor(encode_prompt(tokenizer, text, config.max_question_tokens)) for text in questions]


def read_once(
    lm: MambaLM, visual: Tensor, case: Case, save_to: Path | None, sources: dict[str, str]
) -> tuple[PrefixState, float]:
    """The language model's state after the visual tokens, and the seconds that reading them took; saved if wished."""
    started = time.perf_counter()
    state = PrefixState.read(lm, visual)
    megabytes = state.nbytes / 1e6
    state.recurrent.flatten()[0].item()  # waits for a GPU to have it
    seconds = time.perf_counter() - started
    print(f"image state: {megabytes:.1f} MB, whatever the number of visual tokens (here {state.visual_tokens})")
    if save_to:
        mask = file_digest(case.mask).hex() if case.mask else "none"
        image = {"image": file_digest(case.image).hex(), "mask": mask, "image_name": str(case.image)}
        state.save(save_to, PrefixIdentity.of_model(lm, **sources, **image))
        print(f"image state saved: {save_to}", flush=True)
    return state, seconds


def answer(
    lm: MambaLM, ids: Tensor, source: Tensor | PrefixState, args: argparse.Namespace, options: dict[str, object]
) -> None:
    """Print the text that follows the visual tokens (1, L, D), or the state that has read them."""
    # transformers warns at length that its penalties look at the answer alone; the manual says so.
    warnings.filterwarnings("ignore", message="Passing .* with `inputs_embeds`")
    torch.manual_seed(args.seed)  # for each question anew: its answer does not depend on those before
    if args.stream:
        print("生成文本: ", end="", flush=True)
        write = functools.partial(print, end="", flush=True)
        options = {**options, "streamer": CharacterStream(lm.tokenizer, write, options["stop"])}
    generate = answer_from_state if isinstance(source, PrefixState) else generate_reports
    batch = {"question_ids": ids[None], "question_mask": torch.ones_like(ids)[None]}
    [text] = generate(lm, source, batch, args.max_new_tokens, **options)
    print("" if args.stream else f"生成文本: {text}", flush=True)
    if text.endswith(INCOMPLETE):
        print("note: the text ends inside a character, whose last bytes were not written", flush=True)


def main() -> None:
    args = parse_args()
    decoding, stop = check_flags(args)
    device = torch.device("cuda" if args.llm_device == "auto" and torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(args.checkpoint)
    config = resolve(args, checkpoint, device)
    check_language_model(checkpoint, config)
    say_what_it_is(checkpoint)
    state, identity, visuals, reading = None, None, [], 0.0
    if args.prefix:
        case, state, identity = take_up(args, checkpoint, config)
    else:
        case, visuals = see(args, checkpoint, config)

    weights = {"load_in_8bit": args.llm_8bit, "int8": args.llm_int8, "adapters": checkpoint.adapters}
    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=device, **weights)
    how = "the image read with the question"
    if identity is not None:
        identity.check(PrefixIdentity.of_model(lm), str(args.prefix))
        state, how = state.to(device), f"the image's state taken from {args.prefix}"
    elif args.save_prefix or (len(case.questions) > 1 and not checkpoint.has_cmi):
        state, reading = read_once(lm, visuals[0].to(device), case, args.save_prefix, made_from(checkpoint, config))
        how = f"{reading:.2f} s of it for the image"

    print(f"输入图像: {case.image}")
    for number, ids in enumerate(encode(case.questions, lm.tokenizer, config)):
        print(f"问题: {case.questions[number]}", flush=True)
        if case.reference and number == 0:
            print(f"参考报告: {case.reference}", flush=True)
        source = visuals[min(number, len(visuals) - 1)].to(device) if state is None else state
        clock = FirstTokenClock()
        answer(lm, ids.to(device), source, args, {**decoding.options(), "stop": stop, "criteria": [clock]})
        print(f"time to first token: {clock.seconds + reading:.2f} s ({how})", flush=True)
        if reading:
            reading, how = 0.0, "the image's state reused"


if __name__ == "__main__":
    run_main(main)
