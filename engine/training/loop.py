"""The training loop of both stages: optimizer, resume, steps, validation, logs. A :class:`Stage` is what differs.

epochs → batches → loss → backward → step → log, save state → validate → keep the best → save state
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from config.files import keep_previous
from config.schema import Config
from engine.cli import Interrupted
from engine.findings_prompt import calibrate
from engine.guards import release_folder
from engine.interrupt import StopRequest
from engine.parallel import sum_of_all
from engine.run import EpochBatches, warn_of_spilling
from engine.training.curves import draw_runs, read_run
from engine.training.diagnostics import TokenStatistics, first_tokens, statistics_of_all
from engine.training.guards import Alarms, NonFinite, Reader, one_line_errors
from engine.training.memory import MemoryGuard
from engine.training.optimization import build_optimizer, build_schedule, optimizer_step
from engine.training.run_log import CsvLog, RunLog, keep_later_rows, progress_bar
from engine.training.train_state import Progress, TrainState, fingerprint
from models.findings_head import Found


@dataclass
class Stage:
    """What is special to a stage.

    Attributes:
        name: prefix of the stage's files. title: of the loss figure.
        model: batch → sums (S,) of losses, of which the first is shown. trained: its part that is optimised and saved.
        loss_counts: batch → what each sum is of (S,); the loss is the sum of their means over the step.
        validate: → validation loss, and the statistics of the visual tokens.
        save: (file name, step, epoch, val_loss, diagnostics) writes a checkpoint, on the main process alone.
        best_file, final_file: checkpoints of the lowest validation loss and of the last epoch.
        loss_name: in logs; ``mean_name``: of the epoch's mean. log_every: steps.
        settings: what a resumed run must have in common with the interrupted one, besides configuration and flags.
        validate_first: validate and save before the first step, so that a best checkpoint always exists.
        best_so_far: → validation loss of the best checkpoint of a training that this one continues.
        start: step and epoch of that training.
        table: name of a CSV file with the logged losses.
    """

    name: str
    title: str
    model: nn.Module
    trained: nn.Module
    loss_counts: Callable[[Mapping[str, Any]], Tensor]
    validate: Callable[[], tuple[float, TokenStatistics]]
    save: Callable[..., None]
    best_file: str
    final_file: str
    loss_name: str
    log_every: int
    mean_name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    validate_first: bool = False
    best_so_far: Callable[[], float] = lambda: math.inf
    start: tuple[int, int] = (0, 0)
    table: str | None = None


def train(
    stage: Stage, args: argparse.Namespace, config: Config, accelerator: Accelerator, output: Path, loader: DataLoader,
    order: EpochBatches,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train ``stage`` for ``args.epochs`` epochs, or resume it where it was interrupted.

    Returns:
        One record per validation: epoch, step, mean training loss, ``val_loss``, token statistics.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or a closed console, of any process; the state is saved.
        InputError: the loss stays non-finite, memory runs out, the loader breaks, or the state that ``--resume`` names
            cannot be resumed.
    """
    run = _Run(stage, args, config, accelerator, output, loader)
    progress, optimizer, schedule = run.state.progress, run.optimizer, run.schedule
    run.model.train()
    run.memory.predict(run.model, loader, stage.loss_counts)
    if not run.resumed:
        progress.best = stage.best_so_far()
        if stage.validate_first:
            run.validate()
    bar = progress_bar(run.total_steps, progress.step, stage.name, active=accelerator.is_main_process)
    with StopRequest() as stop, bar, one_line_errors(accelerator.num_processes):
        while progress.epoch < args.epochs:
            order.start_epoch(progress.epoch, progress.cases)
            for window in run.reader.windows(args.grad_accumulation):
                loss = run.memory.accumulate(run.model, window, stage.loss_counts)
                lr = schedule.get_last_lr()[0]
                parameters = stage.trained.parameters(), args.max_grad_norm
                result = optimizer_step(accelerator, optimizer, schedule, *parameters, loss, stop.wanted)
                run.non_finite.check(result, window, progress.step + 1)
                progress.advance(order.together * len(window), result.loss)
                bar.update()
                if progress.step % stage.log_every == 0 or progress.step == run.total_steps:
                    run.log_step(lr)
                if result.stop or progress.step % args.save_every == 0:
                    run.state.save()
                if result.stop:
                    raise Interrupted(f"state saved at step {progress.step}; the same command goes on from there")
            progress.epoch, progress.cases = progress.epoch + 1, 0
            run.validate()
            progress.losses.clear()
            run.state.save()
    run.finish()
    return progress.history


