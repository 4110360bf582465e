"""Guards of a training: what is not finite, what diverges or collapses, and a loader that is slow or breaks."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from config.errors import InputError, counted, first_line
from engine.training.optimization import StepResult

MOST_SKIPPED = 5  # steps in a row
SLOW = 0.3  # fraction of an epoch spent waiting for data, above which it is said
SLOW_SECONDS = 20.0  # of waiting in an epoch, below which it is not
DIVERGED = 1.5  # factor to the lowest running mean of the loss so far
NEWEST = 0.2  # weight of the last logged steps in the running mean: twenty cases alone vary by more than the factor
MOST_COLLAPSED = 2  # epochs in a row
_NAMED = 16  # cases of a skipped step

Window = Sequence[Mapping[str, Any]]  # the batches of one optimizer step


class NonFinite:
    """Counts steps that were skipped because their loss or gradient is not finite, and names their cases."""

    def __init__(self, dataset: Any, lr: float, say: Callable[[str], None], save: Callable[[], None]) -> None:
        """``save``: of the state, before the first step of several that is skipped."""
        self.dataset, self.lr, self.say, self.save, self.in_a_row = dataset, lr, say, save, 0

    def check(self, result: StepResult, window: Window, step: int) -> None:
        """Every process calls it, with its own batches, before it counts the step.

        Raises InputError: too many in a row.
        """
        if result.stepped:
            self.in_a_row = 0
            return
        if not self.in_a_row:
            self.save()
        self.in_a_row += 1
        loss, norm = result.loss, result.norm
        what = f"loss {loss}" if not math.isfinite(loss) else f"gradient norm {norm} (loss {loss:.6f})"
        cases = gather_object([case for batch in window for case in self._cases(batch)])
        broken = [name for name, finite in cases if not finite]
        named = broken or [name for name, _ in cases]
        more = f" and {len(named) - _NAMED} others" if len(named) > _NAMED else ""
        where = f"{'images with non-finite voxels' if broken else 'cases'}: {', '.join(named[:_NAMED])}{more}"
        self.say(f"warning: step {step} is skipped, non-finite {what}; {where}")
        if self.in_a_row == MOST_SKIPPED:
            raise InputError(
                f"non-finite {what} at step {step}, {MOST_SKIPPED} steps in a row: the weights are those before the "
                f"first of them, and their state is saved; lower --lr (now {self.lr:g}), or correct these {where}"
            )

    def _cases(self, batch: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """Name of each case of a batch, and whether its image is finite."""
        finite = [bool(torch.isfinite(image).all()) for image in batch["images"]]
        rows = [(row, ok) for row, ok in zip(batch["row"].tolist(), finite, strict=True) if row >= 0]
        return [(self._name(row), ok) for row, ok in rows]

    def _name(self, index: int) -> str:
        row = self.dataset.rows[index]
        return f"row {row.number} ({row.image_path.name})"


class Reader:
    """Batches of a loader, so many for each optimizer step; measures the time that was waited for them.

    A loader that breaks between two steps loses nothing: one line says what broke, after ``save``, where there is one
    (one process alone cannot save for all).
    """

    def __init__(self, loader: DataLoader, save: Callable[[], None] | None) -> None:
        self.loader, self.save = loader, save
        self.waited = self.total = 0.0

    def windows(self, size: int) -> Iterator[list[Mapping[str, Any]]]:
        """The epoch's batches, ``size`` at a time; the last window may be shorter."""
        self.waited, begun = 0.0, None
        batches = iter(self.loader)
        while True:
            asked = time.perf_counter()
            try:
                window = list(itertools.islice(batches, size))
            except (RuntimeError, OSError, ValueError) as error:
                line = loader_problem(error)
                if line is None:
                    raise
                if self.save:
                    self.save()
                saved = "the state is saved" if self.save else "the last saved state is whole"
                raise InputError(f"{line}; {saved}, the same command goes on from there") from error
            now = time.perf_counter()
            if begun is None:  # the first window takes the workers' start too: a minute on Windows
                begun = now
            else:
                self.waited += now - asked
            self.total = now - begun
            if not window:
                return
            yield window

    def slow(self, workers: int) -> str:
        """A warning where the epoch waited much for its data; empty where it did not."""
        if self.waited < SLOW_SECONDS or self.waited < SLOW * self.total:
            return ""
        return (
            f"warning: {self.waited / self.total:.0%} of the epoch ({self.waited:.0f} s) was spent waiting for data: "
            f"raise num_workers (now {workers}) or memory_cache_mb, or put cache_dir on a faster disk"
        )


class Alarms:
    """Warnings while there is time to act: a loss that rises, tokens that stay collapsed."""

    def __init__(self, lr: float) -> None:
        self.lr, self.running, self.lowest, self.collapsed = lr, math.nan, math.inf, 0

    def loss(self, mean: float, name: str) -> str:
        """``mean`` of the last logged steps; a warning where their running mean is far above its lowest so far."""
        if math.isnan(mean):
            return ""  # every step of them was skipped, which is said elsewhere
        before = self.running if math.isfinite(self.running) else mean
        self.running = running = (1 - NEWEST) * before + NEWEST * mean
        lowest, self.lowest = self.lowest, min(self.lowest, running)
        if running <= DIVERGED * lowest + 1e-3 or not math.isfinite(lowest):
            return ""
        self.lowest = running  # said once for each rise
        return f"warning: {name} rises, from {lowest:.4f} to {running:.4f}: lower --lr (now {self.lr:g}) if it goes on"

    def epoch(self, collapsed: bool) -> str:
        """A warning where several epochs in a row are collapsed."""
        self.collapsed = self.collapsed + 1 if collapsed else 0
        if self.collapsed < MOST_COLLAPSED:
            return ""
        return (
            f"warning: {counted(self.collapsed, 'epoch')} in a row collapsed: the tokens say nothing about the image; "
            "stop it (Ctrl-C) and start with a lower --lr, Stage 1 also with --objective align"
        )


def loader_problem(error: Exception) -> str | None:
    """One line for a loader that broke for a reason outside the program; None for any other error."""
    text = str(error)
    if "DataLoader worker" in text and ("exited unexpectedly" in text or "killed by signal" in text):
        return (
            "a data-loader worker was killed, most likely because memory ran out: lower num_workers or "
            f"memory_cache_mb ({first_line(error)})"
        )
    if isinstance(error, InputError) or "InputError" in text or "DamagedFile" in text:
        inner = re.findall(r"^[\w.]*(?:InputError|DamagedFile): (.*)$", text, flags=re.MULTILINE)
        return " ".join((inner[-1] if inner else text).split())
    if isinstance(error, OSError):
        # One from a worker process has its traceback for a text, and no name.
        return f"{error.filename}: {error.strerror}" if error.filename else (text.splitlines() or [repr(error)])[-1]
    return None


_PEERS = re.compile(
    r"Connection closed by peer|Connection reset|Broken pipe|Read error|socketPollTimeout|NCCL|Gloo", re.I
)


@contextmanager
def one_line_errors(processes: int) -> Iterator[None]:
    """Errors from outside that may come anywhere in a step, as one line: a killed worker, a process that is gone."""
    try:
        yield
    except RuntimeError as error:
        if (line := loader_problem(error)) is None and processes > 1 and _PEERS.search(str(error)):
            line = f"another process of this run has ended ({first_line(error)})"
        if line is None:
            raise
        raise InputError(f"{line}; the same command goes on from the last saved state") from error
