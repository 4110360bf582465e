"""The steps of ``scripts/check_image_to_text.py``: configuration, visual tokens, the state after an image, an answer.

The vision part runs on the GPU where there is one. It is freed before the language model is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging.handlers
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config.errors import InputError
from config.schema import Config
from config.toy_models import check_toy_models
from data.cache import file_digest
from data.medical_vlm_dataset import encode_prompt
from data.tables.caption_table import CaptionRow, question_of, read_caption_table, read_prompts
from data.view_selection import ViewSelection
from engine import segmentation
from engine.checkpoint import Checkpoint
from engine.cli import local_config
from models.language_model.decoding import INCOMPLETE, CharacterStream, Decoding, FirstTokenClock, StopRule
from models.language_model.embedding_table import load_embedding_table
from models.language_model.mamba_lm import MambaLM, lm_identity, read_lm_config, read_tokenizer
from models.language_model.prefix_state import PrefixIdentity, PrefixState, answer_from_state, lm_size
from models.medical_vlm import generate_reports


@dataclass
class Case:
    """An image, the questions about it, and the report that a table has of it."""

    image: Path
    mask: Path | None
    questions: list[str]
    reference: str | None


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def writing_options(args: argparse.Namespace) -> dict[str, object]:
    """Keyword arguments of ``generate``. Raises: InputError for a value out of range."""
    decoding = Decoding(
        args.temperature, args.top_p, args.num_beams, args.repetition_penalty, args.no_repeat_ngram_size
    )
    stop = StopRule([text.replace("\\n", "\n") for text in args.stop or []], at_restart=args.stop_at_restart)
    return {**decoding.options(), "stop": stop}


def run_config(args: argparse.Namespace, checkpoint: Checkpoint, cap: int | None) -> Config:
    """The training configuration with what the flags and the GPU's token cap change in it; changes are printed."""
    trained = checkpoint.config
    config = local_config(args, trained)
    if args.config:
        changed = [key for key, value in config.to_dict().items() if value != getattr(trained, key)]
        print(f"note: from {args.config}, not from the checkpoint: {', '.join(changed) or 'nothing differs'}")
    if args.prefix:
        return config
    tokens, reason = token_budget(config, args.max_visual_tokens, cap)
    if reason:
        print(f"note: {tokens} visual tokens: {reason}; the checkpoint was trained with {trained.max_visual_tokens}")
    return config.replace(max_visual_tokens=tokens)


def token_budget(config: Config, wanted: int | None, cap: int | None) -> tuple[int, str]:
    """The number of visual tokens, and the reason where a flag or the cap decides.

    Args:
        config: with ``max_visual_tokens`` as in training.
        wanted: --max_visual_tokens; it overrides the cap.
        cap: for a GPU. It is raised to the least number that holds one token and the RoI of each slice, which
            training had room for.
    """
    trained = config.max_visual_tokens
    if wanted:
        return wanted, "--max_visual_tokens" if wanted != trained else ""
    if cap is None or cap >= trained:
        return trained, ""
    roi = config.roi_side**2 if config.roi_policy == "lesion" else 0
    tokens = min(trained, max(cap, config.slices * (1 + roi)))
    raised = f", raised to what {config.slices} slice(s) and their RoI need" if tokens > cap else ""
    return tokens, f"the GPU cap of {cap}{raised} (--max_visual_tokens overrides it)"


def check_models(checkpoint: Checkpoint, config: Config) -> None:
    """Raises: InputError when the language model's width is not the one that the tokens were trained for."""
    width = read_lm_config(config.mamba_model).hidden_size
    trained = checkpoint.llm
    if width != trained["width"]:
        raise InputError(
            f"mamba_model '{config.mamba_model}' has width {width}, {checkpoint.path} was trained for width "
            f"{trained['width']} ('{trained['name']}'): use that model"
        )
    if config.mamba_model != trained["name"]:
        print(f"note: language model {config.mamba_model}; the checkpoint was trained with {trained['name']}")
    if checkpoint.stage == "vision":
        print("note: a Stage-1 checkpoint: the text is no report before train_vlm.py has trained it too")
    if checkpoint.collapsed:
        print("warning: this checkpoint is stamped as collapsed: its tokens do not depend on the image")


def choose_case(args: argparse.Namespace, config: Config) -> Case:
    """--image, or a case of the validation table; with the reference report where a table has one."""
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
    return read_caption_table(config.resolved(key), image_root=config.table_root, path_map=config.path_map)


def _row_of(image: Path, config: Config) -> CaptionRow | None:
    """The row of this image in one of the tables, for its question and reference. An unreadable table is reported and
    skipped: the image needs none."""
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


