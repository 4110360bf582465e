"""Table rows to samples, samples to batches.

row → cached preprocessed volume [C_in, z, y, x] → 2-D: slices [K, C_in, H, W] · 3-D: patch [C_in, z, y, x]
batch: images [B, …], slice_position [B, K], roi [B, K, 4], question_ids [B, Lq], answer_ids [B, La] and their masks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from config.schema import Config
from data.augmentation import Augmentation
from data.cache import CaseCache
from data.tables.caption_table import CaptionRow, question_of, read_caption_table, read_prompts
from data.view_selection import EncoderGeometry, View, ViewSelection


@dataclass
class Sample:
    """One case. ``images``, ``slice_position`` and ``roi`` as in :class:`data.view_selection.View`;
    ``row``: its index in the data set."""

    images: Tensor
    slice_position: Tensor
    roi: Tensor
    question: str
    answer: str
    row: int


class MedicalVLMDataset(Dataset):
    """The rows of a table as samples; volumes come from the cache and are prepared on first use."""

    def __init__(
        self,
        rows: Sequence[CaptionRow],
        cache: CaseCache,
        view_selection: ViewSelection,
        prompts: Sequence[str],
        seed: int,
        keep_mb: float = 0,
    ) -> None:
        """``keep_mb``: memory for images once read, so that later epochs wait for no disk."""
        self.rows = list(rows)
        self.cache = cache
        self.view_selection = view_selection
        self.questions = [question_of(row, prompts, seed) for row in self.rows]
        self._kept: dict[int, View] = {}
        self._room = int(keep_mb * 2**20)

    @classmethod
    def from_config(
        cls, config: Config, table: Path, cache: CaseCache, encoder: EncoderGeometry, seed: int, *, train: bool = False
    ) -> MedicalVLMDataset:
        """``train``: with the augmentation that the configuration asks for.

        Raises: InputError as :func:`read_caption_table`, :func:`read_prompts`, :func:`question_of` do."""
        rows = read_caption_table(table, image_root=config.table_root, path_map=config.path_map)
        prompts = read_prompts(Path(config.caption_prompt_json)) if config.caption_prompt_json else []
        changes = Augmentation(config.augment_shift, config.augment_rotate, config.augment_noise) if train else None
        view_selection = ViewSelection.from_config(config, cache.plan, encoder, changes)
        keep_mb = config.memory_cache_mb / max(config.num_workers, 1)  # every worker keeps its own
        return cls(rows, cache, view_selection, prompts, seed, keep_mb)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        view = self.view_selection.finish(self._kept.get(index) or self._read(index))
        return Sample(*view, self.questions[index], row.answer, index)

    def _read(self, index: int) -> View:
        row = self.rows[index]
        view = self.cache.read(row.image_path, row.mask_path, self.view_selection.select)
        if view.images.nbytes <= self._room:
            self._room -= view.images.nbytes
            self._kept[index] = view
        return view


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, limit: int, key_points: str = "") -> list[int]:
    """The line of key points whole, ``question`` cut to ``limit`` tokens, a line break: the same in training and
    generation."""
    known = tokenizer.encode(key_points, add_special_tokens=False) if key_points else []
    ids = tokenizer.encode(question, add_special_tokens=False)[:limit]
    return [*known, *ids, *tokenizer.encode("\n", add_special_tokens=False)]


def encode_answer(tokenizer: PreTrainedTokenizerBase, answer: str, limit: int) -> tuple[list[int], bool]:
    """Report tokens and end-of-text; a report over ``limit`` tokens is cut and has no end. Second: was it cut?"""
    ids = tokenizer.encode(answer, add_special_tokens=False)
    cut = len(ids) > limit
    return (ids[:limit] if cut else [*ids, tokenizer.eos_token_id]), cut


class CaptionCollator:
    """Samples to one batch; picklable, so that spawned workers can hold it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, max_question_tokens: int, max_answer_tokens: int
    ) -> None:
        """``tokenizer`` None: images only, for an objective that reads no text."""
        self.tokenizer = tokenizer
        self.max_question_tokens = max_question_tokens
        self.max_answer_tokens = max_answer_tokens

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = self.images(samples)
        if self.tokenizer is not None:
            prompts = [encode_prompt(self.tokenizer, s.question, self.max_question_tokens) for s in samples]
            answers = [encode_answer(self.tokenizer, s.answer, self.max_answer_tokens)[0] for s in samples]
            batch["question_ids"], batch["question_mask"] = pad_tokens(prompts)
            batch["answer_ids"], batch["answer_mask"] = pad_tokens(answers)
        return batch

    @staticmethod
    def images(samples: Sequence[Sample]) -> dict[str, Any]:
        """Images stacked where all have one size, else as a list."""
        images: Tensor | list[Tensor] = [sample.images for sample in samples]
        if len({image.shape for image in images}) == 1:
            images = torch.stack(images)
        return {
            "images": images,
            "slice_position": torch.stack([sample.slice_position for sample in samples]),
            "roi": torch.stack([sample.roi for sample in samples]),
            "row": torch.tensor([sample.row for sample in samples]),
        }


def pad_tokens(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) padded on the right with 0, and their mask (B, L), 1 where there is a token."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
