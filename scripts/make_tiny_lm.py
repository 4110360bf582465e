"""A tiny Mamba that can write the synthetic reports: tokenizer, pre-training, ``save_pretrained``.

    python scripts/make_tiny_lm.py --out outputs/quickstart/mamba_lm

It learns "key points, question, report": to write what its context states. Stage 2 then puts visual tokens in place of
the key points. A side, a zone, a finding and a number are one token each, so that each is decided at one position. The
folder loads like any Mamba of the hub.
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


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Pre-train a tiny Mamba on synthetic reports")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its tokenizer")
    parser.add_argument("--language", choices=("zh", "en"), default="zh")
    parser.add_argument("--max_findings", type=positive_int, default=1, help="findings per text, at most")
    parser.add_argument("--steps", type=positive_int, default=400)
    parser.add_argument("--batch_size", type=positive_int, default=32)
    parser.add_argument("--lr", type=positive_float, default=3e-3)
    parser.add_argument("--width", type=positive_int, default=192)
    parser.add_argument("--layers", type=positive_int, default=4)
    parser.add_argument("--vocabulary", type=positive_int, default=1200)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from config.toy_models import STAMP
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.lesions import SIZE_RANGE
from data.phantom.report import finding_keys, wording, write_report
from engine.run import native_bf16, set_seeds
from engine.training.optimization import build_optimizer, build_schedule, require_finite
from models.language_model.mamba_lm import MambaLM

END = "<|endoftext|>"
KEY_POINTS = {"zh": "要点{keys}。", "en": "Key points {keys}. "}
SIZES_MM = (4, 70)
ANY_SIZE_FRACTION = 0.2  # of the findings have a size from all of SIZES_MM, the others one of their type
# Standard deviation of the size in the key points around that in the report. A visual token is uncertain of sizes too:
# a model trained on exact sizes answered with one of six numbers.
KEY_ERROR_MM = 2.5
NUMBER_SCALE = 6.0  # numbers this far apart have nearly unrelated embeddings at the start


class ReportTexts:
    """(prompt, report) pairs about findings drawn at random, without end."""

    def __init__(self, language: str, max_findings: int, seed: int) -> None:
        self.language, self.max_findings = language, max_findings
        self.rng = np.random.default_rng(seed)
        self.choose = random.Random(seed)

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


def train_tokenizer(texts: list[str], vocabulary: int, language: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    w = wording(language)
    # Chinese has no spaces: merges would join side, zone and finding to a few hundred phrases, each learnt separately.
    words = sorted({*w.sides.values(), *w.zones.values(), *w.names[1:]}, key=len, reverse=True)
    alone = Regex("|".join(["[0-9]+", *(f" ?{re.escape(word)}" for word in words)]))
    split, by_bytes = pre_tokenizers.Split(alone, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
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


def make_batch(source: ReportTexts, tokenizer: PreTrainedTokenizerFast, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (B, L), padded on the right; every token except the padding is a target."""
    rows = []
    for _ in range(size):
        prompt, report = source.draw()
        ids = tokenizer.encode(f"{prompt}\n{report}", add_special_tokens=False)
        rows.append(torch.tensor([*ids, tokenizer.eos_token_id]))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.eos_token_id)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return ids, labels


def main() -> None:
    args = parse_args()
    set_seeds(args.seed)
    source = ReportTexts(args.language, args.max_findings, args.seed)
    tokenizer = train_tokenizer(["\n".join(source.draw()) for _ in range(2000)], args.vocabulary, args.language)
    model = build_model(args, tokenizer)
    order_numbers(model, tokenizer, torch.Generator().manual_seed(args.seed))
    lm = MambaLM(model, tokenizer, str(args.out))
    lm.requires_grad_(True)

    optimizer = build_optimizer(lm, args.lr, weight_decay=0.01)
    schedule = build_schedule(optimizer, args.steps, warmup_ratio=0.05)
    bar = tqdm(range(1, args.steps + 1), desc="language model", unit="step", dynamic_ncols=True, disable=None)
    for step in bar:
        ids, labels = make_batch(source, tokenizer, args.batch_size)
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
    args.out.mkdir(parents=True, exist_ok=True)
    lm.model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = f"{sum(p.numel() for p in lm.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens"
    print(f"language model: {size}, last loss {value:.3f} nats/token, saved in {args.out}", flush=True)


if __name__ == "__main__":
    run_main(main)
