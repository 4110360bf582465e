"""How much memory a training step needs: measured on one and on two cases before step 0, and what to do where it does
not fit.

    needed(B) = fixed + B x per case       fixed: gradients, moments of the optimizer, what does not grow with B

On a GPU the allocator knows the peak. On CPU :class:`LiveBytes` follows every tensor that an operation makes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import random
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from config.errors import InputError, is_out_of_memory
from config.schema import Config
from data.medical_vlm_dataset import Draw
from engine.guards import size
from engine.training.guards import Window
from engine.training.optimization import accumulate
from engine.training.train_state import Progress
from models.language_model import hf_patch
from models.language_model.mamba_lm import MambaLM

ROOM = {"cpu": 0.75, "cuda": 0.92}  # of the free memory that a prediction may fill: allocators leave gaps

Counts = Callable[[Mapping[str, Any]], Tensor]


class MemoryModel(NamedTuple):
    """Bytes beside what is allocated before the first step."""

    fixed: int
    per_case: int

    def needed(self, cases: int) -> int:
        return self.fixed + cases * self.per_case

    def cases_in(self, room: float) -> int:
        """How many cases fit into so many bytes."""
        return max(0, int((room - self.fixed) // max(self.per_case, 1)))


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that operations make, as long as these live; ``peak``: the most at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {id(storage) for storage in self._storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in self._storages(out):
            if id(storage) not in before and id(storage) not in self._known:
                self._add(storage)
        return out

    @staticmethod
    def _storages(tree: Any) -> list[torch.UntypedStorage]:
        found: list[torch.UntypedStorage] = []
        tree_map_only(Tensor, lambda tensor: found.append(tensor.untyped_storage()), tree)
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        count, key = storage.nbytes(), id(storage)

        def forget(_: weakref.ref) -> None:
            self.now -= count
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self.now += count
        self.peak = max(self.peak, self.now)


def peak_of(job: Callable[[], object], device: torch.device) -> int:
    """Bytes that ``job`` needs at most, beside what is allocated before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes() as live:
        job()
    return live.peak


def free_bytes(device: torch.device) -> int:
    """What this process may still allocate."""
    return hf_patch.free_bytes(device) if device.type == "cuda" else psutil.virtual_memory().available


def measure(model: nn.Module, loader: DataLoader, loss_counts: Counts, accelerator: Accelerator) -> MemoryModel:
    """Forward and backward of the one and the two longest cases; weights, buffers and generators stay as they are."""
    rows, device = loader.dataset.rows, accelerator.device
    longest = sorted(range(len(rows)), key=lambda row: -len(rows[row].answer))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    python, devices = random.getstate(), [device] if device.type == "cuda" else []
    peaks = []
    with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
        for lm in (module for module in model.modules() if isinstance(module, MambaLM)):
            stack.enter_context(lm.memory.least())  # more blocks are kept where a step leaves room
        for cases in (1, 2):
            samples = [loader.dataset[Draw(row, 0)] for row in (longest * 2)[:cases]]
            batch = send_to_device(loader.collate_fn(samples), device)

            for parameter in trained:  # so that what grows with the cases is seen alone
                parameter.grad = torch.zeros_like(parameter)

            def step(batch: Mapping[str, Any] = batch) -> None:
                (model(batch) / loss_counts(batch).clamp(min=1)).sum().backward()

            try:
                peaks.append(peak_of(step, device))
            finally:
                model.zero_grad(set_to_none=True)
    random.setstate(python)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    per_case = max(peaks[1] - peaks[0], 0)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return MemoryModel(peaks[0] - per_case + 3 * gradients, per_case)


