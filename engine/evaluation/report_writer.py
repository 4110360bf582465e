"""Reports with the probability of each token, and the loss of given reports: what an evaluation asks of a model.

A report is written as ever (``MambaLM.generate``) and then read once more in one pass, which
gives the log-probability of every token, whatever the search was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from models.language_model.decoding import INCOMPLETE, Decoding, plain_text
from models.language_model.mamba_lm import IGNORED, LOSS_CHUNK, MambaLM
from models.medical_vlm import MedicalVLM, answer_inputs, generate_reports


@dataclass(frozen=True)
class Written:
    """A generated report. ``ids``: its tokens without the end-of-text; ``log_probs``: of each, in nats; ``ended``: by
    itself, and not cut at the limit."""

    text: str
    ids: list[int]
    log_probs: list[float]
    ended: bool = True


class ReportWriter:
    """A model under evaluation: images to visual tokens, these to reports, and what a given report costs."""

    def __init__(self, model: MedicalVLM, max_new_tokens: int) -> None:
        self.model = model
        self.max_new_tokens = max_new_tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.model.lm.tokenizer

    @property
    def device(self) -> torch.device:
        return next(self.model.vision.parameters()).device

    @torch.no_grad()
    def visual(self, batch: Mapping[str, Any]) -> Tensor:
        """Visual tokens (B, L, D)."""
        return self.model.visual_tokens(batch)

    @torch.no_grad()
    def visual_of_features(
        self, features: Tensor, position: Tensor, batch: Mapping[str, Any], roi: Tensor | None = None
    ) -> Tensor:
        """Visual tokens (B, L, D) of one image, given by its features (K, C, T, T), with positions (K,) or (B, K), and
        squares (B, K, 4) or of no lesion."""
        B = len(batch["question_ids"])
        question = self.model.lm.embed(batch["question_ids"]).float()
        copies = features.expand(B, *features.shape), position.expand(B, -1)
        roi = torch.zeros_like(batch["roi"]) if roi is None else roi
        return self.model.vision.tokens(*copies, question, batch["question_mask"], roi=roi)

    @torch.no_grad()
    def write(self, visual: Tensor, batch: Mapping[str, Any], decoding: Decoding | None = None) -> list[Written]:
        """Reports for visual tokens (B, L, D); greedy unless ``decoding`` says otherwise."""
        lm, kept = self.model.lm, _KeepIds()
        options = decoding.options() if decoding else {}
        texts = generate_reports(lm, visual, batch, self.max_new_tokens, criteria=[kept], **options)
        rows = [_until_end(ids, self.tokenizer.eos_token_id) for ids in kept.ids.tolist()]
        answers = _padded(rows, visual.device)
        log_probs = answer_log_probs(lm, *answer_inputs(lm, visual, {**batch, **answers}))
        return [Written(text, ids, values.tolist()) for text, ids, values in zip(texts, rows, log_probs, strict=True)]

    @torch.no_grad()
    def losses(self, visual: Tensor, batch: Mapping[str, Any]) -> list[tuple[float, int]]:
        """Of each case's own answer: its loss in nats, and its number of tokens (end-of-text included)."""
        found = answer_log_probs(self.model.lm, *answer_inputs(self.model.lm, visual, batch))
        return [(-float(values.sum()), len(values)) for values in found]


def answer_log_probs(lm: MambaLM, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """Log-probability of every labelled token given all before it; differentiable.

    Args:
        inputs: (B, L, D), padded on the right.
        labels: (B, L), ``IGNORED`` where nothing is asked.

    Returns:
        B float32 tensors, one value per labelled token.
    """
    hidden = lm.model.backbone(inputs_embeds=inputs, use_cache=False).last_hidden_state
    found = []
    for states, target in zip(hidden[:, :-1], labels[:, 1:], strict=True):
        wanted = target != IGNORED
        pairs = zip(states[wanted].split(LOSS_CHUNK), target[wanted].split(LOSS_CHUNK), strict=True)
        parts = []
        for state, token in pairs:
            logits = lm.model.lm_head(state)[:, : lm.known_tokens].float()
            parts.append(logits.log_softmax(-1).gather(1, token[:, None])[:, 0])
        found.append(torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32))
    return found


def token_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Which characters of the text each token writes; of a character in several tokens, each has it."""
    spans, done = [], 0
    for k in range(1, len(ids) + 1):
        text = plain_text(tokenizer, ids[:k])
        whole = len(text.rstrip(INCOMPLETE))
        end = max(whole, done + 1) if len(text) > done else done
        spans.append((done, end))
        done = max(done, whole)
    return spans


class _KeepIds(StoppingCriteria):
    """Never stops anything; keeps what was generated."""

    ids: Tensor

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self.ids = input_ids
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _until_end(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    ids = torch.zeros(len(rows), max(map(len, rows), default=0), dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[b, : len(row)] = 1
    return {"answer_ids": ids, "answer_mask": mask}