class _Run:
    """The objects of one call of :func:`train`."""

    def __init__(
        self, stage: Stage, args: argparse.Namespace, config: Config, accelerator: Accelerator, output: Path,
        loader: DataLoader,
    ) -> None:  # fmt: skip
        self.stage, self.args, self.output, self.workers = stage, args, output, config.num_workers
        self.active = accelerator.is_main_process
        self.total_steps = math.ceil(len(loader) / args.grad_accumulation) * args.epochs
        optimizer = build_optimizer(stage.trained, args.lr, args.weight_decay)
        self.schedule = build_schedule(optimizer, self.total_steps, args.warmup_ratio)
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        path = output / f"{stage.name}_state.pt"
        settings = fingerprint(args, config, accelerator.num_processes, **stage.settings)
        self.state = TrainState(path, settings, accelerator, stage.trained, self.optimizer, self.schedule)
        self.progress.start = stage.start
        # A resumed run's own: the checkpoint that it started from may have been replaced by its last one.
        self.resumed = self.state.resume(args.resume)
        going_on = self.resumed or stage.start[0] > 0
        table = [output / stage.table] if stage.table else []
        if not going_on and self.active:
            for path in filter(Path.is_file, (output / stage.best_file, output / stage.final_file, *table)):
                print(f"note: {path.name} of an earlier training is kept as {keep_previous(path).name}", flush=True)
        last = (self.step, self.first_epoch + self.progress.epoch) if going_on else None
        log = output / f"{stage.name}_log.jsonl"
        if going_on and not self.resumed and self.active:
            keep_later_rows([log, *table], self.step)  # the checkpoint need not be the latest
        self.log = RunLog(log, active=self.active, resumed=last, track=accelerator.log)
        self.reader = Reader(loader, self.state.save_alone)
        self.non_finite = NonFinite(loader.dataset, args.lr, self.log.say, self.state.save)
        self.alarms = Alarms(args.lr)
        self.memory = MemoryGuard(accelerator, args, config, self.progress, self.log.say, self.state.save_alone)
        options = {"columns": ("step", "epoch", stage.loss_name), "active": self.active}
        self.table = CsvLog(*table, **options, resumed_step=last and last[0]) if table else None
        if self.resumed:
            self.log.say(f"resuming at epoch {self.progress.epoch + 1}, step {self.progress.step}")

    @property
    def progress(self) -> Progress:
        return self.state.progress

    @property
    def first_epoch(self) -> int:
        """Epochs of the training that is continued."""
        return self.progress.start[1]

    @property
    def step(self) -> int:
        """Optimizer steps, those of the training that is continued included."""
        return self.progress.start[0] + self.progress.step

    def log_step(self, lr: float) -> None:
        """Print and record the mean loss of the last steps, and the learning rate of this one."""
        warn_of_spilling(self.state.accelerator.device)
        recent = self.progress.losses[-self.stage.log_every :] or [math.nan]
        loss, name = sum(recent) / len(recent), self.stage.loss_name
        epoch = self.first_epoch + self.progress.epoch + 1
        if self.table:
            self.table.write(step=self.step, epoch=epoch, **{name: f"{loss:.6f}"})
        self.log.record(event="step", step=self.step, epoch=epoch, **{name: loss}, lr=lr)
        self.log.say(
            f"epoch {epoch}/{self.first_epoch + self.args.epochs}  step {self.step}/"
            f"{self.progress.start[0] + self.total_steps}  {name} {loss:.6f}  lr {lr:.2e}"
        )
        self.log.say(self.alarms.loss(loss, name))

    def validate(self) -> None:
        """Validate, print, keep the best checkpoint (never a collapsed one) and, at the end, the final one."""
        stage, progress, losses = self.stage, self.progress, self.progress.losses
        epoch = self.first_epoch + progress.epoch
        val_loss, statistics = stage.validate()
        mean = sum(losses) / len(losses) if losses else None
        record = {"epoch": epoch, "step": self.step, stage.loss_name: mean, "val_loss": val_loss}
        progress.history.append({**record, **statistics.to_dict()})
        self.log.record(event="epoch", **progress.history[-1])
        shown = "" if mean is None else f"{stage.mean_name or stage.loss_name} {mean:.6f}  "
        self.log.say(
            f"epoch {epoch}/{self.first_epoch + self.args.epochs}  {shown}val_loss {val_loss:.6f}  {statistics.line()}"
        )
        self.log.say(self.alarms.epoch(statistics.collapsed))
        self.log.say(self.reader.slow(self.workers))
        if statistics.collapsed:
            self.log.say(f"epoch {epoch} is collapsed and not saved as best")
        elif val_loss < progress.best:
            progress.best = val_loss
            self._save(stage.best_file, epoch, val_loss, statistics)
        if progress.epoch == self.args.epochs:
            self._save(stage.final_file, epoch, val_loss, statistics)

    def _save(self, name: str, epoch: int, val_loss: float, statistics: TokenStatistics) -> None:
        if self.active:
            position = {"step": self.step, "epoch": epoch, "val_loss": val_loss}
            self.stage.save(name, **position, diagnostics=statistics.to_dict())

    def finish(self) -> None:
        """Draw the loss curves and remove the state: nothing is left to resume."""
        if self.active:
            draw_runs([read_run(self.log.path, self.stage.title)], self.output / f"{self.stage.name}_loss.png")
        self.state.finish()
        release_folder(self.output)


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    loader: DataLoader,
    read: Callable[[Mapping[str, Any]], tuple[Tensor, Found | None, Tensor, Tensor]],
) -> tuple[float, TokenStatistics]:
    """Mean loss over ``loader``, and the statistics of the visual tokens; the findings head is calibrated.

    ``model``: with the ``vision`` part. ``read``: a batch → visual tokens (B, L, D), what the head says of it, and its
    loss as a sum and what that is of.
    """
    model.eval()
    vision, heads, tokens = model.vision, [], {}
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in loader:
        with accelerator.autocast():
            visual, found, loss, count = read(batch)
        if found is not None:
            heads.append((batch["row"], found, batch["targets"]))
        tokens |= first_tokens(batch["row"], visual)
        total += torch.stack([loss.double(), count.double()])
    if vision.head is not None:
        calibrate(accelerator, vision.head, heads)
    model.train()
    total = sum_of_all(total)
    return (total[0] / total[1]).item(), statistics_of_all(accelerator, tokens, vision.bridge.spec.output_std)
