"""A pytest plugin: Triton's interpreter combines whole rows in scans and reductions, not element by element.

Same combining functions, same order, some thirty times faster. Loaded by test_backend_triton.py (``-p``).
"""

from __future__ import annotations

import numpy as np
from triton.language.core import tensor
from triton.runtime.interpreter import ReduceOps, ScanOps


def _rows(self: ReduceOps | ScanOps, arguments: tuple[tensor, ...]) -> list[tuple[tensor, ...]]:
    arrays = [np.moveaxis(t.handle.data, self.axis, 0) for t in arguments]
    return [
        tuple(self.to_tensor(row, t.dtype) for row, t in zip(rows, arguments, strict=True))
        for rows in zip(*arrays, strict=True)
    ]


def _combine(self: ReduceOps | ScanOps, left: tuple[tensor, ...], right: tuple[tensor, ...]) -> tuple[tensor, ...]:
    result = self.combine_fn.fn(*left, *right)
    return result if isinstance(result, tuple) else (result,)


def _scan(self: ScanOps, arguments: tuple[tensor, ...]) -> list[tensor]:
    first, *others = _rows(self, arguments)
    found = [first]
    for row in others:
        found.append(_combine(self, found[-1], row))
    columns = zip(*found, strict=True)
    stacked = [np.stack([t.handle.data for t in column], self.axis) for column in columns]
    return [self.to_tensor(array, t.dtype) for array, t in zip(stacked, arguments, strict=True)]


def _reduce(self: ReduceOps, arguments: tuple[tensor, ...]) -> list[tensor]:
    found, *others = _rows(self, arguments)
    for row in others:
        found = _combine(self, found, row)
    arrays = [np.expand_dims(t.handle.data, self.axis) if self.keep_dims else t.handle.data for t in found]
    return [self.to_tensor(array, t.dtype) for array, t in zip(arrays, arguments, strict=True)]


def pytest_configure() -> None:
    ScanOps.generic_scan = _scan
    ReduceOps.generic_reduce = _reduce
