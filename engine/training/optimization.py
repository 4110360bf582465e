"""Optimizer, schedule, and one step over the batches of all processes; one definition for both stages."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from config.errors import InputError
from engine.parallel import sum_of_all
from models.findings_head import UNKNOWN


def build_optimizer(module: nn.Module, lr: float, weight_decay: float) -> AdamW:
    """AdamW; biases, norms, positions and the SSM's own A and D are not decayed (Gu & Dao 2023, appendix E)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1 and not getattr(p, "_no_weight_decay", False)]
    rest = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in rest], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=lr, betas=(0.9, 0.95))


def build_schedule(optimizer: AdamW, total_steps: int, warmup_ratio: float) -> LRScheduler:
    """Linear warm-up, then cosine towards zero, counted in optimizer steps; no step has a learning rate of zero."""
    warmup = max(1, round(total_steps * warmup_ratio))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step + 1 - warmup) / (total_steps + 1 - warmup)))

    return LambdaLR(optimizer, factor)


def require_finite(loss: Tensor, step: int, lr: float) -> float:
    """The loss as a number.

    Raises InputError: NaN or infinite. The weights of the last step and every saved file stay as they are.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise InputError(
            f"non-finite loss ({value}) at step {step}: training stopped before the weights changed; "
            f"lower --lr (now {lr:g}), or look for broken intensities in the images of this batch; "
            "files saved earlier are intact"
        )
    return value


def accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    window: Sequence[Mapping[str, Any]],
    loss_counts: Callable[[Mapping[str, Any]], Tensor],
    pieces: int,
) -> Tensor:
    """Forward and backward of the batches of one optimizer step.

    The gradient is that of the sum of means over all cases and answer tokens of the step, however these are divided
    into batches, pieces of batches, and processes.

    Args:
        model: prepared; batch → sums (S,) of losses. loss_counts: batch → what each sum is of (S,).
        pieces: into which each batch is cut, to need less memory.

    Returns:
        This process's part of the mean of the first loss.
    """
    counts = sum_of_all(torch.stack([loss_counts(batch) for batch in window]).sum(0)).clamp(min=1)
    parts = [part for batch in window for part in cut(batch, pieces)]
    shown = torch.zeros((), device=accelerator.device)
    for number, part in enumerate(parts, start=1):
        # Processes exchange their gradients once, after the last part.
        with contextlib.nullcontext() if number == len(parts) else accelerator.no_sync(model):
            means = model(part) / counts
            accelerator.backward(means.sum() * accelerator.num_processes)  # whose gradients are averaged
        shown += means[0].detach()
    return shown


def cut(batch: Mapping[str, Any], pieces: int) -> list[Mapping[str, Any]]:
    """``batch`` in ``pieces`` of its cases; where it has fewer, some pieces hold a case that counts nowhere, so that
    every process makes as many."""
    if pieces == 1:
        return [batch]
    cases = len(batch["row"])
    bounds = [(cases * k // pieces, cases * (k + 1) // pieces) for k in range(pieces)]
    return [_cases(batch, slice(*b)) if b[0] < b[1] else _uncounted(_cases(batch, slice(0, 1))) for b in bounds]


def _cases(batch: Mapping[str, Any], which: slice) -> dict[str, Any]:
    return {
        name: type(value)(*(part[which] for part in value)) if hasattr(value, "_fields") else value[which]
        for name, value in batch.items()
    }


def _uncounted(batch: dict[str, Any]) -> dict[str, Any]:
    """The same images in no loss: no row, no answer, no known target."""
    blank = {"row": torch.full_like(batch["row"], -1)}
    blank |= {name: torch.zeros_like(batch[name]) for name in ("answer_mask",) if name in batch}
    blank["targets"] = type(batch["targets"])(
        *(torch.full_like(part, math.nan if part.is_floating_point() else UNKNOWN) for part in batch["targets"])
    )
    return {**batch, **blank}


class StepResult(NamedTuple):
    """Of one optimizer step, the same in every process. ``stop``: a process was asked to stop."""

    loss: float
    norm: float
    stepped: bool
    stop: bool


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, schedule: LRScheduler, parameters: Iterable[Tensor],
    max_grad_norm: float, loss: Tensor, stop: bool,
) -> StepResult:  # fmt: skip
    """Clip, step, advance the schedule. A loss or gradient that is not finite leaves the weights as they are.

    Args:
        loss: this process's part, of :func:`accumulate`. stop: whether this process was asked to stop.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    shared = sum_of_all(torch.stack([loss, loss.new_tensor(float(stop))]))
    mean, stops, length = torch.cat([shared, norm.detach().to(shared)[None]]).tolist()  # waits for a GPU
    scaler = accelerator.scaler
    # A gradient scaler looks for itself, and lowers its scale; below 1 it is not the scale that overflows.
    finite = math.isfinite(mean) and (math.isfinite(length) or (scaler is not None and scaler.get_scale() >= 1))
    if finite:
        optimizer.step()
        if not accelerator.optimizer_step_was_skipped:
            schedule.step()
    elif scaler is not None:
        scaler.update()  # it was unscaled: without this the next step cannot be
    optimizer.zero_grad(set_to_none=True)
    return StepResult(mean, length, finite, stops > 0)
