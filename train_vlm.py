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

from engine.cli import Parser, add_training_flags, config_from, positive_int, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Stage 2: caption loss through the frozen language model")
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


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from config.errors import InputError
from config.files import keep_previous, write_text
from config.nnunet_plans import PreprocessPlan
from config.schema import Config, FindingsPrompt, write_config
from data.finding_targets import PromptErrors
from data.medical_vlm_dataset import CaptionCollator, encode_answer
from engine.checkpoint import Checkpoint, check_agreement, load_checkpoint, load_vision_weights, save_checkpoint
from engine.findings_prompt import (
    HEAD_WEIGHT,
    batch_believed,
    calibrate,
    learnt_findings,
    prompt_errors,
    with_key_points,
)
from engine.loaders import build_loaders, check_tables, load_encoder, prepare_data, with_decisions
from engine.run import jsonable, start_run
from engine.scan_checks import ScanChecks
from engine.training.diagnostics import DIAGNOSED_IMAGES, TokenStatistics, check_loss_mask, token_statistics
from engine.training.loop import Stage, train
from models.language_model.lora import Adapters
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM, VisionBridge, check_regions
from models.nnunet.encoder import NnUNetEncoder

BEST_FILE, FINAL_FILE = "vision_bridge_vlm_best_val.pt", "vision_bridge_vlm_final.pt"
RECENT_EPOCHS = 5
PROMPT_DROPOUT = 0.3  # fraction of the training samples whose image must be read without


def find_start(args: argparse.Namespace, output: Path) -> Checkpoint | None:
    """The checkpoint to start from: the named one, else the last Stage-2 result, else none.

    Raises InputError: it is missing, unreadable, or collapsed and --allow_collapsed was not given.
    """
    if args.vision_checkpoint and args.from_scratch:
        raise InputError("--vision_checkpoint and --from_scratch contradict each other: give one of them")
    path = args.vision_checkpoint
    if path is None:
        last = output / FINAL_FILE
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
    """The vision part, the plan of its input, and lines that say where its weights come from."""
    if start is None:
        encoder, plan = load_encoder(config)
        output_std = float(lm.model.get_input_embeddings().weight.float().std())
        vision = VisionBridge.build(config, encoder, lm.width, output_std, with_cmi=config.use_cmi)
        return vision, plan, ["start: nnU-Net encoder, untrained bridge"]
    lines = [f"start: {start.path} (epoch {start.epoch}, val_loss {start.val_loss:.6f})"]
    lines += check_agreement(start, config)
    encoder = NnUNetEncoder.from_architecture(start.encoder_architecture)
    parts = {"with_cmi": config.use_cmi, "findings": start.findings or ()}
    vision = VisionBridge.build(config, encoder, lm.width, start.diagnostics["expected_std"], **parts)
    at_random = load_vision_weights(vision, start)
    if at_random:
        lines.append(f"the checkpoint has no CMI: these start at random: {', '.join(at_random)}")
    return vision, start.preprocess_plan, lines


def check_lora(args: argparse.Namespace, start: Checkpoint | None) -> None:
    """Raises InputError where --lora_rank is impossible, or is not that of the checkpoint to start from."""
    if args.lora_rank < 0:
        raise InputError(f"--lora_rank is {args.lora_rank}, expected 0 (none) or the rank of the adapters, e.g. 8")
    if args.lora_rank and args.llm_int8:
        raise InputError("--lora_rank and --llm_int8 contradict each other: int8 weights take no adapters in training")
    stored = rank_of(start)
    if stored and stored != args.lora_rank:
        raise InputError(f"{start.path} was trained with --lora_rank {stored}: give the same, or use --from_scratch")


def rank_of(checkpoint: Checkpoint | None) -> int:
    """Rank of the adapters in a checkpoint; 0: none."""
    return checkpoint.adapters["rank"] if checkpoint is not None and checkpoint.adapters else 0


def add_adapters(lm: MambaLM, rank: int, start: Checkpoint | None) -> Adapters | None:
    """Fresh adapters, or those of the checkpoint to start from; None for rank 0."""
    if not rank:
        return None
    adapters = Adapters(lm.model, rank)
    if rank_of(start):
        adapters.load(start.adapters)
    return adapters


