"""Imitated checks, in a module of their own: the process that runs them imports it, and little else."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from engine.gpu_check.context import Context, Expected, Line, OutOfTime


def good(context: Context) -> Iterator[Line]:
    yield context.figure("a step", 0.25, "s", Expected(0.3, 0.6, "s"))


def raises(context: Context) -> Iterator[Line]:
    yield context.verdict("before it raises", True)
    raise ValueError("CUDA error: an illegal | memory access\nand a page of text")


def ends_its_process(context: Context) -> Iterator[Line]:
    yield context.verdict("before it ends", True)
    os._exit(7)


def hangs(context: Context) -> Iterator[Line]:
    yield context.verdict("before it hangs", True)
    time.sleep(60)


def waits_in_vain(context: Context) -> Iterator[Line]:
    yield context.verdict("before it waits", True)
    raise OutOfTime("out of time, train.py stopped in the middle")
