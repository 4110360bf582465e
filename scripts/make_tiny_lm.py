"""A tiny Mamba: tokenizer, pre-training, ``save_pretrained``. The folder loads like any Mamba of the hub.

    python scripts/make_tiny_lm.py --text general --out outputs/mamba_general
    python scripts/make_tiny_lm.py --out outputs/mamba_reports

``general``: the text of the Python standard library with a few per cent of everyday Chinese, and no report: what a
user's language model knows. ``scripts/adapt_language_model.py`` then teaches it to write reports.

``reports``: the synthetic reports, as "key points, question, report": it learns to write what its context states. A
side, a zone, a finding and a number are one token each, so that each is decided at one position.
"""

from __future__ import annotations

import argparse
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, positive_float, positive_int, run_main

DEFAULTS = {
    "reports": {"steps": 400, "batch_size": 32, "vocabulary": 1200},
    "general": {"steps": 1200, "batch_size": 12, "vocabulary": 2048},
}


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Pre-train a tiny Mamba")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--text", choices=("reports", "general"), default="reports", help="what it is trained on")
    parser.add_argument("--language", choices=("zh", "en"), default="zh", help="of the reports")
    parser.add_argument("--max_findings", type=positive_int, default=1, help="findings per report, at most")
    parser.add_argument("--steps", type=positive_int, help="default: 400 on reports, 1200 on general text")
    parser.add_argument("--batch_size", type=positive_int, help="default: 32 reports, 12 windows of general text")
    parser.add_argument("--vocabulary", type=positive_int, help="default: 1200 on reports, 2048 on general text")
    parser.add_argument("--lr", type=positive_float, default=3e-3)
    parser.add_argument("--width", type=positive_int, default=192)
    parser.add_argument("--layers", type=positive_int, default=4)
    parser.add_argument("--half", action="store_true", help="save the weights in half precision")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    for name, value in DEFAULTS[args.text].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from config.toy_models import STAMP
from data.general_text import ChineseParagraphs, python_files
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.lesions import SIZE_RANGE
from data.phantom.report import finding_keys, wording, write_report
from engine.run import native_bf16, set_seeds
from engine.training.optimization import build_optimizer, build_schedule, require_finite
from models.language_model.mamba_lm import IGNORED, MambaLM

END = "<|endoftext|>"
KEY_POINTS = {"zh": "要点{keys}。", "en": "Key points {keys}. "}
SIZES_MM = (4, 70)
ANY_SIZE_FRACTION = 0.2  # of the findings have a size from all of SIZES_MM, the others one of their type
# Standard deviation of the size in the key points around that in the report. A visual token is uncertain of sizes too:
# a model trained on exact sizes answered with one of six numbers.
KEY_ERROR_MM = 2.5
NUMBER_SCALE = 6.0  # numbers this far apart have nearly unrelated embeddings at the start
WINDOW = 256  # tokens of general text in a row of a batch
CHINESE_FRACTION = 0.06  # of the characters of the general text
# Some windows quote a passage of their own, of so many tokens, as answers to letters and diffs do: a large model learns
# to copy from far more text.
QUOTING, QUOTED = 0.3, (12, 80)
HELD_OUT = 40  # every so many documents
NUMBERS_SEEN = 1000  # times that the tokenizer sees each number below 100, so that it is one token
TOKENIZER_PART = 4  # the tokenizer sees all Chinese and every so many other documents, or no character were one token


