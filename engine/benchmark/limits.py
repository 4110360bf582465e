"""What the machine can do at most: matrix products, reading, copying. The calls take turns with what is measured."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.benchmark.timing import Candidate, Timing

try:
    from numba import njit
except ImportError:  # it has no build for every platform; reading is then timed in one way less
    njit = None

Shape = tuple[int, int, int]  # rows, inputs, outputs


@dataclass(frozen=True)
class Limit:
    """One way to reach a limit. ``amount``: floating-point operations or bytes per call."""

    name: str
    call: Callable[[], object]
    amount: float
    unit: str

    def candidate(self, rounds: int) -> Candidate:
        return Candidate(self.name, self.call, rounds)

    def rate(self, timing: Timing) -> float:
        """Operations or bytes per second, of the median run."""
        return self.amount / timing.median


def product_limits(shapes: list[Shape], dtype: torch.dtype, device: torch.device, work: float) -> list[Limit]:
    """Matrix products x (rows, inputs) · W (outputs, inputs)ᵀ as a linear layer does them; 2 operations per weight.

    ``work``: operations of one timed call, by repetition.
    """
    return [_product(shape, dtype, device, work) for shape in shapes]


def _product(shape: Shape, dtype: torch.dtype, device: torch.device, work: float) -> Limit:
    rows, inputs, outputs = shape
    x, weight = _noise((rows, inputs), dtype, device), _noise((outputs, inputs), dtype, device)
    times = max(1, round(work / (2 * rows * inputs * outputs)))

    @torch.inference_mode()
    def call() -> None:
        for _ in range(times):
            F.linear(x, weight)

    name = f"matrix product {str(dtype).removeprefix('torch.')} {rows}×{inputs}×{outputs}"
    return Limit(name, call, 2.0 * rows * inputs * outputs * times, "FLOP/s")


def read_limits(nbytes: int, device: torch.device) -> list[Limit]:
    """Two ways to read a block far larger than the caches with all threads; the faster one is the limit."""
    block = _noise((nbytes // 4,), torch.float32, device)
    ways = [Limit("read: torch.sum", block.sum, float(block.nbytes), "B/s")]
    if device.type == "cpu" and njit is not None:
        ways.append(Limit("read: compiled loop", lambda: _read(block), float(block.nbytes), "B/s"))
    return ways


def copy_limit(nbytes: int, device: torch.device) -> Limit:
    """Bytes read plus bytes written."""
    source = _noise((nbytes // 4,), torch.float32, device)
    target = torch.empty_like(source)
    return Limit("copy", lambda: target.copy_(source), 2.0 * source.nbytes, "B/s")


def exponential_limit(device: torch.device) -> Limit:
    """Exponentials of numbers that lie in the caches."""
    values = _noise((64, 1024), torch.float32, device)
    target = torch.empty_like(values)

    def call() -> None:
        for _ in range(500):
            torch.exp(values, out=target)

    return Limit("exponentials: torch.exp", call, 500.0 * values.numel(), "exp/s")


def best_rate(limits: list[Limit], timings: dict[str, Timing]) -> float:
    return max(limit.rate(timings[limit.name]) for limit in limits)


def _sum(values: np.ndarray) -> float:
    total = np.float32(0)
    for i in range(values.size):
        total += values[i]
    return total


if njit is not None:
    _sum = njit(nogil=True, fastmath=True, cache=True)(_sum)


def _read(block: Tensor) -> float:
    parts = np.array_split(block.numpy(), torch.get_num_threads())
    if len(parts) == 1:
        return float(_sum(parts[0]))
    with ThreadPoolExecutor(len(parts)) as pool:
        return float(sum(pool.map(_sum, parts)))


def _noise(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device).uniform_(-1, 1)
