"""Stage 0: teach a frozen language model to write your reports, from their text alone.

    python scripts/adapt_language_model.py
    python scripts/adapt_language_model.py --extra_reports reports.txt --extra_reports more.xlsx

It learns "key points, question → report" by low-rank adapters on all linear layers of the mixers. The key points are
read from each report; sizes, sides and zones are changed at random in both, so that it learns to write what the prompt
states instead of learning the reports by heart. Writes OUTPUT/language_model_adapters.safetensors for the configuration
key language_model_adapters; Stage 2 then goes on with the model frozen.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Interrupted, Parser, add_model_flags, config_from, positive_float, positive_int, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Stage 0: adapt the language model to the text of reports")
    parser.add_argument("--config", type=Path, help="configuration file (default: config/paths.yaml)")
    parser.add_argument("--output_dir", type=Path, help="where the adapters go (default: the configuration's)")
    parser.add_argument(
        "--extra_reports", type=Path, action="append", default=[], metavar="FILE",
        help="more reports, without images: .txt with one a line, or a table with a report column; repeatable",
    )  # fmt: skip
    parser.add_argument("--steps", type=positive_int, default=1600, help="at most; it stops early")
    parser.add_argument("--batch_size", type=positive_int, default=8, help="reports per step")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="peak learning rate")
    parser.add_argument("--rank", type=positive_int, default=64, help="of the adapters")
    bf16 = "auto: bf16 on a GPU or CPU that computes in it"
    parser.add_argument("--mixed_precision", choices=("auto", "no", "bf16"), default="auto", help=bf16)
    parser.add_argument("--seed", type=int, default=42, help="of every random number")
    add_model_flags(parser)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from config.errors import InputError, counted
from config.schema import Config
from data.medical_vlm_dataset import encode_answer, encode_prompt, pad_tokens
from data.report_language.key_points import key_points_of, point_key, write_key_points
from data.report_language.labeller import detect_language, known_language
from data.report_language.report_changes import change_together, stated_words
from data.report_language.sections import split_sections
from data.tables.caption_table import question_of, read_caption_table, read_prompts, read_reports
from engine.run import start_run
from engine.training.optimization import build_optimizer, build_schedule, require_finite
from models.language_model.adapter_file import ADAPTER_FILE, KEY, save_adapters
from models.language_model.lora import MIXER_LAYERS, Adapters
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import answer_inputs, generate_reports

LEAST_REPORTS = 20
HELD_OUT = 64  # reports that the loss is measured on
GENERATED = 20  # of them, reports written from their key points
WITHOUT_KEY_POINTS = 0.1  # of the reports in training: the model is also to write what an image alone tells it
STATED_WEIGHT = 4.0  # in the loss, of tokens that state a finding, its place or its size: few, and all that is copied
FEW_KEY_POINTS, ALL_REPORTS = 0.15, 0.5  # of the training, up to which the simplest are drawn, and from which on any
PATIENCE = 0.2  # of the training without a lower loss, once all reports are drawn
BATCHES = 4  # that are drawn at once
EVERY = 60  # steps between validations
Pair = tuple[str, str, str]  # key points, question, report


class ReportPairs:
    """Prompts and reports, those with the fewest key points first. Without key points: all where ``language`` is None,
    else those in another language."""

    def __init__(self, reports: list[str], questions: list[str], language: str | None, seed: int) -> None:
        self.questions, self.language = questions, language
        self.choose, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.reports = sorted(reports, key=self.points)
        self.drawn: list[list[Pair]] = []

    def points(self, report: str) -> int:
        """How many key points a report has."""
        return len(key_points_of(report, self.language)) if detect_language(report) == self.language else 0

    def batch(self, done: float, size: int) -> list[Pair]:
        """``size`` pairs of about one length: several batches are drawn at once, which saves a quarter of padding.
        ``done``: as for :meth:`draw`."""
        if not self.drawn:
            pairs = sorted((self.draw(done) for _ in range(BATCHES * size)), key=lambda pair: len(pair[2]))
            self.drawn = batches(pairs, size)
            self.choose.shuffle(self.drawn)
        return self.drawn.pop()

    def draw(self, done: float) -> Pair:
        """A report changed at random, after its key points or without them. ``done``: fraction of the training. Early
        on it is one of the third with the fewest key points: copying one is learnt sooner than copying three
        (curriculum learning, Bengio et al. 2009)."""
        reach = np.interp(done, (FEW_KEY_POINTS, ALL_REPORTS), (1 / 3, 1.0))
        pool = self.reports[: max(1, math.ceil(reach * len(self.reports)))]
        report, question = self.choose.choice(pool), self.choose.choice(self.questions)
        if detect_language(report) == self.language:
            report = change_together(report, self.language, self.rng)
        without = self.choose.random() < WITHOUT_KEY_POINTS
        return "" if without else self.key_points(report), question, report

    def fixed(self, reports: list[str]) -> list[Pair]:
        """Reports as they are, after their key points."""
        return [(self.key_points(r), self.questions[i % len(self.questions)], r) for i, r in enumerate(reports)]

    def key_points(self, report: str) -> str:
        if detect_language(report) != self.language:
            return ""
        return write_key_points(key_points_of(report, self.language), self.language)


def batches(pairs: list[Pair], size: int) -> list[list[Pair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


class Writer:
    """The language model on pairs: its loss, and the reports that it writes."""

    def __init__(self, lm: MambaLM, config: Config) -> None:
        self.lm, self.config = lm, config

    def without_image(self, pairs: list[Pair]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """No visual tokens (B, 0, D), and the batch of prompts and reports."""
        prompts = [
            encode_prompt(self.lm.tokenizer, pair[1], self.config.max_question_tokens, pair[0]) for pair in pairs
        ]
        batch, device = {}, self.lm.model.device
        for name, ids in (("question", prompts), ("answer", [self.answer(pair) for pair in pairs])):
            batch[f"{name}_ids"], batch[f"{name}_mask"] = (part.to(device) for part in pad_tokens(ids))
        return torch.zeros(len(pairs), 0, self.lm.width, device=device), batch

    def log_probs(self, pairs: list[Pair]) -> torch.Tensor:
        """Log-probability of each token of the reports (N,), one report after the other."""
        return self.lm.answer_log_probs(*answer_inputs(self.lm, *self.without_image(pairs)))[0]

    def answer(self, pair: Pair) -> list[int]:
        return encode_answer(self.lm.tokenizer, pair[2], self.config.max_answer_tokens)[0]

    def loss(self, pairs: list[Pair], language: str | None) -> torch.Tensor:
        """Mean over the tokens of the reports in nats; those that state something count more."""
        weights = torch.tensor([weight for pair in pairs for weight in self.weights(pair, language)])
        log_probs = self.log_probs(pairs)
        weights = weights.to(log_probs)
        return -(log_probs * weights).sum() / weights.sum()

    def weights(self, pair: Pair, language: str | None) -> list[float]:
        """Of each token of the report and of its end."""
        report, count = pair[2], len(self.answer(pair))
        if language is None or not self.lm.tokenizer.is_fast:
            return [1.0] * count
        stated = np.zeros(len(report) + 1, bool)
        for start, end in stated_words(report, language):
            stated[start:end] = True
        spans = self.lm.tokenizer(report, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found = [STATED_WEIGHT if stated[start : max(end, start + 1)].any() else 1.0 for start, end in spans]
        return [*found, 1.0][:count]

    @torch.no_grad()
    def held_out_loss(self, pairs: list[Pair], language: str | None, batch_size: int) -> float:
        """Mean of :meth:`loss` over the batches: wording is soon learnt by heart, while copying still gets better."""
        return float(np.mean([float(self.loss(part, language)) for part in batches(pairs, batch_size)]))

    @torch.no_grad()
    def nats_per_character(self, pairs: list[Pair], batch_size: int) -> float:
        total = sum(float(self.log_probs(part).sum()) for part in batches(pairs, batch_size))
        return -total / sum(len(pair[2]) for pair in pairs)

    @torch.no_grad()
    def write(self, pairs: list[Pair]) -> list[str]:
        """Greedily, up to a quarter more tokens than the longest report has."""
        longest = max(len(self.lm.tokenizer.encode(pair[2], add_special_tokens=False)) for pair in pairs)
        most = min(longest * 5 // 4 + 1, self.config.max_answer_tokens)
        return generate_reports(self.lm, *self.without_image(pairs), most)


def read_texts(args: argparse.Namespace, config: Config) -> tuple[list[str], list[str], list[str], str | None]:
    """Reports to train on, reports held out, questions, and the tables' language, in which Stage 2 prompts.

    Raises InputError: a table cannot be read, or there are too few reports.
    """
    paths = [config.resolved("caption_csv_train")] + ([Path(config.caption_csv_val)] if config.caption_csv_val else [])
    tables = [read_caption_table(path, config.table_root, config.path_map) for path in paths]
    prompts = read_prompts(Path(config.caption_prompt_json)) if config.caption_prompt_json else []
    questions = list(dict.fromkeys(question_of(row, prompts, args.seed) for row in tables[0]))
    held_out = [row.answer for table in tables[1:] for row in table]
    reports = [row.answer for row in tables[0]] + [text for path in args.extra_reports for text in read_reports(path)]
    reports = [text for text in dict.fromkeys(reports) if text not in set(held_out)]
    if len(reports) < LEAST_REPORTS:
        raise InputError(
            f"{counted(len(reports), 'different report')} to learn from, expected at least {LEAST_REPORTS}: add some "
            "to caption_csv_train, or others without images with --extra_reports FILE"
        )
    choose = random.Random(args.seed)
    if not held_out:
        choose.shuffle(reports)
        cut = max(2, len(reports) // 10)
        held_out, reports = reports[:cut], reports[cut:]
    language = known_language([row.answer for table in tables for row in table])
    return reports, choose.sample(held_out, min(HELD_OUT, len(held_out))), prompts or questions, language


def train(
    args: argparse.Namespace, accelerator: Accelerator, writer: Writer, adapters: Adapters, source: ReportPairs,
    held_out: list[Pair], keep: Callable[[], None],
) -> str:  # fmt: skip
    """Train, and ``keep`` the adapters whenever the held-out loss is lowest. Returns how it ended."""
    optimizer = build_optimizer(adapters, args.lr, weight_decay=0.01)
    schedule = build_schedule(optimizer, args.steps, warmup_ratio=0.05)
    best, waited = math.inf, 0  # steps since the best
    bar = tqdm(range(1, args.steps + 1), desc="Stage 0", unit="step", dynamic_ncols=True, disable=None)
    try:
        for step in bar:
            with accelerator.autocast():
                loss = writer.loss(source.batch(step / args.steps, args.batch_size), source.language)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(adapters.parameters(), 1.0)
            value = require_finite(loss, step, args.lr)  # waits for a GPU, which has all of the step to do by now
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            if step % EVERY and step < args.steps:
                continue
            with accelerator.autocast():
                now = writer.held_out_loss(held_out, source.language, args.batch_size)
            print(f"step {step} loss {value:.4f} held-out {now:.4f}", flush=True)
            best, waited = (now, 0) if now < best else (best, waited + EVERY)
            if not waited:
                keep()
            if waited >= PATIENCE * args.steps and step >= ALL_REPORTS * args.steps:
                return f"stopped early at step {step}"
    except KeyboardInterrupt:
        if best == math.inf:
            raise
        return f"interrupted at step {step}"
    return f"{args.steps} steps"


def measure(writer: Writer, pairs: list[Pair], language: str | None, batch_size: int) -> tuple[float, float, float]:
    """Nats a character; fraction of written reports with their reference's sections, and with the key points given."""
    written = [(text, pair[2]) for text, pair in zip(writer.write(pairs[:GENERATED]), pairs, strict=False)]
    whole = [sections_of(reference) <= sections_of(text) for text, reference in written]
    exact = [language is not None and keys(text, language) == keys(reference, language) for text, reference in written]
    return writer.nats_per_character(pairs, batch_size), float(np.mean(whole)), float(np.mean(exact))


