"""Optimizer, schedule and the guards of a step; one definition for both stages."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from config.errors import InputError


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


def optimizer_step(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, schedule: LRScheduler, parameters: Iterable[Tensor],
    max_grad_norm: float,
) -> bool:  # fmt: skip
    """Clip, step, advance the schedule, once the accumulated batches are complete. Returns whether it stepped."""
    if not accelerator.sync_gradients:
        return False
    accelerator.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not accelerator.optimizer_step_was_skipped:
        schedule.step()
    return True