@torch.no_grad()
def validate(
    accelerator: Accelerator, model: MedicalVLM, loader: DataLoader, mode: FindingsPrompt
) -> tuple[float, TokenStatistics]:
    """Mean caption loss per answer token (nats) under the prompts of new cases, and the statistics of the visual
    tokens; the findings head is calibrated."""
    model.eval()
    heads, head, data = [], model.vision.head, loader.dataset
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    tokens: list[torch.Tensor] = []
    for batch in loader:
        with accelerator.autocast():
            visual, found = model.read(batch)
            said = batch_believed(head, found, [data.measured(row) for row in batch["row"].tolist()], mode)
            prompted = with_key_points(batch, model.lm.tokenizer, said, data.language)
            loss, count = model.caption_loss(visual, prompted)
        if found is not None:
            heads.append((found, batch["targets"]))
        if sum(map(len, tokens)) < DIAGNOSED_IMAGES:
            tokens.append(visual.float().cpu())
        total += torch.stack([loss.double(), count.double()])
    if heads:
        calibrate(accelerator, head, heads)
    model.train()
    total = accelerator.reduce(total)
    return (total[0] / total[1]).item(), token_statistics(torch.cat(tokens), model.vision.bridge.spec.output_std)


def report_truncation(accelerator: Accelerator, lm: MambaLM, loader: DataLoader, limit: int) -> None:
    """Print how many reports are cut at ``limit`` tokens."""
    answers = [row.answer for row in loader.dataset.rows]
    cut = sum(encode_answer(lm.tokenizer, answer, limit)[1] for answer in answers)
    if cut:
        accelerator.print(
            f"warning: {cut} of {len(answers)} reports are longer than max_answer_tokens {limit} and are cut"
        )


