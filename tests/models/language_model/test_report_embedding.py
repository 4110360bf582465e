"""Reports as vectors: what every report has hardly counts."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.language_model.report_embedding import embed_reports, report_frequencies

WIDTH = 16

REPORTS = ["lungs clear", "lungs nodule left", "lungs effusion right", "lungs clear", "lungs nodule right"]
WORDS = ["lungs", "clear", "nodule", "effusion", "left", "right", "unseen"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="unseen"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def embedded(tokenizer: PreTrainedTokenizerFast, reports: list[str]) -> tuple[Tensor, Tensor]:
    table = torch.randn(len(WORDS), WIDTH, generator=torch.Generator().manual_seed(3))
    return embed_reports(reports, tokenizer, table, report_frequencies(REPORTS, tokenizer), len(REPORTS))


def test_frequencies_count_reports_not_words(tokenizer):
    counts = report_frequencies([*REPORTS, "left left left"], tokenizer)
    assert {word: counts[i] for i, word in enumerate(WORDS)} == {
        "lungs": 5, "clear": 2, "nodule": 2, "effusion": 1, "left": 2, "right": 2, "unseen": 0,
    }  # fmt: skip


def test_reports_are_unit_vectors_and_equal_texts_one_group(tokenizer):
    vectors, group = embedded(tokenizer, REPORTS)
    assert vectors.shape == (5, WIDTH)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5))
    assert group.tolist() == [0, 1, 2, 0, 3]
    assert torch.equal(vectors[0], vectors[3])
    assert (torch.pdist(vectors[[0, 1, 2, 4]]) > 0.2).all(), "different texts, different vectors"


def test_words_that_every_report_has_hardly_count(tokenizer):
    """'lungs' stands everywhere: with it or without, a report points the same way."""
    vectors, _ = embedded(tokenizer, ["lungs nodule", "nodule", "lungs effusion", "effusion"])
    assert vectors[0] @ vectors[1] > 0.99 and vectors[2] @ vectors[3] > 0.99
    assert vectors[0] @ vectors[2] < 0
    vectors, _ = embedded(tokenizer, ["lungs unseen", "lungs clear", "lungs nodule"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(3)), "words that no training report has are embedded too"
