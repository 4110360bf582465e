"""Frozen matrices times few rows on CPU: threads and tensors around ``gemv_kernels``.

Plain reference: ``torch.nn.functional.linear`` (int8: of the widened matrix, then times the scales).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from models.language_model.cpu_decode.gemv_kernels import SLOT, product_kernel

Array = np.ndarray

# Rows up to which our kernels were faster than torch's own product (bfloat16: oneDNN with AVX-512 BF16).
MOST_ROWS = {torch.float32: 8, torch.bfloat16: 4, torch.int8: 8}


def few_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`product` is the way to compute x · weightᵀ: on a CPU, few rows, nothing to differentiate."""
    rows = x.numel() // weight.shape[1]
    return (
        weight.device.type == "cpu"
        and 0 < rows <= MOST_ROWS.get(weight.dtype, 0)
        and x.dtype in (torch.float32, torch.bfloat16)
        and weight.dtype in (x.dtype, torch.int8)
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """x (…, I) · weightᵀ · scale + bias → (…, O) in the dtype of ``x``, summed in float32.

    Args:
        weight: (O, I), contiguous, on the CPU: float32, bfloat16 or int8. scale, bias: (O,).
    """
    rows = x.numel() // x.shape[-1]
    # What meets a bfloat16 matrix is bfloat16; everything else is widened.
    kind = torch.bfloat16 if weight.dtype is torch.bfloat16 else torch.float32
    inputs = array(padded_rows(x.reshape(rows, -1).to(kind)))
    out = np.empty((len(inputs), weight.shape[0]), np.float32)
    batch = (0,) * len(inputs)
    together(
        product_kernel,
        array(weight),
        vector(scale, weight.shape[0], 1),
        vector(bias, weight.shape[0], 0),
        inputs,
        out,
        counters(1),
        torch.get_num_threads(),
        batch,
    )
    return torch.from_numpy(out[:rows]).to(x.dtype).reshape(*x.shape[:-1], len(weight))


def padded_rows(x: Tensor) -> Tensor:
    """(B, I), contiguous, with B a size that is compiled: 1, 2, 4 or 8."""
    rows = 1 << (len(x) - 1).bit_length()
    return torch.nn.functional.pad(x, (0, 0, 0, rows - len(x))) if rows > len(x) else x.contiguous()


def array(tensor: Tensor) -> Array:
    """The tensor's memory; bfloat16, which numpy lacks, as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.numpy()


def vector(tensor: Tensor | None, length: int, default: float) -> Array:
    return np.full(length, default, np.float32) if tensor is None else tensor.detach().float().contiguous().numpy()


def counters(phases: int) -> Array:
    return np.zeros(2 * phases * SLOT, np.int64)


_work: SimpleQueue = SimpleQueue()
_helpers: list[threading.Thread] = []


def together(kernel: Callable[..., None], *args: object) -> None:
    """Run ``kernel(*args)`` here and in torch.get_num_threads() - 1 other threads; back when the work is done.

    The kernel itself ends only then. Threads that are late find nothing left, so nobody waits for them; an executor's
    futures would cost more than a small layer.
    """
    wanted = torch.get_num_threads() - 1
    while len(_helpers) < wanted:
        _helpers.append(threading.Thread(target=_help, name=f"gemv-{len(_helpers)}", daemon=True))
        _helpers[-1].start()
    for _ in range(wanted):
        _work.put((kernel, args))
    kernel(*args)


def _help() -> None:
    while True:
        kernel, args = _work.get()
        kernel(*args)
        del kernel, args  # or the weights would live until the next call


def _start_anew() -> None:
    global _work
    _work = SimpleQueue()
    _helpers.clear()


# A forked child inherits the list of threads but not the threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
