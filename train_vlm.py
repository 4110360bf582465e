"""Stage 2: train vision + bridge (+ CMI) through the frozen language model, on the report's own loss.

    python train_vlm.py --epochs 2 --batch_size 1 --lr 1e-5 --vision_checkpoint outputs/vision_bridge_best_val.pt
    python train_vlm.py --epochs 20 --batch_size 1 --lr 2e-5 --max_visual_tokens 96

Without --vision_checkpoint it continues from OUTPUT/vision_bridge_vlm_final.pt, unless --from_scratch.
Writes vision_bridge_vlm_best_val.pt, vision_bridge_vlm_final.pt, stage2_train_log.csv, stage2_config.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import Config
from data.medical_vlm_dataset import CaptionCollator, encode_answer
from engine.checkpoint import (
    Checkpoint,
    check_agreement,
    load_checkpoint,
    load_vision_weights,
    save_checkpoint,
)
from engine.cli import Interrupted, add_training_flags, config_from, positive_int, run_main
from engine.loaders import build_loaders, check_tables
from engine.run import jsonable, start_run
from engine.training.diagnostics import TokenStatistics, token_statistics
from engine.training.optimization import build_optimizer, build_schedule, optimizer_step, require_finite
from engine.training.run_log import CsvLog, RunLog, plot_losses, progress_bar
from engine.training.train_state import StopRequest, TrainState, fingerprint
from engine.vision_setup import load_encoder
from models.language_model.lora import Adapters
from models.language_model.mamba_lm import IGNORED, MambaLM
from models.medical_vlm import MedicalVLM, VisionBridge
from models.nnunet.encoder import NnUNetEncoder

LOG_EVERY = 20
RECENT_EPOCHS = 5
DIAGNOSED_IMAGES = 64


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Stage 2: caption loss through the frozen language model")
    add_training_flags(parser, epochs=2, batch_size=1, lr=1e-5)
    parser.add_argument("--vision_checkpoint", type=Path, help="Stage-1 (or Stage-2) checkpoint to start from")
    parser.add_argument("--from_scratch", action="store_true", help="do not continue from vision_bridge_vlm_final.pt")
    parser.add_argument("--max_visual_tokens", type=positive_int, help="overrides the configuration")
    parser.add_argument("--llm_int8", action="store_true", help="frozen language model in int8: half its memory")
    parser.add_argument(
        "--lora_rank", type=int, default=0, help="train low-rank adapters on the language model's in_proj; 0: none"
    )
    parser.add_argument("--allow_collapsed", action="store_true", help="start from a checkpoint stamped as collapsed")
    return parser.parse_args()


def find_start(args: argparse.Namespace, output: Path) -> Checkpoint | None:
    """The checkpoint to start from: the named one, else the last Stage-2 result, else none.

    Raises:
        InputError: it is missing, unreadable, or collapsed and --allow_collapsed was not given.
    """
    if args.vision_checkpoint and args.from_scratch:
        raise InputError("--vision_checkpoint and --from_scratch contradict each other: give one of them")
    path = args.vision_checkpoint
    if path is None:
        last = output / "vision_bridge_vlm_final.pt"
        if args.from_scratch or not last.is_file():
            return None
        path = last
    checkpoint = load_checkpoint(path)
    if checkpoint.collapsed and not args.allow_collapsed:
        raise InputError(
            f"{path} is stamped as collapsed (token_std {checkpoint.diagnostics['token_std']:.2g}, effective rank "
            f"{checkpoint.diagnostics['effective_rank']:.1f}): its tokens say nothing about the image; "
            "train Stage 1 again (--objective align), or use --from_scratch, or insist with --allow_collapsed"
        )
    return checkpoint


def build_vision(
    config: Config, start: Checkpoint | None, lm: MambaLM
) -> tuple[VisionBridge, PreprocessPlan, list[str]]:
    """The vision part, the plan of its input, and what there is to say about where its weights come from."""
    if start is None:
        encoder, plan = load_encoder(config)
        output_std = float(lm.model.get_input_embeddings().weight.float().std())
        vision = VisionBridge.build(config, encoder, lm.width, output_std, with_cmi=config.use_cmi)
        return vision, plan, ["start: nnU-Net encoder, untrained bridge"]
    said = [f"start: {start.path} (epoch {start.epoch}, val_loss {start.val_loss:.6f})"]
    said += check_agreement(start, config)
    encoder = NnUNetEncoder.from_architecture(start.encoder_architecture)
    vision = VisionBridge.build(config, encoder, lm.width, start.diagnostics["expected_std"], with_cmi=config.use_cmi)
    at_random = load_vision_weights(vision, start)
    if at_random:
        said.append(f"the checkpoint has no CMI: these start at random: {', '.join(at_random)}")
    return vision, start.preprocess_plan, said


def check_lora(args: argparse.Namespace, start: Checkpoint | None) -> None:
    """Raises: InputError when --lora_rank cannot be, or is not the one of the checkpoint to start from."""
    if args.lora_rank < 0:
        raise InputError(f"--lora_rank is {args.lora_rank}, expected 0 (none) or the rank of the adapters, e.g. 8")
    if args.lora_rank and args.llm_int8:
        raise InputError("--lora_rank and --llm_int8 contradict each other: int8 weights take no adapters in training")
    had = start.adapters["rank"] if start is not None and start.adapters else 0
    if had and had != args.lora_rank:
        raise InputError(f"{start.path} was trained with --lora_rank {had}: give the same, or use --from_scratch")


def add_adapters(lm: MambaLM, rank: int, start: Checkpoint | None) -> Adapters | None:
    """Fresh adapters, or those of the checkpoint to start from; None for rank 0."""
    if not rank:
        return None
    adapters = Adapters(lm.model, rank)
    if start is not None and start.adapters:
        adapters.load(start.adapters)
    return adapters


@torch.no_grad()
def check_loss_mask(model: MedicalVLM, loader: DataLoader, device: torch.device) -> str:
    """On a real batch: the labels are the answers' tokens and nothing else. Raises AssertionError if not."""
    dataset, collator = loader.dataset, loader.collate_fn
    samples = [dataset[index] for index in range(min(2, len(dataset)))]
    batch = {
        key: value.to(device) if isinstance(value, torch.Tensor) else [image.to(device) for image in value]
        for key, value in collator(samples).items()
    }
    inputs, labels = model.caption_inputs(batch)
    for row, sample in enumerate(samples):
        answer, _ = encode_answer(model.lm.tokenizer, sample.answer, collator.max_answer_tokens)
        in_loss = labels[row] != IGNORED
        first = int(in_loss.nonzero()[0])
        assert labels[row, in_loss].tolist() == answer, "labels are not the answer's tokens"
        assert bool(in_loss[first : first + len(answer)].all()), "labels are not contiguous"
        embedded = model.lm.embed(labels[row, in_loss])
        assert torch.equal(inputs[row, first : first + len(answer)], embedded), "labels and inputs are shifted"
    question = int(batch["question_mask"][0].sum())
    visual = int((labels[0] != IGNORED).nonzero()[0]) - question
    learnt = int((labels[0] != IGNORED).sum())
    return f"loss mask checked: {visual} visual + {question} question tokens masked, {learnt} answer tokens in the loss"