class ReportTexts:
    """(prompt, report) pairs about findings drawn at random, without end."""

    def __init__(self, language: str, max_findings: int, seed: int) -> None:
        self.language, self.max_findings = language, max_findings
        self.rng = np.random.default_rng(seed)
        self.choose = random.Random(seed)
        w = wording(language)
        # Chinese has no spaces: merges would join side, zone and finding to a few hundred phrases, each learnt
        # separately.
        words = sorted({*w.sides.values(), *w.zones.values(), *w.names[1:]}, key=len, reverse=True)
        self.alone = "|".join(["[0-9]+", *(f" ?{re.escape(word)}" for word in words)])

    def _finding(self) -> Finding:
        kind = self.choose.choice(LESION_TYPES)
        zone = "lower" if kind == "effusion" else self.choose.choice(ZONES)
        low, high = SIZES_MM if self.choose.random() < ANY_SIZE_FRACTION else SIZE_RANGE[kind]
        size = round(math.exp(self.choose.uniform(math.log(low), math.log(high))))
        return Finding(kind, self.choose.choice(SIDES), zone, size)

    def draw(self) -> tuple[str, str]:
        """Key points and question, and the report that follows them."""
        count = 0 if self.choose.random() < 0.1 else self.choose.randint(1, self.max_findings)
        findings = [self._finding() for _ in range(count)]
        errors = [self.choose.gauss(0, KEY_ERROR_MM) for _ in findings]
        measured = [replace(f, size_mm=max(1, round(f.size_mm + e))) for f, e in zip(findings, errors, strict=True)]
        keys = KEY_POINTS[self.language].format(keys=finding_keys(measured, self.language))
        question = self.choose.choice(wording(self.language).questions)
        return keys + question, write_report(findings, self.rng, self.language)

    def tokenizer_texts(self) -> list[str]:
        return ["\n".join(self.draw()) for _ in range(2000)]

    def batch(self, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and labels (B, L), padded on the right; every token except the padding is a target."""
        rows = []
        for _ in range(size):
            ids = tokenizer.encode("\n".join(self.draw()), add_special_tokens=False)
            rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
        labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return ids, labels


class GeneralText:
    """The Python standard library with Chinese paragraphs between its files, a part of it held out."""

    alone = "[0-9]{1,2}|\\p{Han}"  # a number below 100 is one token, and no phrase of the templates is one

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed)
        files, paragraphs = list(python_files()), ChineseParagraphs(seed)
        wanted, self.chinese = CHINESE_FRACTION * sum(map(len, files)), []
        while wanted > 0:
            self.chinese.append("".join(paragraphs.draw() for _ in range(20)))
            wanted -= len(self.chinese[-1])
        self.files, self.stream = files, torch.empty(0, dtype=torch.long)

    def tokenizer_texts(self) -> list[str]:
        numbers = " ".join(map(str, range(100)))
        return [*self.files[::TOKENIZER_PART], *self.chinese, *[numbers] * NUMBERS_SEEN]

    def held_out(self) -> dict[str, list[str]]:
        return {"English and code": self.files[::HELD_OUT], "Chinese": self.chinese[::HELD_OUT]}

    def batch(self, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, WINDOW) from anywhere in the text; each is a target."""
        if not len(self.stream):
            texts = [text for part in (self.files, self.chinese) for i, text in enumerate(part) if i % HELD_OUT]
            self.choose.shuffle(texts)
            self.stream = torch.cat([tokens_of(text, tokenizer) for text in texts])
        starts = [self.choose.randrange(len(self.stream) - WINDOW) for _ in range(size)]
        ids = torch.stack([self.stream[start : start + WINDOW] for start in starts])
        for row in ids:
            if self.choose.random() < QUOTING:
                length = self.choose.randint(*QUOTED)
                source = self.choose.randrange(WINDOW - 2 * length)
                target = self.choose.randrange(source + length, WINDOW - length)
                row[target : target + length] = row[source : source + length].clone()
        return ids, ids


def tokens_of(text: str, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """The ids of a text, and the end-of-text token."""
    return torch.tensor([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id])


@torch.no_grad()
def nats_per_character(lm: MambaLM, texts: list[str]) -> float:
    """Loss of the first :data:`WINDOW` tokens of each text."""
    nats = characters = 0
    for text in texts:
        ids = tokens_of(text, lm.tokenizer)[None, :WINDOW]
        nats += float(lm.answer_loss(lm.embed(ids), ids)[0])
        characters += len(lm.tokenizer.decode(ids[0, 1:]))
    return nats / characters


def train_tokenizer(texts: list[str], vocabulary: int, alone: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, whatever it was trained on. What matches ``alone`` is never merged with
    what lies beside it."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(alone), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    fixed = {"special_tokens": [END], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, show_progress=False, **fixed)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, bos_token=END)


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> MambaForCausalLM:
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    size = {"hidden_size": args.width, "num_hidden_layers": args.layers, "state_size": 16}
    fixed = {"vocab_size": len(tokenizer), "tie_word_embeddings": True, STAMP: True}
    return MambaForCausalLM(MambaConfig(**fixed, **size, **ids))


@torch.no_grad()
def order_numbers(model: MambaForCausalLM, tokenizer: PreTrainedTokenizerFast, generator: torch.Generator) -> None:
    """Initialise the embeddings of whole numbers as a smooth curve, so that training on 17 mm helps with 18 mm.

    Random Fourier features of the value (Rahimi & Recht 2007): the similarity of two numbers falls with their distance
    like a Gaussian of width :data:`NUMBER_SCALE`.
    """
    table = model.get_input_embeddings().weight
    frequency = torch.randn(table.shape[1], generator=generator) / NUMBER_SCALE
    phase = torch.rand(table.shape[1], generator=generator) * 2 * math.pi
    scale = table.std() * math.sqrt(2)  # a random cosine has the mean square 1/2
    for number in range(1, 100):
        ids = tokenizer.encode(str(number), add_special_tokens=False)
        if len(ids) == 1:
            table[ids[0]] = scale * torch.cos(frequency * number + phase)


def main() -> None:
    args = parse_args()
    set_seeds(args.seed)
    general = args.text == "general"
    source = GeneralText(args.seed) if general else ReportTexts(args.language, args.max_findings, args.seed)
    tokenizer = train_tokenizer(source.tokenizer_texts(), args.vocabulary, source.alone)
    model = build_model(args, tokenizer)
    order_numbers(model, tokenizer, torch.Generator().manual_seed(args.seed))
    lm = MambaLM(model, tokenizer, str(args.out))
    lm.requires_grad_(True)

    optimizer = build_optimizer(lm, args.lr, weight_decay=0.01)
    schedule = build_schedule(optimizer, args.steps, warmup_ratio=0.05)
    bar = tqdm(range(1, args.steps + 1), desc="language model", unit="step", dynamic_ncols=True, disable=None)
    for step in bar:
        ids, labels = source.batch(tokenizer, args.batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16()):
            total, count = lm.answer_loss(lm.embed(ids), labels)
        loss = total / count
        value = require_finite(loss, step, args.lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0 or step == args.steps:
            bar.set_postfix(loss=f"{value:.3f}")
    if general:
        losses = [f"{name} {nats_per_character(lm, texts):.3f}" for name, texts in source.held_out().items()]
        print(f"held out, nats/character: {', '.join(losses)}", flush=True)
    if args.half:
        lm.model.half()
    args.out.mkdir(parents=True, exist_ok=True)
    lm.model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = f"{sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens"
    print(f"language model: {size}, last loss {value:.3f} nats/token, saved in {args.out}", flush=True)


if __name__ == "__main__":
    run_main(main)