def save(path: Path, adapters: Adapters, lm: MambaLM) -> None:
    save_adapters(path, adapters.to_dict(), lm.model, lm.identity.to_dict(), MIXER_LAYERS)


def sections_of(report: str) -> set[str]:
    return {section.name for section in split_sections(report) if section.of(report)}


def keys(report: str, language: str) -> list[tuple]:
    return [point_key(finding) for finding in key_points_of(report, language)]


def main() -> None:
    args = parse_args()
    config = config_from(args).replace(language_model_adapters=None)
    reports, held_out_reports, questions, language = read_texts(args, config)
    args.grad_accumulation, args.tracker = 1, None
    accelerator, output = start_run(args, config, "stage0")
    if accelerator.num_processes > 1:
        raise InputError("Stage 0 runs in one process: start it with python, not with accelerate launch")
    source = ReportPairs(reports, questions, language, args.seed)
    held_out = source.fixed(held_out_reports)
    if language is None:
        print("note: the labeller knows Chinese and English reports, not these: training goes on without key points")
    else:
        print(f"key points, for example: {max((pair[0] for pair in held_out), key=len)}", flush=True)

    weights = {"dtype": config.mamba_dtype, "device": accelerator.device}
    lm = MambaLM.load(config.mamba_model, **weights)
    writer = Writer(lm, config)
    before = measure(writer, held_out, language, args.batch_size)
    adapters = Adapters(lm.model, args.rank, MIXER_LAYERS).to(accelerator.device)
    count = sum(p.numel() for p in adapters.parameters())
    lm.checkpointing(config.llm_checkpointing, reserve=3 * 4 * count)
    print(f"{counted(len(reports), 'report')}, {len(held_out)} held out; adapters of rank {args.rank}, "
          f"{count / 1e6:.2f} M parameters", flush=True)  # fmt: skip
    path = output / ADAPTER_FILE

    keep = partial(save, path, adapters, lm)
    ended = train(args, accelerator, writer, adapters, source, held_out, keep)
    del writer, lm, keep  # before it is loaded again
    lm = MambaLM.load(config.mamba_model, stage0=path, **weights)
    after = measure(Writer(lm, config), held_out, language, args.batch_size)
    gained = [f"{before[0]:.3f} → {after[0]:.3f} nats/character", f"four sections {before[1]:.2f} → {after[1]:.2f}"]
    gained += [f"key points as given {before[2]:.2f} → {after[2]:.2f}"] * (language is not None)
    print(f"Stage 0 ({ended}): held-out {', '.join(gained)}", flush=True)
    print(f"adapters: {path}; set  {KEY}: {path.as_posix()}  in the configuration", flush=True)
    if ended.startswith("interrupted"):
        raise Interrupted("the best adapters so far are saved")


if __name__ == "__main__":
    run_main(main)
