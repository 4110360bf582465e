"""Stage 1: train the vision part (nnU-Net encoder and Vision-Mamba bridge), without the language model.

    python train.py --epochs 3 --batch_size 4 --lr 1e-4
    python train.py --objective proxy_l2 --epochs 3

Writes OUTPUT/vision_bridge_best_val.pt (never from a collapsed epoch) and OUTPUT/vision_bridge_final.pt.
"""

from __future__ import annotations

import argparse
import math

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from config.errors import InputError
from config.schema import Config
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from engine.checkpoint import save_checkpoint
from engine.cli import Interrupted, add_training_flags, config_from, run_main
from engine.loaders import build_loaders, check_tables
from engine.run import start_run
from engine.training.diagnostics import TokenStatistics, token_statistics
from engine.training.optimization import build_optimizer, build_schedule, optimizer_step, require_finite
from engine.training.run_log import RunLog, plot_losses, progress_bar
from engine.training.train_state import StopRequest, TrainState, fingerprint
from engine.vision_setup import load_encoder
from models.language_model.embedding_table import load_embedding_table
from models.language_model.mamba_lm import lm_identity, read_lm_config, read_tokenizer
from models.medical_vlm import VisionBridge
from models.objectives import Align, ProxyL2, Stage1, embed_reports, report_frequencies

LOG_EVERY = 10
DIAGNOSED_IMAGES = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 1: vision and bridge")
    add_training_flags(parser, epochs=3, batch_size=4, lr=1e-4)
    parser.add_argument(
        "--objective",
        choices=("align", "proxy_l2"),
        default="align",
        help="align: contrast with the reports; proxy_l2: mean square of the tokens (its minimum is zero output)",
    )
    return parser.parse_args()


def build_objectives(
    args: argparse.Namespace, config: Config, train: MedicalVLMDataset, val: MedicalVLMDataset
) -> tuple[torch.nn.Module, torch.nn.Module, float]:
    """Objective for training and for validation, and the deviation that tokens are initialised with."""
    if args.objective == "proxy_l2":
        return ProxyL2(), ProxyL2(), read_lm_config(config.mamba_model).initializer_range
    table, tokenizer = load_embedding_table(config.mamba_model), read_tokenizer(config.mamba_model)
    reports = [row.answer for row in train.rows]
    if len(set(reports)) < 2:
        raise InputError(
            f"{config.caption_csv_train}: all reports are the same text; --objective align needs at least two"
        )
    frequencies = report_frequencies(reports, tokenizer)
    output_std = float(table.std())
    objectives = [
        Align(
            *embed_reports([row.answer for row in part.rows], tokenizer, table, frequencies, len(reports)),
            output_std,
        )
        for part in (train, val)
    ]
    return objectives[0], objectives[1], output_std


@torch.no_grad()
def validate(
    accelerator: Accelerator, vision: VisionBridge, objective: torch.nn.Module, loader: DataLoader
) -> tuple[float, TokenStatistics]:
    """Mean validation loss per image, and whether the tokens still differ between images."""
    vision.eval()
    losses: list[Tensor] = []
    tokens: list[Tensor] = []
    for batch in loader:
        with accelerator.autocast():
            visual = vision(batch["images"], batch["slice_position"], roi=batch["roi"])
            loss = objective(visual, batch["row"])
        losses.append(accelerator.gather_for_metrics(loss.float().expand(len(batch["row"]))))
        if sum(map(len, tokens)) < DIAGNOSED_IMAGES:
            tokens.append(accelerator.gather_for_metrics(visual.float()).cpu())
    vision.train()
    return torch.cat(losses).mean().item(), token_statistics(torch.cat(tokens), vision.bridge.output_std)