def mean_loss(model: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Caption loss per answer token (nats) with the findings head's loss, and alone."""
    total, count, head = model(batch)
    return total / count + HEAD_WEIGHT * head, total / count


def main() -> None:
    # ---------------------------------------------------------------- configuration and device
    args = parse_args()
    config = config_from(args, max_visual_tokens=args.max_visual_tokens)
    start = find_start(args, config.resolved("output_dir"))
    check_lora(args, start)
    check_regions(config)
    if start is not None:  # before the language model and the volumes are read
        config = with_decisions(config, start.config)
        check_agreement(start, config)
    accelerator, output = start_run(args, config, "stage2")
    problems = check_tables(config)
    say = accelerator.print

    # ---------------------------------------------------------------- model and data
    weights = {"stage0": config.language_model_adapters, "int8": args.llm_int8}
    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=accelerator.device, **weights)
    if lm.checkpointing(config.llm_checkpointing):
        say("language model: each block is computed again in the backward pass (llm_checkpointing)", flush=True)
    vision, plan, lines = build_vision(config, start, lm)
    vision.to(accelerator.device)
    say("\n".join(lines), flush=True)
    collator = CaptionCollator(lm.tokenizer, config.max_question_tokens, config.max_answer_tokens)
    config, cache = prepare_data(config, plan, accelerator, problems, force=args.force)
    write_config(config, output / "stage2_config.yaml")
    train_loader, val_loader, order = build_loaders(args, config, cache, vision.encoder, collator, accelerator)
    report_truncation(accelerator, lm, train_loader, config.max_answer_tokens)
    model = MedicalVLM(vision, lm)
    table, held_out = train_loader.dataset, val_loader.dataset
    if table.language is None:
        config = config.replace(findings_prompt="off")
    mode = config.findings_prompt
    trained_head = vision.head is not None
    findings = learnt_findings(table, held_out, vision.head.names if trained_head else ())
    if not trained_head:
        vision.add_head(findings)
        vision.to(accelerator.device)
    if mode != "off":
        table.prompt_errors = prompt_errors(accelerator, vision, val_loader, mode) if trained_head else PromptErrors()
        table.prompt_dropout = PROMPT_DROPOUT
    parts = vision.freeze(train_encoder=config.train_encoder)
    adapters = add_adapters(lm, args.lora_rank, start)
    trained = nn.ModuleDict({"vision": vision, "adapters": adapters}) if adapters else vision
    if adapters:
        count = sum(p.numel() for p in adapters.parameters())
        parts += f", adapters of rank {args.lora_rank} {count / 1e6:.2f} M (trained)"
    say(f"model: {parts}, language model {lm.name} (frozen)", flush=True)
    optimised = {id(p) for p in trained.parameters()}
    assert not any(p.requires_grad for p in lm.parameters() if id(p) not in optimised), "the LLM is not frozen"
    say(check_loss_mask(model, train_loader, accelerator.device), flush=True)
    if accelerator.is_main_process:
        summary = {"max_visual_tokens": config.max_visual_tokens, "mamba_model": config.mamba_model}
        summary |= {"flags": jsonable(vars(args)), "config": config.to_dict(), "llm": lm.identity.to_dict()}
        write_text(output / "stage2_config.json", json.dumps(summary, ensure_ascii=False, indent=1))

    # ---------------------------------------------------------------- training
    checks = ScanChecks(vision, train_loader.dataset, val_loader.dataset)

    def save(name: str, **position: Any) -> None:
        parts = {"plan": plan, "llm": lm.identity.to_dict(), "adapters": adapters.to_dict() if adapters else None}
        save_checkpoint(output / name, vision, stage="vlm", config=config, scan_checks=checks(), **parts, **position)

    def best_so_far() -> float:
        """Validate, on the present table, the best checkpoint of the training that is continued: it is kept until
        an epoch is better. One that cannot be compared is kept under another name."""
        if not continued:
            return math.inf
        path, best = output / BEST_FILE, start
        if path.is_file():
            best = load_checkpoint(path)
            of_best = best.preprocess_plan, best.llm["width"], best.llm.get("adapters", ""), rank_of(best)
            if of_best != (plan, lm.width, lm.adapters, args.lora_rank):
                if accelerator.is_main_process:
                    print(f"{path.name} is of another training and is kept as {keep_previous(path).name}", flush=True)
                best = start
        if adapters and best is not start:
            adapters.load(best.adapters)
        best_model = MedicalVLM(best.build_vision().to(accelerator.device), lm)
        val_loss, statistics = validate(accelerator, best_model, val_loader, mode)
        if adapters and best is not start:
            adapters.load(start.adapters)
        if best is start and accelerator.is_main_process:
            position = {"step": start.step, "epoch": start.epoch, "val_loss": val_loss}
            save(BEST_FILE, **position, diagnostics=statistics.to_dict())
        say(f"best so far: epoch {best.epoch}, val_loss {val_loss:.6f} on this table", flush=True)
        return val_loss

    continued = start is not None and start.stage == "vlm"
    # A state from before a flag existed can be resumed without it.
    flags = {name: value for name in ("llm_int8", "lora_rank") if (value := getattr(args, name))}
    stage = Stage(
        name="stage2",
        title="Stage 2",
        model=model,
        trained=trained,
        loss=mean_loss,
        validate=lambda: validate(accelerator, model, val_loader, mode),
        save=save,
        best_file=BEST_FILE,
        final_file=FINAL_FILE,
        loss_name="caption_loss",
        mean_name="平均 caption_loss",
        log_every=20,
        table="stage2_train_log.csv",
        settings={"start": str(start.path) if start else None, **flags},
        best_so_far=best_so_far,
        start=(start.step, start.epoch) if continued else (0, 0),
    )
    history = train(stage, args, config, accelerator, output, train_loader, order)

    # ---------------------------------------------------------------- results
    recent = [record["caption_loss"] for record in history[-RECENT_EPOCHS:]]
    say(f"最近 {RECENT_EPOCHS} 个 epoch 平均 caption_loss {sum(recent) / len(recent):.6f}")
    say(f"saved in {output}: {FINAL_FILE}, {BEST_FILE}, stage2_loss.png", flush=True)


if __name__ == "__main__":
    run_main(main)