@torch.no_grad()
def validate(accelerator: Accelerator, model: MedicalVLM, loader: DataLoader) -> tuple[float, TokenStatistics]:
    """Mean caption loss per answer token (nats), and whether the tokens differ between images."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    tokens: list[torch.Tensor] = []
    for batch in loader:
        with accelerator.autocast():
            loss, count = model(batch)
            if sum(map(len, tokens)) < DIAGNOSED_IMAGES:
                tokens.append(model.visual_tokens(batch).float().cpu())
        total += torch.stack([loss.double(), count.double()])
    model.train()
    total = accelerator.reduce(total)
    return (total[0] / total[1]).item(), token_statistics(torch.cat(tokens), model.vision.bridge.output_std)


def report_truncation(accelerator: Accelerator, lm: MambaLM, loader: DataLoader, limit: int) -> None:
    answers = [row.answer for row in loader.dataset.rows]
    cut = sum(encode_answer(lm.tokenizer, answer, limit)[1] for answer in answers)
    if cut:
        accelerator.print(
            f"warning: {cut} of {len(answers)} reports are longer than max_answer_tokens {limit} and are cut"
        )


def main() -> None:
    # ---------------------------------------------------------------- configuration and device
    args = parse_args()
    config = config_from(args, max_visual_tokens=args.max_visual_tokens)
    start = find_start(args, config.resolved("output_dir"))
    accelerator, output = start_run(args, config, "stage2")
    check_tables(config)
    say = accelerator.print

    # ---------------------------------------------------------------- model and data
    check_lora(args, start)
    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=accelerator.device, int8=args.llm_int8)
    if lm.checkpointing(config.llm_checkpointing):
        say("language model: each block is computed again in the backward pass (llm_checkpointing)", flush=True)
    vision, plan, origin = build_vision(config, start, lm)
    vision.to(accelerator.device)
    for line in origin:
        say(line, flush=True)
    collator = CaptionCollator(lm.tokenizer, config.max_question_tokens, config.max_answer_tokens)
    train_loader, val_loader, order = build_loaders(args, config, plan, vision.encoder, collator, accelerator)
    report_truncation(accelerator, lm, train_loader, config.max_answer_tokens)
    vlm = MedicalVLM(vision, lm)
    parts = vision.freeze(train_encoder=config.train_encoder)
    adapters = add_adapters(lm, args.lora_rank, start)
    trained = nn.ModuleDict({"vision": vision, "adapters": adapters}) if adapters else vision
    count = sum(p.numel() for p in adapters.parameters()) if adapters else 0
    beside = f", adapters of rank {args.lora_rank} {count / 1e6:.2f} M (trained)" if adapters else ""
    say(f"model: {parts}{beside}, language model {lm.name} (frozen)", flush=True)
    say(check_loss_mask(vlm, train_loader, accelerator.device), flush=True)

    # ---------------------------------------------------------------- optimizer, schedule, resume
    steps_per_epoch = math.ceil(len(train_loader) / args.grad_accumulation)
    total_steps = steps_per_epoch * args.epochs
    optimizer = build_optimizer(trained, args.lr, args.weight_decay)
    schedule = build_schedule(optimizer, total_steps, args.warmup_ratio)
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in adapters.parameters()} if adapters else set()
    rest = [p for p in lm.parameters() if id(p) not in own]
    assert not any(p.requires_grad or id(p) in in_optimizer for p in rest), "the language model is not frozen"
    model, optimizer = accelerator.prepare(vlm, optimizer)
    # States from before a flag existed stay usable.
    kind = {name: value for name in ("llm_int8", "lora_rank") if (value := getattr(args, name))}
    settings = fingerprint(args, config, start=str(start.path) if start else None, **kind)
    state = TrainState(output / "stage2_state.pt", settings, accelerator, trained, optimizer, schedule)
    resumed = state.resume(args.resume)
    progress = state.progress
    log = RunLog(output / "stage2_log.jsonl", active=accelerator.is_main_process, resumed=resumed)
    table = CsvLog(
        output / "stage2_train_log.csv", ("step", "epoch", "caption_loss"), active=accelerator.is_main_process,
        resumed_step=progress.step if resumed else None,
    )  # fmt: skip
    if resumed:
        log.say(f"resuming at epoch {progress.epoch + 1}, step {progress.step}")
    if accelerator.is_main_process:
        summary = {"max_visual_tokens": config.max_visual_tokens, "mamba_model": config.mamba_model}
        summary |= {"flags": jsonable(vars(args)), "config": config.to_dict(), "llm": lm.identity.to_dict()}
        (output / "stage2_config.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1), encoding="utf-8")

    def save(name: str, epoch: int, val_loss: float, diagnostics: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            save_checkpoint(
                output / name, vision, stage="vlm", step=progress.step, epoch=epoch, val_loss=val_loss, config=config,
                plan=plan, llm=lm.identity.to_dict(), diagnostics=diagnostics,
                adapters=adapters.to_dict() if adapters else None,
            )  # fmt: skip

    def evaluate(epoch: int) -> None:
        """Validate, print, keep the best and, at the end, the last."""
        mean_loss = sum(progress.losses) / len(progress.losses)
        val_loss, statistics = validate(accelerator, vlm, val_loader)
        record = {"epoch": epoch, "step": progress.step, "caption_loss": mean_loss, "val_loss": val_loss}
        progress.history.append({**record, **statistics.to_dict()})
        log.record(event="epoch", **progress.history[-1])
        log.say(
            f"epoch {epoch}/{args.epochs}  平均 caption_loss {mean_loss:.6f}  "
            f"val_loss {val_loss:.6f}  {statistics.line()}"
        )
        if statistics.collapsed:
            log.say(f"epoch {epoch} is collapsed and not saved as best")
        elif val_loss < progress.best:
            progress.best = val_loss
            save("vision_bridge_vlm_best_val.pt", epoch, val_loss, statistics.to_dict())
        if epoch == args.epochs:
            save("vision_bridge_vlm_final.pt", epoch, val_loss, statistics.to_dict())

    # ---------------------------------------------------------------- the loop
    model.train()
    bar = progress_bar(total_steps, progress.step, "stage 2", active=accelerator.is_main_process)
    with StopRequest() as stop, bar:
        while progress.epoch < args.epochs:
            order.start_epoch(progress.epoch, progress.batch * args.batch_size * accelerator.num_processes)
            for batch in train_loader:
                with accelerator.accumulate(model):
                    total, count = model(batch)
                    loss = total / count
                    progress.losses.append(require_finite(loss, progress.step + 1, args.lr))
                    accelerator.backward(loss)
                    stepped = optimizer_step(accelerator, optimizer, schedule, trained.parameters(), args.max_grad_norm)
                progress.batch += 1
                if not stepped:
                    continue
                progress.step += 1
                bar.update()
                if progress.step % LOG_EVERY == 0:
                    recent = progress.losses[-LOG_EVERY * args.grad_accumulation :]
                    caption_loss, lr = sum(recent) / len(recent), schedule.get_last_lr()[0]
                    table.write(step=progress.step, epoch=progress.epoch + 1, caption_loss=f"{caption_loss:.6f}")
                    log.record(
                        event="step",
                        step=progress.step,
                        epoch=progress.epoch + 1,
                        caption_loss=caption_loss,
                        lr=lr,
                    )
                    log.say(f"epoch {progress.epoch + 1}/{args.epochs}  step {progress.step}/{total_steps}  "
                            f"caption_loss {caption_loss:.6f}  lr {lr:.2e}")  # fmt: skip
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
        steps = [e["step"] for e in epochs]
        curves = {name: (steps, [e[name] for e in epochs]) for name in ("caption_loss", "val_loss")}
        plot_losses(output / "stage2_loss.png", curves, "Stage 2")
        recent = [e["caption_loss"] for e in epochs[-RECENT_EPOCHS:]]
        print(f"最近 {RECENT_EPOCHS} 个 epoch 平均 caption_loss {sum(recent) / len(recent):.6f}", flush=True)
        print(
            f"saved in {output}: vision_bridge_vlm_final.pt, vision_bridge_vlm_best_val.pt, stage2_loss.png",
            flush=True,
        )
    state.finish()


if __name__ == "__main__":
    run_main(main)
