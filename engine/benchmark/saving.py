"""What a training pays for losing nothing: its saves and checks beside all else that its epochs do.

The quick start's training in both stages, with its configuration and the models of assets/, in this process.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from config.schema import REPOSITORY
from engine import chain, checkpoint
from engine.benchmark.end_to_end import printed_here
from engine.benchmark.measure import Report
from engine.training import loop
from engine.training.guards import NonFinite
from engine.training.memory import MemoryGuard
from engine.training.train_state import TrainState

EPOCHS, SEED = 3, 42
SETTING = chain.Setting(315, 64, 1, max_findings=1, stage0_steps=0, align_epochs=EPOCHS, caption_epochs=EPOCHS)
TINY = SETTING._replace(train=16, val=4)
COSTS = {
    "state": (TrainState, "save"),
    "checkpoints": (checkpoint, "save_checkpoint"),
    "search for losses that are not finite": (NonFinite, "check"),
}
WHOLE, ONCE = (loop, "train"), (MemoryGuard, "predict")  # the latter before step 0


def saving(report: Report) -> None:
    """Seconds of each cost, of all epochs with their validation, and the costs' share of them."""
    setting = TINY if report.size.name == "tiny" else SETTING
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        chain.write_paths_yaml(
            out, chain.Models(chain.SHIPPED_NNUNET, chain.SHIPPED_LANGUAGE_MODEL), stage0=False,
            keys={"language_model_adapters": chain.SHIPPED_ADAPTERS},
        )  # fmt: skip
        steps = [chain.phantoms(setting, out, SEED), *chain.training(setting, out, SEED)]
        for step in steps:
            with contextlib.ExitStack() as stack:
                spent = {name: stack.enter_context(timed(*place)) for name, place in COSTS.items()}
                whole, once = (stack.enter_context(timed(*place)) for place in (WHOLE, ONCE))
                printed_here([str(REPOSITORY / step.command[0]), *step.command[1:]])
            if whole:
                add_shares(report, step.name, spent, sum(whole) - sum(once))


def add_shares(report: Report, stage: str, spent: dict[str, list[float]], epochs: float) -> None:
    """``spent``: seconds of each call; ``epochs``: of all epochs of the stage, these included."""
    report.add_seconds(f"{stage}: {EPOCHS} epochs", [epochs])
    costs = {name: sum(seconds) for name, seconds in spent.items()}
    for name, seconds in spent.items():
        if seconds:
            report.add_seconds(f"{stage}: {name}, one of {len(seconds)}", seconds)
    report.add_ratio(f"saving_share_{stage}", sum(costs.values()), epochs, "≤ 0.03")
    report.panels[f"{stage}: share of the epochs"] = {name: seconds / epochs for name, seconds in costs.items()}


@contextlib.contextmanager
def timed(owner: Any, name: str) -> Iterator[list[float]]:
    """The seconds of each call of a function or method while it lasts."""
    seconds, real = [], getattr(owner, name)

    @wraps(real)
    def measured(*args: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return real(*args, **options)
        finally:
            seconds.append(time.perf_counter() - started)

    with patch.object(owner, name, measured):
        yield seconds
