"""The selective scan on CPU: the numba kernels' autograd function and their threads.

Letters: B batch, E channels, L tokens, N state.
A task is one sample × one block of LANES channels. Tasks are spread over Python threads (the kernels
release the interpreter lock); unlike numba's own threading layers these may be used by several callers at
once and after a fork. Each range of tasks sums dB and dC into buffers of its own, so there are no races and
results repeat exactly for a given ``torch.get_num_threads()``.

Everything is computed in float32. The kernels read and write bfloat16 as it lies in memory; float16, and activations
of several dtypes, are converted to float32 first. Backward keeps the inputs and the state at each chunk's start
(1/CHUNK of B·L·E·N).
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from models.selective_scan import ScanInputs, differentiable
from models.selective_scan.kernels_numba import CHUNK, LANES, backward_kernel, forward_kernel
from models.selective_scan.selftest import attempt

Array = np.ndarray
T = TypeVar("T")
PORTIONS = 8  # for each thread of a forward pass: 7 to 11 % faster than one


def check(device_type: str) -> None:
    """Raise ``BackendUnavailable`` where numba does not compile, such as without a folder for its cache."""
    attempt(lambda: forward_kernel(np.float32), device_type)


def forward(inputs: ScanInputs, softplus: bool, reverse: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and the chunks' entry states (B · blocks, chunks, N, LANES), none unless kept."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    batch, channels, length = u.shape
    tasks = batch * -(-channels // LANES)
    kind = _kind(u, delta, z)
    y = _output_like(u, kind)
    last = torch.empty(batch, channels, A.shape[1])
    first = torch.zeros_like(last) if initial_state is None else initial_state
    entries = torch.empty(tasks if keep else 0, -(-length // CHUNK), A.shape[1], LANES)
    arguments = (
        _array(u, kind), _array(delta, kind), _array(A), _walk(B, reverse), _walk(C, reverse), _vector(D, channels),
        _array(u if z is None else z, kind), _vector(delta_bias, channels), _array(y, kind), _array(first),
        last.numpy(), entries.numpy(),
    )  # fmt: skip
    kernel = forward_kernel(arguments[0].dtype.type)

    def run(low: int, high: int) -> None:
        kernel(*arguments, low, high, z is not None, softplus, reverse, keep)

    _over_threads(run, tasks, PORTIONS)
    return y.to(u.dtype), last, entries


def backward(
    inputs: ScanInputs,
    entries: Tensor,
    grad_y: Tensor | None,
    grad_last: Tensor | None,
    softplus: bool,
    reverse: bool,
    _wanted: tuple[bool, ...],  # all are computed
) -> tuple[Tensor, ...]:
    """Gradients of the nine inputs; those of absent ones mean nothing."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    batch, channels, length = u.shape
    blocks = -(-channels // LANES)
    kind = _kind(u, delta, z, grad_y)
    grad_u, grad_delta = _output_like(u, kind), _output_like(delta, kind)
    grad_z = grad_u if z is None else _output_like(z, kind)  # never written where absent
    grad_A, carry = torch.empty(2, batch, channels, A.shape[1])  # per sample, summed below
    grad_D, grad_bias = torch.empty(2, batch, channels)
    carry.copy_(torch.zeros(()) if grad_last is None else grad_last)
    grad_y = torch.zeros(()).expand(u.shape) if grad_y is None else grad_y
    arguments = (
        _array(u, kind), _array(delta, kind), _array(A), _walk(B, reverse), _walk(C, reverse), _vector(D, channels),
        _array(u if z is None else z, kind), _vector(delta_bias, channels), _array(grad_y, kind), carry.numpy(),
        entries.numpy(), _array(grad_u, kind), _array(grad_delta, kind), grad_A.numpy(), grad_D.numpy(),
        _array(grad_z, kind), grad_bias.numpy(),
    )  # fmt: skip
    kernel = backward_kernel(arguments[0].dtype.type)

    def run(low: int, high: int) -> tuple[slice, Array, Array]:
        samples = slice(low // blocks, (high - 1) // blocks + 1)
        sums = np.zeros((2, samples.stop - samples.start, *B.shape[1:]), np.float32)
        kernel(*arguments, *sums, low, high, z is not None, softplus, reverse)
        return samples, *sums

    grad_B, grad_C = np.zeros((2, *B.shape), np.float32)
    for samples, part_B, part_C in _over_threads(run, batch * blocks):
        grad_B[samples] += part_B
        grad_C[samples] += part_C
    grad_B, grad_C = (torch.from_numpy(g).flip(-1) if reverse else torch.from_numpy(g) for g in (grad_B, grad_C))
    return grad_u, grad_delta, grad_A.sum(0), grad_B, grad_C, grad_D.sum(0), grad_z, grad_bias.sum(0), carry


scan = differentiable(forward, backward)


def _kind(*tensors: Tensor | None) -> torch.dtype:
    """In which the kernels read activations: bfloat16 where all are."""
    return torch.bfloat16 if all(t is None or t.dtype is torch.bfloat16 for t in tensors) else torch.float32


def _output_like(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """With the strides of ``tensor`` where those are dense, so that no transposition is undone."""
    return torch.empty_like(tensor, dtype=kind)


def array(tensor: Tensor) -> Array:
    """The tensor's memory; bfloat16, which numpy lacks, as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def _array(tensor: Tensor, kind: torch.dtype = torch.float32) -> Array:
    return array(tensor.to(kind))


def _vector(tensor: Tensor | None, channels: int) -> Array:
    return np.zeros(channels, np.float32) if tensor is None else _array(tensor)


def _walk(tensor: Tensor, reverse: bool) -> Array:
    """B or C (B, N, L), contiguous and in the order of the walk: every block of channels reads all of it."""
    array = _array(tensor)
    return np.ascontiguousarray(array[:, :, ::-1] if reverse else array)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(os.cpu_count() or 1, 2), thread_name_prefix="selective-scan")


# A forked child inherits the pool object but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _over_threads(run: Callable[[int, int], T], tasks: int, portions: int = 1) -> list[T]:
    """Call run(low, high) on even ranges that cover range(tasks), so many for each thread, which takes one after the
    other: one that another program holds up leaves its ranges to the others. Results in the order of the ranges."""
    threads = min(torch.get_num_threads(), tasks)
    ranges = min(threads * portions, tasks)
    bounds = [tasks * i // max(1, ranges) for i in range(ranges + 1)]
    found: list[T | None] = [None] * ranges
    numbers = itertools.count()

    def work() -> None:
        while (k := next(numbers)) < ranges:
            found[k] = run(bounds[k], bounds[k + 1])

    others = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
    return found
