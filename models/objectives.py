"""Stage 1's objectives over visual tokens [B, L, D].

``proxy_l2`` is the manual's proxy loss; its minimum is the zero output (users saw features near
zero and a Stage 2 worse than from scratch). ``align`` draws each scan's tokens to its own report and away
from all others (InfoNCE: van den Oord et al. 2018; image–text: Radford et al. 2021), with the variance
term of VICReg (Bardes et al. 2022) against collapse.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from models.medical_vlm import VisionBridge


class ProxyL2(nn.Module):
    """Mean square of the tokens."""

    def forward(self, tokens: Tensor, row: Tensor) -> Tensor:
        return tokens.float().pow(2).mean()


class Align(nn.Module):
    """InfoNCE of mean visual tokens against the embeddings of all reports of the table.

    In training also of reports against the images of the batch, and the variance term. In evaluation neither, so that
    validation losses of different batch sizes can be compared.
    """

    def __init__(self, reports: Tensor, group: Tensor, expected_std: float, *, variance_weight: float = 1.0) -> None:
        """
        Args:
            reports: (N, D) unit vectors, from :func:`embed_reports`.
            group: (N,) equal for rows whose reports are the same text: they are no negatives of each other.
            expected_std: deviation between tokens below which the variance term acts.
        """
        super().__init__()
        self.register_buffer("reports", reports, persistent=False)
        self.register_buffer("group", group, persistent=False)
        self.expected_std = expected_std
        self.variance_weight = variance_weight
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # CLIP's start

    def forward(self, tokens: Tensor, row: Tensor) -> Tensor:
        """``row``: (B,) which report each image belongs to."""
        tokens = tokens.float()
        image = F.normalize(tokens.mean(1), dim=-1)
        scale = self.log_scale.clamp(max=math.log(100)).exp()
        loss = _soft_nce(scale * image @ self.reports.T, self.group[row][:, None] == self.group[None])
        if not self.training:  # the rest depends on who is in a batch, and so on its size
            return loss
        if len(row) > 1:
            same = self.group[row][:, None] == self.group[row][None]
            loss = (loss + _soft_nce(scale * self.reports[row] @ image.T, same)) / 2
        # Of the batch as it is, not an estimate: a single token has the deviation 0, not NaN.
        deviation = (tokens.flatten(0, 1).var(dim=0, correction=0) + 1e-8).sqrt()
        return loss + self.variance_weight * F.relu(1 - deviation / self.expected_std).mean()


def _soft_nce(logits: Tensor, positive: Tensor) -> Tensor:
    """−log of the probability of any positive: its minimum is 0, however many reports are the same text."""
    right = logits.masked_fill(~positive, -torch.inf).logsumexp(-1)
    return (logits.logsumexp(-1) - right).mean()


class Stage1(nn.Module):
    """The vision part under one of the objectives; what ``train.py`` optimises."""

    def __init__(self, vision: VisionBridge, objective: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.objective = objective

    def forward(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The batch's loss, and its tokens (B, L, D)."""
        tokens = self.vision(batch["images"], batch["slice_position"], roi=batch["roi"])
        return self.objective(tokens, batch["row"]), tokens


def report_frequencies(reports: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    """In how many reports each token stands."""
    counts: Counter[int] = Counter()
    for report in reports:
        counts.update(set(tokenizer.encode(report, add_special_tokens=False)))
    return counts


def embed_reports(
    reports: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    table: Tensor,
    frequencies: Counter[int],
    corpus: int,
) -> tuple[Tensor, Tensor]:
    """Reports as unit vectors: token embeddings weighted by inverse document frequency, so that the words
    that every report shares do not drown those that tell patients apart; then centred.

    Args:
        table: (V, D) the LLM's embeddings.
        frequencies, corpus: of the training reports; the same for validation.

    Returns:
        (N, D) vectors and (N,) group numbers, equal for equal texts.
    """
    vectors = torch.stack([_weighted_mean(report, tokenizer, table, frequencies, corpus) for report in reports])
    numbers: dict[str, int] = {}
    group = torch.tensor([numbers.setdefault(report, len(numbers)) for report in reports])
    return F.normalize(vectors - vectors.mean(0), dim=-1), group


def _weighted_mean(
    report: str, tokenizer: PreTrainedTokenizerBase, table: Tensor, frequencies: Counter[int], corpus: int
) -> Tensor:
    ids = tokenizer.encode(report, add_special_tokens=False)
    weight = torch.tensor([math.log((corpus + 1) / (frequencies[i] + 1)) for i in ids]) + 1e-3
    return (weight[:, None] * table[ids]).sum(0) / weight.sum()