class MemoryGuard:
    """Says before step 0 what a step needs, and cuts batches into pieces where ``--auto_batch`` allows it."""

    def __init__(
        self,
        accelerator: Accelerator,
        args: argparse.Namespace,
        config: Config,
        progress: Progress,
        say: Callable[[str], None],
        save: Callable[[], None] | None = None,
    ) -> None:
        """``save``: of the state, where one process alone may."""
        self.accelerator, self.args, self.config = accelerator, args, config
        self.progress, self.say, self.save = progress, say, save
        self.model: MemoryModel | None = None

    def predict(self, model: nn.Module, loader: DataLoader, loss_counts: Counts) -> None:
        """Measure, print what a step will need, and choose the pieces.

        Raises InputError: memory runs out while one or two cases are measured.
        """
        batch, device = self.args.batch_size, self.accelerator.device
        model = self.accelerator.unwrap_model(model)
        try:
            self.model = measure(model, loader, loss_counts, self.accelerator)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError(f"out of memory with one or two cases: {self._smaller_model()}") from error
        fits = self.model.cases_in(ROOM.get(device.type, 0.75) * free_bytes(device))
        # The process with the least memory decides for all.
        free, fits = min(gather_object([(free_bytes(device), fits)]))
        needed = f"a batch of {batch} needs about {size(self.model.needed(batch))}, {size(self.model.per_case)} a case"
        self.say(f"memory: {needed}; {size(free)} free on {device}{'' if fits >= batch else ': it does not fit'}")
        if fits >= batch:
            return
        if self.args.auto_batch:
            self.progress.pieces = max(self.progress.pieces, math.ceil(batch / max(fits, 1)))
            self.say(f"--auto_batch: {self._pieces()}")
        else:
            self.say(f"warning: memory may run out: {self._advice(fits)}")

    def accumulate(self, model: nn.Module, window: Window, loss_counts: Counts) -> Tensor:
        """As :func:`engine.training.optimization.accumulate`, in as many pieces as memory wants.

        Raises InputError: memory ran out, and there is no --auto_batch or nothing left to cut.
        """
        while True:
            try:
                return accumulate(self.accelerator, model, window, loss_counts, self.progress.pieces)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._after_oom(error)
            model.zero_grad(set_to_none=True)
            gc.collect()
            if self.accelerator.device.type == "cuda":
                torch.cuda.empty_cache()

    def _after_oom(self, error: Exception) -> None:
        batch, pieces = self.args.batch_size, self.progress.pieces
        per_piece = math.ceil(batch / pieces)
        # In the middle of an exchange of gradients the processes cannot begin again.
        if self.args.auto_batch and per_piece > 1 and self.accelerator.num_processes == 1:
            self.progress.pieces = min(2 * pieces, batch)
            self.say(f"out of memory at step {self.progress.step + 1}; --auto_batch: {self._pieces()}")
            return
        if self.save:
            self.save()
        saved = "the state is saved" if self.save else "the last saved state is whole"
        raise InputError(
            f"out of memory at step {self.progress.step + 1} with {per_piece} cases at a time; {saved}: "
            f"{self._advice(per_piece // 2)}"
        ) from error

    def _pieces(self) -> str:
        batch, pieces = self.args.batch_size, self.progress.pieces
        align = getattr(self.args, "objective", None) == "align"
        same = "which align compares with each other alone" if align else "with the same result"
        return f"each batch of {batch} is computed {math.ceil(batch / pieces)} cases at a time, {same}"

    def _advice(self, fits: int) -> str:
        batch, accumulation = self.args.batch_size, self.args.grad_accumulation
        if fits < 1 or batch == 1:
            return self._smaller_model()
        fewer = f"lower --batch_size from {batch} to {fits}"
        more = f"raise --grad_accumulation from {accumulation} to {math.ceil(batch * accumulation / fits)}"
        return f"{fewer} and {more}" + ("" if self.args.auto_batch else ", or give --auto_batch")

    def _smaller_model(self) -> str:
        free = size(free_bytes(self.accelerator.device))
        needed = f"one case needs {size(self.model.needed(1))}, " if self.model else ""
        wanted = [] if self.config.llm_checkpointing else ["llm_checkpointing: true"]
        wanted += ["--llm_int8 (half the language model)"] if hasattr(self.args, "llm_int8") else []
        if self.config.slices and self.config.slices > 1:
            wanted.append(f"slices: {max(1, self.config.slices // 2)} (now {self.config.slices})")
        wanted.append(f"max_answer_tokens: {self.config.max_answer_tokens // 2} (now {self.config.max_answer_tokens})")
        return f"{needed}{free} are free; in this order: {', '.join(wanted)}"
