"""What several processes agree on: sums, results by row, and jobs that one of them does for all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object

from config.errors import InputError

# Preparation and validation take long on one process while the others wait; the launcher ends them if one is killed.
TIMEOUT = timedelta(hours=12)

Value = TypeVar("Value")


def start_accelerator(**options: Any) -> Accelerator:
    """accelerate, with a time-out that long preparation outlives; only the main process prints."""
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)], **options)
    if not accelerator.is_main_process:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    return accelerator


def sum_of_all(values: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, the same in each."""
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


def of_all(by_row: Mapping[int, Value]) -> dict[int, Value]:
    """What each process found of its rows, in every process, in the order of the rows. Tensors must be on the CPU."""
    return dict(sorted(gather_object(list(by_row.items())), key=lambda pair: pair[0]))


def on_main(accelerator: Accelerator, job: Callable[[], Value]) -> Value:
    """What ``job`` returns on the main process, in every process; an InputError there is raised in all."""
    if accelerator.num_processes == 1:
        return job()
    result: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = job()
        except InputError as error:
            result[1] = str(error)
    value, problem = broadcast_object_list(result)
    if problem is not None:
        raise InputError(problem)
    return value


def my_part(accelerator: Accelerator, things: list[Value]) -> list[Value]:
    """This process's share of ``things``: of n processes each takes every n-th, and none is taken twice."""
    return things[accelerator.process_index :: accelerator.num_processes]