def encode(questions: list[str], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[Tensor]:
    """Token ids (Lq,) of each question, cut at ``max_question_tokens``."""
    return [torch.tensor(encode_prompt(tokenizer, text, config.max_question_tokens)) for text in questions]


def read_image(args: argparse.Namespace, checkpoint: Checkpoint, config: Config) -> tuple[Case, list[Tensor]]:
    """The case and its visual tokens (1, L, D): one for all questions, or with CMI one for each.

    Raises:
        InputError: the image or its row cannot be read, or a toy model would read a scan that is not synthetic.
    """
    if checkpoint.has_cmi and args.save_prefix:
        raise InputError(
            f"--save_prefix: {checkpoint.path} has CMI, its visual tokens depend on the question, so there is no state "
            "to keep; leave the flag out"
        )
    case = choose_case(args, config)
    remedy = "use a checkpoint that was trained with your own models"
    check_toy_models(config, [case.image], args.allow_toy_model, remedy)
    if checkpoint.has_cmi and len(case.questions) > 1:
        print("note: with CMI the visual tokens depend on the question: the image is read for each anew")
    if case.mask is None and config.slice_policy == "mask":
        print("note: no lesion mask: the model sees the middle of the scan and may miss a lesion elsewhere")
    if config.roi_policy == "lesion" and case.mask is None and config.slice_policy != "nnunet":
        print("note: no lesion is known, so the tokens around it look at the centre")
    visuals = _visual_tokens(checkpoint, config, case)
    segmentation._network.cache_clear()  # the nnU-Net of slice_policy nnunet
    gc.collect()
    torch.cuda.empty_cache()
    return case, visuals


@torch.no_grad()
def _visual_tokens(checkpoint: Checkpoint, config: Config, case: Case) -> list[Tensor]:
    """CMI needs the questions' embeddings: the table alone is loaded for them."""
    plan, device, tokenizer = checkpoint.preprocess_plan, best_device(), read_tokenizer(config.mamba_model)
    vision = checkpoint.build_vision(config.max_visual_tokens).eval()
    selection = ViewSelection.from_config(config, plan, vision.encoder)
    view = segmentation.open_cache(config, plan).read(case.image, case.mask, selection)
    vision.to(device)
    images, position, roi = (part[None].to(device) for part in view)
    if vision.cmi is None:
        return [vision(images, position, roi=roi).cpu()]
    table, questions = load_embedding_table(config.mamba_model), encode(case.questions, tokenizer, config)
    asked = [(table[ids][None].to(device), torch.ones_like(ids)[None].to(device)) for ids in questions]
    return [vision(images, position, *question, roi=roi).cpu() for question in asked]


def _sources(checkpoint: Checkpoint, config: Config) -> dict[str, str]:
    """Digests of what turns an image into visual tokens."""
    framing = [checkpoint.preprocess_plan.to_dict(), config.slices, config.slice_policy]
    preprocessing = blake2b(json.dumps(framing, sort_keys=True).encode(), digest_size=20).hexdigest()
    return {"vision": file_digest(checkpoint.path).hex(), "preprocessing": preprocessing}


def load_prefix(
    args: argparse.Namespace, checkpoint: Checkpoint, config: Config
) -> tuple[Case, PrefixState, PrefixIdentity]:
    """The state of --prefix, checked against the checkpoint, the size of the language model, and --image."""
    state, identity = PrefixState.load(args.prefix)
    image = file_digest(args.image).hex() if args.image else ""
    size = lm_size(lm_identity(config.mamba_model))
    identity.check(PrefixIdentity(lm_size=size, image=image, **_sources(checkpoint, config)), str(args.prefix))
    row = CaptionRow(1, Path(identity.image_name), "", "", None)
    return Case(row.image_path, None, args.question or [_question(row, config, args.seed)], None), state, identity


def read_once(
    args: argparse.Namespace, checkpoint: Checkpoint, config: Config, lm: MambaLM, visual: Tensor, case: Case
) -> tuple[PrefixState, float]:
    """The state after the visual tokens, saved with --save_prefix, and the seconds that reading them took."""
    visual = visual.to(lm.model.device)
    started = time.perf_counter()
    state = PrefixState.read(lm, visual)
    state.recurrent.flatten()[0].item()  # waits for the GPU
    seconds = time.perf_counter() - started
    megabytes = state.nbytes / 1e6
    print(f"image state: {megabytes:.1f} MB, whatever the number of visual tokens (here {state.visual_tokens})")
    if args.save_prefix:
        mask = file_digest(case.mask).hex() if case.mask else "none"
        image = {"image": file_digest(case.image).hex(), "mask": mask, "image_name": str(case.image)}
        state.save(args.save_prefix, PrefixIdentity.of_model(lm, **_sources(checkpoint, config), **image))
        print(f"image state saved: {args.save_prefix}", flush=True)
    return state, seconds


def answer(
    lm: MambaLM, ids: Tensor, source: Tensor | PrefixState, args: argparse.Namespace, options: dict[str, object]
) -> float:
    """Print the answer to a question after visual tokens (1, L, D) or a state; returns seconds to the first token."""
    # transformers warns at length that its penalties apply to the answer alone; the manual says so.
    warnings.filterwarnings("ignore", message="Passing .* with `inputs_embeds`")
    torch.manual_seed(args.seed)  # for each question anew: its answer does not depend on those before
    if args.stream:
        write = functools.partial(print, end="", flush=True)
        options = {**options, "streamer": CharacterStream(lm.tokenizer, write, options["stop"])}
    device = lm.model.device
    batch = {"question_ids": ids[None].to(device), "question_mask": torch.ones_like(ids)[None].to(device)}
    generate = answer_from_state if isinstance(source, PrefixState) else generate_reports
    clock = FirstTokenClock()
    with deferred_logs():
        [text] = generate(lm, source.to(device), batch, args.max_new_tokens, **options, criteria=[clock])
        print("" if args.stream else text, flush=True)
    if text.endswith(INCOMPLETE):
        print("note: the text ends inside a character, whose last bytes were not written", flush=True)
    return clock.seconds


@contextlib.contextmanager
def deferred_logs() -> Iterator[None]:
    """Hold log lines and warnings back until the block ends, so that none lands inside streamed text."""
    buffer = logging.handlers.BufferingHandler(10_000)
    loggers = [(logger, logger.handlers) for logger in map(logging.getLogger, (None, "transformers"))]
    for logger, _ in loggers:
        logger.handlers = [buffer]
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers in loggers:
            logger.handlers = handlers
        for record in buffer.buffer:
            logging.getLogger(record.name).handle(record)
