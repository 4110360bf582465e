"""Table rows to samples, samples to batches.

row → cached preprocessed volume [C_in, z, y, x] → 2-D: slices [K, C_in, H, W] · 3-D: patch [C_in, z, y, x]
batch: images [B, …], slice_position [B, K], question_ids [B, Lq], answer_ids [B, La] and their masks
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from config.plans import PreprocessPlan
from config.schema import Config
from data.cache import CachedVolume, VolumeCache
from data.caption_table import CaptionRow, question_of, read_caption_table, read_prompts


@dataclass
class Sample:
    """One case. ``images``: (K, C_in, H, W) or (C_in, z, y, x); ``slice_position``: (K,) in 0…1;
    ``row``: its index in the data set."""

    images: Tensor
    slice_position: Tensor
    question: str
    answer: str
    row: int


class Framing:
    """Chooses what the encoder sees of a preprocessed volume: which slices, or which patch.

    A 2-D slice keeps its whole extent: padded to the plan's patch with zeros, as nnU-Net pads, and
    where it is larger, to the next multiple of the encoder's stride. A 3-D patch has the plan's size.
    """

    def __init__(self, plan: PreprocessPlan, stride: Sequence[int], slices: int, policy: str, shift: int = 0) -> None:
        """``shift``: move the image in plane by up to so many voxels at random; no side or zone changes by it."""
        self.shift = shift
        self.patch_size = tuple(plan.patch_size)
        self.stride = tuple(stride)
        self.slices = slices
        self.policy = policy

    def __call__(self, volume: CachedVolume) -> tuple[Tensor, Tensor]:
        """Images (K, C_in, H, W) or (C_in, z, y, x), moved at random where asked for, and positions (K,)."""
        images, position = self.cut(volume)
        return self.moved(images), position

    def cut(self, volume: CachedVolume) -> tuple[np.ndarray, Tensor]:
        """The same every time: what is read of the disk."""
        return self._slices(volume) if len(self.patch_size) == 2 else self._patch(volume)

    def moved(self, images: np.ndarray) -> Tensor:
        """All slices by the same offset, which is drawn from torch's generator: a resumed run restores it."""
        offset = (0, 0)
        if self.shift:
            offset = tuple(torch.randint(-self.shift, self.shift + 1, (2,)).tolist())
        return torch.from_numpy(shifted(images, offset).copy())  # a sample may be written to, what is kept not

    def _slices(self, volume: CachedVolume) -> tuple[np.ndarray, Tensor]:
        depth = volume.image.shape[1]
        chosen = choose_slices(volume.lesion_voxels if self.policy == "mask" else None, depth, self.slices)
        size = [
            max(patch, -(-extent // stride) * stride)
            for patch, extent, stride in zip(self.patch_size, volume.image.shape[2:], self.stride, strict=True)
        ]
        planes = [centred(volume.image.plane(index), size) for index in chosen]
        position = (torch.tensor(chosen, dtype=torch.float32) + 0.5) / depth
        return np.stack(planes), position

    def _patch(self, volume: CachedVolume) -> tuple[np.ndarray, Tensor]:
        shape = volume.image.shape[1:]
        centre = [extent / 2 for extent in shape]
        if self.policy == "mask" and volume.lesion_voxels is not None and volume.lesion_voxels.any():
            centre = [float(axis.mean()) + 0.5 for axis in np.nonzero(np.asarray(volume.mask))]
        start = [
            int(np.clip(round(c - patch / 2), 0, max(extent - patch, 0)))
            for c, patch, extent in zip(centre, self.patch_size, shape, strict=True)
        ]
        last = min(start[0] + self.patch_size[0], shape[0])
        rows, columns = (slice(s, s + patch) for s, patch in zip(start[1:], self.patch_size[1:], strict=True))
        patch = centred(volume.image.planes(start[0], last)[..., rows, columns], self.patch_size)
        padding = max(self.patch_size[0] - shape[0], 0) // 2  # the volume begins below the patch's first plane
        plane = (torch.arange(self.slices) + 0.5) / self.slices * self.patch_size[0] - padding
        return patch, ((start[0] + plane) / shape[0]).clamp(0, 1)


def choose_slices(lesion_voxels: np.ndarray | None, depth: int, count: int) -> list[int]:
    """Indices of ``count`` slices, ascending: most lesion first where there is any, else around the middle.

    With fewer lesion slices than ``count``, the neighbours of the largest one follow.
    A volume of fewer slices than ``count`` repeats its last one, so that every case has K slices.
    """
    centre = depth // 2
    order: list[int] = []
    if lesion_voxels is not None and lesion_voxels.any():
        by_area = np.argsort(-lesion_voxels, kind="stable")
        order = [int(index) for index in by_area if lesion_voxels[index] > 0][:count]
        centre = order[0]
    nearest = sorted(range(depth), key=lambda index: (abs(index - centre), index))
    order += [index for index in nearest if index not in order][: count - len(order)]
    order += [depth - 1] * (count - len(order))
    return sorted(order)


def centred(plane: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """(C, *spatial) zero-padded on both sides to (C, *size); zero is the mean after CT normalisation."""
    missing = [max(target - extent, 0) for target, extent in zip(size, plane.shape[1:], strict=True)]
    return np.pad(np.asarray(plane, dtype=np.float32), [(0, 0), *((m // 2, m - m // 2) for m in missing)])


def shifted(plane: np.ndarray, offset: tuple[int, int]) -> np.ndarray:
    """(C, …, H, W) moved by ``offset`` rows and columns; what moves in is zero, what moves out is lost."""
    if offset == (0, 0):
        return plane
    source, target = [], []
    for by, extent in zip(offset, plane.shape[-2:], strict=True):
        source.append(slice(max(-by, 0), extent - max(by, 0)))
        target.append(slice(max(by, 0), extent - max(-by, 0)))
    moved = np.zeros_like(plane)
    moved[(..., *target)] = plane[(..., *source)]
    return moved


class MedicalVLMDataset(Dataset):
    """The rows of a table as samples; volumes come from the cache and are prepared on first use."""

    def __init__(
        self,
        rows: Sequence[CaptionRow],
        cache: VolumeCache,
        framing: Framing,
        prompts: Sequence[str],
        seed: int,
        keep_mb: float = 0,
    ) -> None:
        """``keep_mb``: memory for images once read, so that later epochs wait for no disk."""
        self.rows = list(rows)
        self.cache = cache
        self.framing = framing
        self.questions = [question_of(row, prompts, seed) for row in self.rows]
        self._kept: dict[int, tuple[np.ndarray, Tensor]] = {}
        self._room = int(keep_mb * 2**20)

    @classmethod
    def from_config(
        cls, config: Config, table: Path, plan: PreprocessPlan, stride: Sequence[int], seed: int, *, train: bool = False
    ) -> MedicalVLMDataset:
        """``train``: with the augmentation that the configuration asks for.

        Raises: InputError as :func:`read_caption_table`, :func:`read_prompts`, :func:`question_of` do."""
        rows = read_caption_table(
            table, image_root=Path(config.image_root) if config.image_root else None, path_map=config.path_map
        )
        prompts = read_prompts(Path(config.caption_prompt_json)) if config.caption_prompt_json else []
        shift = config.augment_shift if train else 0
        framing = Framing(plan, stride, config.slices, config.slice_policy, shift)
        keep_mb = config.memory_cache_mb / max(config.num_workers, 1)  # every worker keeps its own
        return cls(rows, VolumeCache(Path(config.cache_dir), plan), framing, prompts, seed, keep_mb)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        images, position = self._kept.get(index) or self._read(index)
        return Sample(self.framing.moved(images), position, self.questions[index], row.answer, index)

    def _read(self, index: int) -> tuple[np.ndarray, Tensor]:
        row = self.rows[index]
        images, position = self.framing.cut(self.cache.get(row.image_path, row.mask_path))
        if images.nbytes <= self._room:
            self._room -= images.nbytes
            self._kept[index] = images, position
        return images, position


def encode_prompt(tokenizer: PreTrainedTokenizerBase, question: str, limit: int) -> list[int]:
    """``question`` cut to ``limit`` tokens, then a line break: the same in training and generation."""
    ids = tokenizer.encode(question, add_special_tokens=False)[:limit]
    return ids + tokenizer.encode("\n", add_special_tokens=False)


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
            batch["question_ids"], batch["question_mask"] = _padded(prompts)
            batch["answer_ids"], batch["answer_mask"] = _padded(answers)
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
            "row": torch.tensor([sample.row for sample in samples]),
        }


def _padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    length = max(map(len, sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return ids, mask
