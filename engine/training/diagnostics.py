"""Checks of a run: token statistics with the verdict "collapsed", and the loss mask.

The manual's proxy loss is minimised by the zero output, and a low loss then looks like success. The statistics measure
how far tokens differ from each other, and in how many directions; collapsed tokens no longer depend on the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader

from data.medical_vlm_dataset import encode_answer
from engine.parallel import of_all
from models.language_model.mamba_lm import IGNORED
from models.medical_vlm import MedicalVLM, answer_inputs, prompt_ids

MIN_STD_FRACTION = 0.05  # of the standard deviation that the bridge starts with; a healthy run stays near 1
MIN_RANK = 2.0
MAX_TOKENS = 4096
RANK_TOKENS = 1024  # of them, for the singular values: those of 4096 x 2560 take minutes on a CPU
DIAGNOSED_IMAGES = 64  # per validation, the first rows


@dataclass(frozen=True)
class TokenStatistics:
    """``token_std``: standard deviation between tokens, averaged over D. ``image_std``: the same between images at one
    token position, so that positions alone do not count as content. ``effective_rank``: exp of the entropy of the
    normalised singular values (Roy & Vetterli 2007)."""

    token_std: float
    image_std: float
    effective_rank: float
    expected_std: float

    @property
    def collapsed(self) -> bool:
        least = MIN_STD_FRACTION * self.expected_std
        return not (self.token_std >= least and self.image_std >= least / 10 and self.effective_rank >= MIN_RANK)

    def line(self) -> str:
        verdict = "  COLLAPSED: near-zero, one-directional or non-finite tokens" if self.collapsed else ""
        return (
            f"token_std {self.token_std:.5f}  image_std {self.image_std:.5f}  "
            f"effective_rank {self.effective_rank:.1f}{verdict}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "collapsed": self.collapsed}


def first_tokens(row: Tensor, visual: Tensor) -> dict[int, Tensor]:
    """Tokens (L, D) of those rows (B,) of a batch that are diagnosed; they stay on their device."""
    return {r: visual[b].float() for b, r in enumerate(row.tolist()) if r < DIAGNOSED_IMAGES}


def statistics_of_all(accelerator: Accelerator, tokens: Mapping[int, Tensor], expected_std: float) -> TokenStatistics:
    """:func:`token_statistics` of what :func:`first_tokens` kept in every process."""
    if accelerator.num_processes > 1:
        tokens = of_all({row: value.cpu().clone() for row, value in tokens.items()})
    return token_statistics(torch.stack(list(tokens.values())), expected_std)


def token_statistics(tokens: Tensor, expected_std: float) -> TokenStatistics:
    """
    Args:
        tokens: (B, L, D) visual tokens of several images.
        expected_std: standard deviation at initialisation (``BridgeSpec.output_std``).
    """
    tokens = tokens.detach().double()
    if not tokens.isfinite().all():  # no singular values
        return TokenStatistics(float("nan"), float("nan"), 0.0, expected_std)
    flat = _spread(tokens.flatten(0, 1), MAX_TOKENS)
    token_std = flat.std(dim=0, unbiased=False).mean().item()
    # A single image has no differences between images.
    image_std = tokens.std(dim=0, unbiased=False).mean().item() if len(tokens) > 1 else token_std
    return TokenStatistics(token_std, image_std, _effective_rank(_spread(flat, RANK_TOKENS)), expected_std)


def _spread(rows: Tensor, most: int) -> Tensor:
    """Up to ``most`` rows, evenly spread."""
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]


def _effective_rank(rows: Tensor) -> float:
    """Of (N, D): exp of the entropy of the normalised singular values of what differs from the mean; 0 for zeros."""
    centred = rows - rows.mean(0)
    gram = centred.T @ centred if len(rows) > rows.shape[1] else centred @ centred.T
    squares = torch.linalg.eigvalsh(gram)  # of the singular values, ascending
    noise = squares[-1] * torch.finfo(squares.dtype).eps * max(rows.shape)
    singular = squares.where(squares > noise, 0).sqrt()
    if not singular.sum() > 0:
        return 0.0
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


@torch.no_grad()
def check_loss_mask(model: MedicalVLM, loader: DataLoader, device: torch.device) -> str:
    """On a real batch: the labels are the answers' tokens and nothing else. Raises AssertionError if not."""
    dataset, collator = loader.dataset, loader.collate_fn
    samples = [dataset[index] for index in range(min(2, len(dataset)))]
    batch = send_to_device(collator(samples), device)
    inputs, labels = answer_inputs(model.lm, model.read(batch)[0], batch)
    for row, sample in enumerate(samples):
        answer, _ = encode_answer(model.lm.tokenizer, sample.answer, collator.max_answer_tokens)
        in_loss = labels[row] != IGNORED
        first = int(in_loss.nonzero()[0])
        assert labels[row, in_loss].tolist() == answer, "labels are not the answer's tokens"
        assert bool(in_loss[first : first + len(answer)].all()), "labels are not contiguous"
        embedded = model.lm.embed(labels[row, in_loss])
        assert torch.equal(inputs[row, first : first + len(answer)], embedded), "labels and inputs are shifted"
    question = len(prompt_ids(batch, 0))
    visual = int((labels[0] != IGNORED).nonzero()[0]) - question
    answer = int((labels[0] != IGNORED).sum())
    return f"loss mask checked: {visual} visual + {question} question tokens masked, {answer} answer tokens in the loss"
