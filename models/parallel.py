"""Cases of all processes, for objectives that compare cases with each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce


def gather_cases(tokens: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """``tokens`` (B, ...) and ``row`` (B,) of all processes, process after process; B may differ between them.

    Every process gets the whole, and the gradient of the sum of all processes' losses. Each process writes its part
    into zeros, and the sum of these is the whole: that is differentiable with every backend.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tokens, row
    sizes = row.new_zeros(dist.get_world_size())
    sizes[dist.get_rank()] = len(row)
    dist.all_reduce(sizes)
    before, total = int(sizes[: dist.get_rank()].sum()), int(sizes.sum())
    after = total - before - len(row)
    rows = torch.nn.functional.pad(row, (before, after))
    dist.all_reduce(rows)
    padded = torch.cat(
        [tokens.new_zeros(before, *tokens.shape[1:]), tokens, tokens.new_zeros(after, *tokens.shape[1:])]
    )
    return all_reduce(padded), rows
