"""One image to text, from a checkpoint alone: it carries the set-up that it was trained with.

    python scripts/check_image_to_text.py --demo
    python scripts/check_image_to_text.py --image scan.nii.gz
    python scripts/check_image_to_text.py --checkpoint outputs/vision_bridge_best_val.pt --max_visual_tokens 64

Without --checkpoint the latest stage's checkpoint in outputs/ is used, without --image a case of the validation table.
Several questions read the image once: the language model's state after the image is kept, and can be saved
(--save_prefix) and used again later (--prefix). The vision part is freed before the language model is loaded.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from config.errors import InputError
from engine.cli import (
    Parser,
    add_force_flag,
    add_reading_flags,
    find_checkpoint,
    leave_numba_out,
    positive_int,
    run_main,
)

GPU_TOKEN_CAP = 32  # with the LLM on a GPU beside other programs; --max_visual_tokens overrides it
DEMO_TOKENS = 200  # its tokenizer knows few Chinese characters whole


def parse_args() -> argparse.Namespace:
    parser = Parser(description="One image to text")
    parser.add_argument("--demo", action="store_true", help="the checkpoint and the synthetic scan of assets/demo")
    add_reading_flags(parser, llm_device="cpu")
    parser.add_argument("--image", type=Path, help="any chest CT (NIfTI, DICOM, ...); default: a validation case")
    parser.add_argument("--mask", type=Path, help="lesion mask of --image, for a checkpoint whose slices follow masks")
    parser.add_argument("--index", type=int, default=0, help="which validation case, counted from 0")
    parser.add_argument(
        "--question", action="append", help="may be repeated; default: the case's own, or one of the prompt file"
    )
    parser.add_argument(
        "--findings", metavar="TEXT", help="corrected findings prompt, e.g. 右肺上野结节12mm; --findings= for no lesion"
    )
    parser.add_argument("--max_visual_tokens", type=positive_int, help="default: as in training")
    parser.add_argument("--max_new_tokens", type=positive_int, default=80, help="a text is cut there")
    parser.add_argument("--llm_8bit", action="store_true", help="int8 weights through bitsandbytes (GPU)")
    parser.add_argument("--llm_int8", action="store_true", help="int8 weights by our own layers (CPU and GPU)")
    parser.add_argument(
        "--save_int8", type=Path, metavar="FOLDER", help="--llm_int8, kept in FOLDER: later runs map it into memory"
    )
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
    add_force_flag(parser)
    return parser.parse_args()


if __name__ == "__main__":
    if parse_args().demo:  # --help and a wrong flag are answered before the imports below
        leave_numba_out()
    gc.disable()  # they allocate much and free little: the collector takes some 3 % of the start

import contextlib
import functools
import json
import logging.handlers
import time
import warnings
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import psutil
import torch
from torch import Tensor

from config.schema import Config
from data.cache import file_digest
from data.findings import FindingRecord
from data.medical_vlm_dataset import encode_key_points, pad_tokens
from data.report_language.key_points import read_key_points, write_key_points
from data.report_language.labeller import label_report
from data.tables.caption_table import CaptionRow, read_caption_table
from engine import segmentation
from engine.chain import SHIPPED_DEMO
from engine.checkpoint import Checkpoint, load_checkpoint
from engine.findings_prompt import closest_reports, deviation_notice
from engine.reporting import (
    Reading,
    ScanReader,
    check_models,
    default_question,
    encode_questions,
    run_config,
)
from engine.run import best_device, limit_gpu_memory
from models.language_model.decoding import INCOMPLETE, CharacterStream, Decoding, FirstTokenClock, StopRule, Varied
from models.language_model.identity import lm_identity
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixIdentity, PrefixState, answer_from_state, lm_size
from models.language_model.quantisation import CONTRADICTION
from models.medical_vlm import generate_reports


def check_flags(args: argparse.Namespace) -> None:
    """Raises: InputError for a file that is not there, or flags that contradict each other."""
    if args.demo and (args.checkpoint or args.config):
        raise InputError("--demo brings its own checkpoint and configuration: leave out --checkpoint and --config")
    if args.llm_8bit and (args.llm_int8 or args.save_int8):
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
    if args.save_int8 and args.save_int8.is_file():
        raise InputError(f"--save_int8 {args.save_int8} is a file: expected the name of a folder")
    if args.prefix:
        others = {"mask": None, "index": 0, "max_visual_tokens": None, "save_prefix": None}
        for flag in [name for name, default in others.items() if getattr(args, name) != default]:
            raise InputError(f"--prefix holds an image that was read before: leave out --{flag}, or --prefix")


def decoding_of(args: argparse.Namespace) -> Decoding:
    """Raises: InputError for a value out of range."""
    return Decoding(args.temperature, args.top_p, args.num_beams, args.repetition_penalty, args.no_repeat_ngram_size)


def writing_options(args: argparse.Namespace) -> dict[str, object]:
    """Keyword arguments of ``generate``. Raises: InputError for a value out of range."""
    stop = StopRule([text.replace("\\n", "\n") for text in args.stop or []], at_restart=args.stop_at_restart)
    return {**decoding_of(args).options(), "stop": stop}


def check_findings(args: argparse.Namespace, checkpoint: Checkpoint, config: Config) -> None:
    """Raises: InputError for --findings with a checkpoint that knows no findings prompt."""
    if config.findings_prompt == "off" and args.findings is not None:
        raise InputError(f"--findings: {checkpoint.path} was trained without findings prompts; leave it out")


def choose_case(args: argparse.Namespace, config: Config) -> tuple[Reading, str]:
    """--image, or a case of the validation table, not read yet; and the reference report where a table has one."""
    if args.image is None:
        rows = _rows(config, "caption_csv_val")
        if not 0 <= args.index < len(rows):
            raise InputError(f"--index {args.index}: the validation table has cases 0 to {len(rows) - 1}")
        row, mask = rows[args.index], rows[args.index].mask_path
    else:
        row = _row_of(args.image.resolve(), config) or CaptionRow(1, args.image.resolve(), "", "", None)
        mask = args.mask or row.mask_path
    return Reading(row.image_path, mask, args.question or [default_question(row, config, args.seed)]), row.answer


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


def read_image(args: argparse.Namespace, checkpoint: Checkpoint, config: Config) -> tuple[Reading, str]:
    """The case as read, and its reference report; what read it is freed.

    Raises InputError: the image or its row cannot be read, it is no chest CT and not --force, or a toy model would read
    a scan that is not synthetic.
    """
    if checkpoint.has_cmi and args.save_prefix:
        raise InputError(
            f"--save_prefix: {checkpoint.path} has CMI, its visual tokens depend on the question, so there is no state "
            "to keep; leave the flag out"
        )
    case, reference = choose_case(args, config)
    if checkpoint.has_cmi and len(case.questions) > 1:
        print("note: with CMI the visual tokens depend on the question: the image is read for each anew")
    reader = ScanReader(checkpoint, config, allow_toy_model=args.allow_toy_model)
    reading = reader.read(case.image, case.mask, case.questions, force=args.force)
    del reader
    segmentation.free_network()
    return reading, reference


def _sources(checkpoint: Checkpoint, config: Config) -> dict[str, str]:
    """Digests of what turns an image into visual tokens."""
    settings = [checkpoint.preprocess_plan.to_dict(), config.slices, config.slice_policy]
    settings += [config.min_lesion_mm3] * (config.min_lesion_mm3 is not None)
    preprocessing = blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=20).hexdigest()
    return {"vision": file_digest(checkpoint.path).hex(), "preprocessing": preprocessing}


def load_prefix(
    args: argparse.Namespace, checkpoint: Checkpoint, config: Config
) -> tuple[Reading, PrefixState, PrefixIdentity]:
    """The state of --prefix, checked against the checkpoint, the size of the language model, and --image."""
    limit_gpu_memory(config.gpu_memory_fraction)
    state, identity = PrefixState.load(args.prefix)
    image = file_digest(args.image).hex() if args.image else ""
    size = lm_size(lm_identity(config.mamba_model))
    identity.check(PrefixIdentity(lm_size=size, image=image, **_sources(checkpoint, config)), str(args.prefix))
    row = CaptionRow(1, Path(identity.image_name), "", "", None)
    case = Reading(row.image_path, None, args.question or [default_question(row, config, args.seed)])
    case.notices, case.language = [kind for kind in identity.notices.split(",") if kind], identity.language
    case.key_points = identity.key_points
    return case, state, identity


def read_once(
    args: argparse.Namespace, checkpoint: Checkpoint, config: Config, lm: MambaLM, visual: Tensor, case: Reading
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
        image |= {"notices": ",".join(case.notices), "language": case.language, "key_points": case.key_points}
        state.save(args.save_prefix, PrefixIdentity.of_model(lm, **_sources(checkpoint, config), **image))
        print(f"image state saved: {args.save_prefix}", flush=True)
    return state, seconds


def answer(
    lm: MambaLM,
    ids: Tensor,
    source: Tensor | PrefixState,
    args: argparse.Namespace,
    options: dict[str, object],
    prompt: tuple[list[FindingRecord], Sequence[str], str] | None = None,
) -> float:
    """Print the answer to a question after visual tokens (1, L, D) or a state; returns seconds to the first token.

    ``prompt``: points, kinds and language of :func:`deviation_notice`, where the answer is to state a findings prompt.
    """
    # transformers warns at length that its penalties apply to the answer alone; the manual says so.
    warnings.filterwarnings("ignore", message="Passing .* with `inputs_embeds`")
    torch.manual_seed(args.seed)  # for each question anew: its answer does not depend on those before
    first, clock, source = options, FirstTokenClock(), source.to(lm.model.device)
    if args.stream:
        write = functools.partial(print, end="", flush=True)
        first = {**options, "streamer": CharacterStream(lm.tokenizer, write, options["stop"])}

    def generate(beginnings: list[str], **more: object) -> list[str]:
        known = [[*ids.tolist(), *lm.tokenizer.encode(text, add_special_tokens=False)] for text in beginnings]
        parts = zip(("question_ids", "question_mask"), pad_tokens(known), strict=True)
        batch = {name: part.to(lm.model.device) for name, part in parts}
        if isinstance(source, PrefixState):
            texts = answer_from_state(lm, source, batch, args.max_new_tokens, **more)
        else:
            texts = generate_reports(lm, source.expand(len(known), -1, -1), batch, args.max_new_tokens, **more)
        # A restart is one of the whole text's opening, which an ending alone does not have.
        return [options["stop"].cut(beginning + text) for beginning, text in zip(beginnings, texts, strict=True)]

    with deferred_logs():
        [written] = generate([""], **first, criteria=[clock])
        text = written
        # One that was cut cannot state everything, and a decoding that was asked for stays.
        if prompt and clock.tokens < args.max_new_tokens and decoding_of(args) == Decoding():
            points, *known = prompt

            def again(rows: list[int], noise: Varied, beginnings: list[str]) -> list[str]:
                return generate(beginnings, **options, logits_processor=[noise])

            [text] = closest_reports([written], [points], *known, str, again)
        other = text != written
        if other and args.stream:
            print("\nnote: this text does not state its findings prompt; the closest of several more:", flush=True)
        print(text if other or not args.stream else "", flush=True)
        if other and not args.stream:
            print("note: the first text did not state its findings prompt; this is the closest of several", flush=True)
        if prompt and (notice := deviation_notice(text, *prompt)):
            print(notice, flush=True)
    for finding in label_report(text, source="generated"):
        if finding.polarity != "absent":
            print(f"stated in the text: {finding.describe()}", flush=True)
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
        for record in dict.fromkeys(buffer.buffer):  # once, also where transformers' logger propagates (CI=true)
            logging.getLogger(record.name).handle(record)


def main() -> None:
    gc.enable()
    # ---------------------------------------------------------------- configuration and image
    times = {"start": time.time() - psutil.Process().create_time()}
    begun = time.perf_counter()
    args = parse_args()
    check_flags(args)
    if args.demo:
        args.checkpoint, args.config = SHIPPED_DEMO / "vision_bridge_vlm.pt", SHIPPED_DEMO / "paths.yaml"
        args.max_new_tokens = max(args.max_new_tokens, DEMO_TOKENS)
    path = args.checkpoint or find_checkpoint(args.config)
    options = writing_options(args)
    llm_device = best_device() if args.llm_device == "auto" else "cpu"
    checkpoint = load_checkpoint(path)
    config = run_config(args, checkpoint, GPU_TOKEN_CAP if llm_device != "cpu" and not args.prefix else None)
    check_models(checkpoint, config)
    check_findings(args, checkpoint, config)
    reference, state, identity = "", None, None
    if args.prefix:
        case, state, identity = load_prefix(args, checkpoint, config)
    else:
        case, reference = read_image(args, checkpoint, config)
    if args.findings is not None:
        case.key_points = write_key_points(read_key_points(args.findings, case.language), case.language)

    times["image"] = time.perf_counter() - begun

    # ---------------------------------------------------------------- language model
    weights = {"load_in_8bit": args.llm_8bit, "int8": args.llm_int8, "int8_folder": args.save_int8}
    lm = checkpoint.load_lm(config, llm_device, **weights)
    times["language model"] = time.perf_counter() - begun - times["image"]
    reading, origin = 0.0, "the image read with the question"
    if identity is not None:
        identity.check(PrefixIdentity.of_model(lm), str(args.prefix))
        origin = f"the image's state read from {args.prefix}"
    elif args.save_prefix or (len(case.questions) > 1 and not checkpoint.has_cmi):
        state, reading = read_once(args, checkpoint, config, lm, case.visuals[0], case)
        origin = f"{reading:.2f} s of it for the image"

    # ---------------------------------------------------------------- questions and answers
    print("\n".join([f"输入图像: {case.image}", *case.facts]), flush=True)
    if case.key_points:
        origin_of = "corrected by --findings" if args.findings is not None else config.findings_prompt
        print(f"findings prompt ({origin_of}): {case.key_points}", flush=True)
    known = torch.tensor(encode_key_points(lm.tokenizer, case.key_points), dtype=torch.long)
    for number, question in enumerate(encode_questions(case.questions, lm.tokenizer, config)):
        ids = torch.cat([known, question])
        print(f"问题: {case.questions[number]}", flush=True)
        if reference and number == 0:
            print(f"参考报告: {reference}", flush=True)
        print(f"生成文本: {case.notice}\n" if case.notice else "生成文本: ", end="", flush=True)
        source = case.visuals[min(number, len(case.visuals) - 1)] if state is None else state
        prompt, asks_for_report = None, number == 0 and args.question is None
        if asks_for_report and case.key_points:
            prompt = read_key_points(case.key_points, case.language), checkpoint.findings or (), case.language
        seconds = answer(lm, ids, source, args, options, prompt)
        print(f"time to first token: {seconds + reading:.2f} s ({origin})", flush=True)
        if reading:
            reading, origin = 0.0, "the image's state reused"
    times["text"] = time.perf_counter() - begun - times["image"] - times["language model"]
    print(f"time: {sum(times.values()):.3f} s = {' + '.join(f'{part} {value:.3f}' for part, value in times.items())}")


if __name__ == "__main__":
    run_main(main)
