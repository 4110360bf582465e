"""One vector per report: the mean of its tokens' embeddings, weighted by inverse document frequency, centred, of unit
length."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def report_frequencies(reports: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Counter[int]:
    """The number of reports that contain each token."""
    counts: Counter[int] = Counter()
    for report in reports:
        counts.update(set(tokenizer.encode(report, add_special_tokens=False)))
    return counts


def embed_reports(
    reports: Sequence[str], tokenizer: PreTrainedTokenizerBase, table: Tensor, frequencies: Counter[int], corpus: int
) -> tuple[Tensor, Tensor]:
    """Reports as centred unit vectors: means of token embeddings, weighted by inverse document frequency.

    The weights keep the words that all reports share from outweighing those that differ between patients.

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
