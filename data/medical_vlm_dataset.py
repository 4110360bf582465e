"""Table rows to samples, samples to batches.

row → cached preprocessed volume [C_in, z, y, x] → 2-D: slices [K, C_in, H, W] · 3-D: patch [C_in, z, y, x]
      measured lesions [M, P], what the report states of them; in training a findings prompt that errs as new ones do
batch: images [B, …], slice_position [B, K], roi [B, K, 4], row [B], lesions [B, M, P], targets,
       key_point_ids [B, Lk], question_ids [B, Lq], answer_ids [B, La] and their masks
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from config.schema import Config
from data.augmentation import Augmentation
from data.cache import CaseCache
from data.finding_targets import PromptErrors, Targets, descriptors, targets
from data.findings import FindingRecord
from data.report_language.key_points import key_points_of, write_key_points
from data.report_language.labeller import detect_language, known_language
from data.tables.caption_table import CaptionRow, question_of, read_caption_table, read_prompts
from data.view_selection import EncoderGeometry, View, ViewSelection

MAX_KEY_POINT_TOKENS = 256  # about 14 findings in Chinese
NO_ROW = -1  # of a sample that counts nowhere


class Draw(NamedTuple):
    """A row in an epoch. What is random in a sample depends on these and the seed alone, not on workers or processes.

    ``counts``: False for one that only keeps a process busy that has no case left; it is in no loss.
    """

    row: int
    epoch: int
    counts: bool = True


@dataclass
class Sample:
    """One case. ``images``, ``slice_position`` and ``roi`` as in :class:`data.view_selection.View`; ``measured``: its
    lesions, None where nobody looked; ``targets``: of the findings head; ``key_points``: the findings prompt, empty for
    none; ``row``: its index in the data set, or NO_ROW."""

    images: Tensor
    slice_position: Tensor
    roi: Tensor
    question: str
    answer: str
    row: int
    measured: list[FindingRecord] | None = None
    targets: Targets | None = None
    key_points: str = ""


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
        self.rows, self.seed = list(rows), seed
        self.cache = cache
        self.view_selection = view_selection
        self.questions = [question_of(row, prompts, seed) for row in self.rows]
        self.findings: Sequence[str] = ()  # that a findings head learns
        self.prompt_errors: PromptErrors | None = None  # of the prompts of training; None: it has none
        self.prompt_dropout = 0.0  # fraction of samples without
        self._kept: dict[int, tuple[View, list[FindingRecord] | None]] = {}
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

    def __getitem__(self, index: int | Draw) -> Sample:
        index, epoch, counts = index if isinstance(index, Draw) else Draw(index, 0)
        row, rng = self.rows[index], np.random.default_rng((self.seed % 2**32, epoch, index))
        view, measured = self._kept.get(index) or self._read(index)
        stated = self.stated[index] if self.language and counts else None
        found = targets(self.findings, stated, measured or [])
        line = self._training_prompt(stated, rng) if stated is not None and self.prompt_errors else ""
        view = self.view_selection.finish(view, torch.Generator().manual_seed(int(rng.integers(2**63))))
        return Sample(*view, self.questions[index], row.answer, index if counts else NO_ROW, measured, found, line)

    @functools.cached_property
    def language(self) -> str | None:
        """Of the reports; None where the labeller does not know it."""
        return known_language([row.answer for row in self.rows])

    @functools.cached_property
    def stated(self) -> list[list[FindingRecord] | None]:
        """The findings of each row's report; None for one in another language than most, which nobody reads here."""
        known = [detect_language(row.answer) == self.language for row in self.rows]
        return [
            key_points_of(row.answer, self.language) if k else None for k, row in zip(known, self.rows, strict=True)
        ]

    def measured(self, index: int) -> list[FindingRecord] | None:
        """The lesions of a row, largest first; None where nobody looked for any."""
        return (self._kept.get(index) or self._read(index))[1]

    def _training_prompt(self, stated: Sequence[FindingRecord], rng: np.random.Generator) -> str:
        """The truth, with the errors that held-out cases have, or nothing."""
        if rng.random() < self.prompt_dropout:
            return ""
        return write_key_points(self.prompt_errors.draw(stated, rng), self.language)

    def _read(self, index: int) -> tuple[View, list[FindingRecord] | None]:
        row, selection = self.rows[index], self.view_selection
        view, measured = self.cache.read(
            row.image_path, row.mask_path, lambda volume: (selection.select(volume), selection.measured(volume))
        )
        if view.images.nbytes <= self._room:
            self._room -= view.images.nbytes
            self._kept[index] = view, measured
        return view, measured


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, limit: int, key_points: str = "") -> list[int]:
    """The line of key points whole, ``question`` cut to ``limit`` tokens, a line break: the same in training and
    generation."""
    ids = tokenizer.encode(question, add_special_tokens=False)[:limit]
    return [*encode_key_points(tokenizer, key_points), *ids, *tokenizer.encode("\n", add_special_tokens=False)]


def encode_key_points(tokenizer: PreTrainedTokenizerBase, line: str) -> list[int]:
    """A findings prompt, which stands before the question; nothing of an empty one."""
    return tokenizer.encode(line, add_special_tokens=False)[:MAX_KEY_POINT_TOKENS] if line else []


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
            encoded = (encode_answer(self.tokenizer, s.answer, self.max_answer_tokens)[0] for s in samples)
            answers = [ids if sample.row != NO_ROW else [] for sample, ids in zip(samples, encoded, strict=True)]
            key_points = [encode_key_points(self.tokenizer, s.key_points) for s in samples]
            batch["key_point_ids"], batch["key_point_mask"] = pad_tokens(key_points)
            batch["question_ids"], batch["question_mask"] = pad_tokens(prompts)
            batch["answer_ids"], batch["answer_mask"] = pad_tokens(answers)
        return batch

    @staticmethod
    def images(samples: Sequence[Sample]) -> dict[str, Any]:
        """Images stacked where all have one size, else as a list."""
        images: Tensor | list[Tensor] = [sample.images for sample in samples]
        if len({image.shape for image in images}) == 1:
            images = torch.stack(images)
        batch = {
            "images": images,
            "slice_position": torch.stack([sample.slice_position for sample in samples]),
            "roi": torch.stack([sample.roi for sample in samples]),
            "row": torch.tensor([sample.row for sample in samples]),
            "lesions": torch.tensor([descriptors(sample.measured or []) for sample in samples]),
        }
        if all(sample.targets is not None for sample in samples):
            parts = zip(*(sample.targets for sample in samples), strict=True)
            batch["targets"] = Targets(*map(torch.tensor, parts))
        return batch


def pad_tokens(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) padded on the right with 0, and their mask (B, L), 1 where there is a token."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
