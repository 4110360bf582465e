"""What is measured at each ``--size``. Letters as in ARCHITECTURE.md: B batch, L tokens, E inner width, N state."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 1 << 20


@dataclass(frozen=True)
class Size:
    """``width``, ``layers``, ``vocabulary`` are those of the language model; all counts of tokens are per sample.

    ``visual`` and ``text``: tokens of the prompt. ``answer``: tokens after the visual ones in a training step.
    ``part_layers``: layers of the language model where all of them would take hours (scaling, memory and rivals
    in training); every layer costs the same, so what holds for some holds for all.
    """

    name: str
    width: int
    layers: int
    vocabulary: int
    tokens: int  # words of the tokenizer
    heads: int  # of the attention decoder beside it
    dtype: torch.dtype
    rounds: int
    scan_tokens: int
    scan_training_tokens: int  # for transformers, whose backward pass takes the square of L
    visual: int
    text: int
    answer: int
    decode: int
    part_layers: int
    rival_layers: int
    rival_step: tuple[int, int]  # visual and further tokens
    scaling: tuple[int, int, int, int, int]  # the last is 16 times the third
    memory_tokens: tuple[int, ...]
    rival_memory_tokens: int  # no more tokens than these for a rival in training
    block: int  # bytes of the block that is read and copied
    work: float  # floating-point operations in one timed call of matrix products
    own_process: bool  # a fresh process for every peak of memory
    volume: tuple[int, int, int]  # voxels of the scan that is preprocessed, z y x
    epoch_cases: int
    epoch_volume: tuple[int, int, int]

    @property
    def inner(self) -> int:
        return 2 * self.width

    @property
    def state(self) -> int:
        return 16

    @property
    def rank(self) -> int:
        return -(-self.width // 16)


_BIG = {
    "rounds": 5, "scan_tokens": 1024, "scan_training_tokens": 256, "visual": 784, "text": 64, "answer": 256,
    "decode": 16, "scaling": (49, 196, 784, 3136, 12544), "block": 1024 * MIB, "work": 2e10, "own_process": True,
    "memory_tokens": (256, 512, 1024, 2048, 4096), "rival_memory_tokens": 256,
    "volume": (300, 512, 512), "epoch_cases": 8, "epoch_volume": (120, 512, 512),
}  # fmt: skip

SIZES = {
    size.name: size
    for size in (
        Size("2.8b", 2560, 64, 50280, 50277, 32, torch.bfloat16, part_layers=8, rival_layers=2,
             rival_step=(196, 64), **_BIG),
        Size("130m", 768, 24, 50280, 50277, 12, torch.float32, part_layers=8, rival_layers=4,
             rival_step=(196, 64), **_BIG),
        Size("tiny", 32, 2, 300, 297, 4, torch.float32, rounds=3, scan_tokens=48, scan_training_tokens=16, visual=16,
             text=8, answer=12, decode=3, part_layers=2, rival_layers=2, rival_step=(9, 4),
             scaling=(4, 9, 16, 64, 256), memory_tokens=(16, 32), rival_memory_tokens=16, block=4 * MIB,
             work=1e7, own_process=False, volume=(12, 48, 56), epoch_cases=4, epoch_volume=(10, 40, 48)),
    )
}  # fmt: skip