def main() -> None:
    # ---------------------------------------------------------------- configuration and device
    args = parse_args()
    config = config_from(args)
    if config.use_cmi:
        print(
            "note: CMI reads the question and is trained in Stage 2; this stage trains encoder and bridge",
            flush=True,
        )
    accelerator, output = start_run(args, config, "stage1")
    check_tables(config)
    say = accelerator.print

    # ---------------------------------------------------------------- data and model
    encoder, plan = load_encoder(config)
    identity = lm_identity(config.mamba_model)
    collator = CaptionCollator(None, config.max_question_tokens, config.max_answer_tokens)
    train_loader, val_loader, order = build_loaders(args, config, plan, encoder, collator, accelerator)
    objective, val_objective, output_std = build_objectives(args, config, train_loader.dataset, val_loader.dataset)
    vision = VisionBridge.build(config, encoder, identity.width, output_std, with_cmi=False)
    say(f"model: {vision.freeze(train_encoder=config.train_encoder)}; encoder stage {encoder.output_stage}, "
        f"tokens of width {identity.width}", flush=True)  # fmt: skip
    if args.objective == "proxy_l2":
        say("objective proxy_l2: its minimum is the zero output, so a low loss is no success; "
            "watch token_std and effective_rank, or use --objective align", flush=True)  # fmt: skip

    # ---------------------------------------------------------------- optimizer, schedule, resume
    steps_per_epoch = math.ceil(len(train_loader) / args.grad_accumulation)
    total_steps = steps_per_epoch * args.epochs
    stage = Stage1(vision, objective)
    optimizer = build_optimizer(stage, args.lr, args.weight_decay)
    schedule = build_schedule(optimizer, total_steps, args.warmup_ratio)
    model, optimizer = accelerator.prepare(stage, optimizer)
    val_objective.to(accelerator.device).eval()
    state = TrainState(
        output / "stage1_state.pt",
        fingerprint(args, config, objective=args.objective),
        accelerator,
        stage,
        optimizer,
        schedule,
    )
    resumed = state.resume(args.resume)
    progress = state.progress
    log = RunLog(output / "stage1_log.jsonl", active=accelerator.is_main_process, resumed=resumed)
    if resumed:
        log.say(f"resuming at epoch {progress.epoch + 1}, step {progress.step}")

    def save(name: str, epoch: int, val_loss: float, statistics: TokenStatistics) -> None:
        if accelerator.is_main_process:
            save_checkpoint(
                output / name, vision, stage="vision", step=progress.step, epoch=epoch, val_loss=val_loss,
                config=config, plan=plan, llm=identity.to_dict(),
                diagnostics={**statistics.to_dict(), "objective": args.objective},
            )  # fmt: skip

    def evaluate(epoch: int) -> None:
        """Validate, print, keep the best; epoch 0 is the untrained bridge, so that a best always exists."""
        val_loss, statistics = validate(accelerator, vision, val_objective, val_loader)
        train_loss = sum(progress.losses) / len(progress.losses) if progress.losses else None
        progress.history.append(
            {
                "epoch": epoch,
                "step": progress.step,
                "train_loss": train_loss,
                "val_loss": val_loss,
                **statistics.to_dict(),
            }
        )
        log.record(event="epoch", **progress.history[-1])
        log.say(f"epoch {epoch}/{args.epochs}  val_loss {val_loss:.6f}  {statistics.line()}")
        if statistics.collapsed:
            log.say(f"epoch {epoch} is collapsed and not saved as best")
        elif val_loss < progress.best:
            progress.best = val_loss
            save("vision_bridge_best_val.pt", epoch, val_loss, statistics)
        if epoch == args.epochs:
            save("vision_bridge_final.pt", epoch, val_loss, statistics)

    # ---------------------------------------------------------------- the loop
    model.train()
    if not progress.history:
        evaluate(epoch=0)
    bar = progress_bar(total_steps, progress.step, "stage 1", active=accelerator.is_main_process)
    with StopRequest() as stop, bar:
        while progress.epoch < args.epochs:
            order.start_epoch(progress.epoch, progress.batch * args.batch_size * accelerator.num_processes)
            for batch in train_loader:
                with accelerator.accumulate(model):
                    loss, _ = model(batch)
                    progress.losses.append(require_finite(loss, progress.step + 1, args.lr))
                    accelerator.backward(loss)
                    stepped = optimizer_step(accelerator, optimizer, schedule, stage.parameters(), args.max_grad_norm)
                progress.batch += 1
                if not stepped:
                    continue
                progress.step += 1
                bar.update()
                if progress.step % LOG_EVERY == 0:
                    recent = progress.losses[-LOG_EVERY * args.grad_accumulation :]
                    train_loss, lr = sum(recent) / len(recent), schedule.get_last_lr()[0]
                    log.record(
                        event="step",
                        step=progress.step,
                        epoch=progress.epoch + 1,
                        train_loss=train_loss,
                        lr=lr,
                    )
                    log.say(f"epoch {progress.epoch + 1}/{args.epochs}  step {progress.step}/{total_steps}  "
                            f"train_loss {train_loss:.6f}  lr {lr:.2e}")  # fmt: skip
                if stop.wanted or progress.step % args.save_every == 0:
                    state.save()
                if stop.wanted:
                    raise Interrupted(f"state saved at step {progress.step}; the same command goes on from there")
            progress.epoch, progress.batch = progress.epoch + 1, 0
            evaluate(progress.epoch)
            progress.losses.clear()
            state.save()

    # ---------------------------------------------------------------- results
    if accelerator.is_main_process:
        epochs = progress.history
        plot_losses(
            output / "stage1_loss.png",
            {
                "train_loss": ([e["step"] for e in epochs[1:]], [e["train_loss"] for e in epochs[1:]]),
                "val_loss": ([e["step"] for e in epochs], [e["val_loss"] for e in epochs]),
            },
            f"Stage 1, {args.objective}",
        )
        best = min((e for e in epochs if not e["collapsed"]), key=lambda e: e["val_loss"], default=None)
        if best is None:
            print(
                "every epoch collapsed, the untrained bridge included: no vision_bridge_best_val.pt was written",
                flush=True,
            )
        elif best["epoch"] == 0:
            print(
                "best: epoch 0, the untrained bridge on the nnU-Net encoder; no trained epoch was better and alive",
                flush=True,
            )
        else:
            print(f"best: epoch {best['epoch']}, val_loss {best['val_loss']:.6f}", flush=True)
        print(
            f"saved in {output}: {'vision_bridge_best_val.pt, ' if best else ''}"
            "vision_bridge_final.pt, stage1_loss.png",
            flush=True,
        )
    state.finish()


if __name__ == "__main__":
    run_main(main)
