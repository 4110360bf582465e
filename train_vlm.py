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
from collections.abc import Mapping
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

from torch import Tensor, nn

from config.files import write_text
from config.schema import write_config
from data.medical_vlm_dataset import CaptionCollator
from engine.checkpoint import check_agreement, save_checkpoint
from engine.findings_prompt import batch_believed, set_up_findings, with_key_points
from engine.loaders import build_loaders, check_tables, load_plan, prepare_data, report_truncation, with_decisions
from engine.run import start_run
from engine.scan_checks import ScanChecks
from engine.training.diagnostics import TokenStatistics, check_loss_mask
from engine.training.loop import Stage, train, validate
from engine.training.start import (
    BEST_FILE,
    FINAL_FILE,
    add_adapters,
    build_vision,
    check_lora,
    find_start,
    validate_best,
)
from engine.training.text_loss import far_above, text_loss
from models.findings_head import Found
from models.language_model.adapter_file import adapter_digest
from models.language_model.identity import read_lm_config
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM, check_regions, loss_counts

RECENT_EPOCHS = 5


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
    problems = check_tables(config, toys=args.allow_toy_model)
    say = accelerator.print

    # ---------------------------------------------------------------- model and data
    read_lm_config(config.mamba_model)  # a wrong name is answered before any volume is read
    adapter_digest(config.language_model_adapters)  # a wrong file too
    plan = start.preprocess_plan if start is not None else load_plan(config)
    config, cache = prepare_data(config, plan, accelerator, problems, force=args.force)  # nnU-Net has the GPU alone
    weights = {"stage0": config.language_model_adapters, "int8": args.llm_int8}
    lm = MambaLM.load(config.mamba_model, dtype=config.mamba_dtype, device=accelerator.device, **weights)
    vision, lines = build_vision(config, start, lm)
    vision.to(accelerator.device)
    say("\n".join(lines), flush=True)
    collator = CaptionCollator(lm.tokenizer, config.max_question_tokens, config.max_answer_tokens)
    if accelerator.is_main_process:
        write_config(config, output / "stage2_config.yaml")
    train_loader, val_loader, order = build_loaders(args, config, cache, vision.encoder, collator, accelerator)
    report_truncation(accelerator, lm.tokenizer, train_loader, config.max_answer_tokens)
    model = MedicalVLM(vision, lm)
    mode = set_up_findings(accelerator, vision, train_loader, val_loader, config.findings_prompt)
    config = config.replace(findings_prompt=mode)
    of_text = text_loss(accelerator, model, val_loader.dataset, collator)
    parts = vision.freeze(train_encoder=config.train_encoder)
    adapters = add_adapters(lm, args.lora_rank, start)
    trained = nn.ModuleDict({"vision": vision, "adapters": adapters}) if adapters else vision
    if adapters:
        count = sum(p.numel() for p in adapters.parameters())
        parts += f", adapters of rank {args.lora_rank} {count / 1e6:.2f} M (trained)"
    say(f"model: {parts}, language model {lm.name} (frozen)", flush=True)
    # AdamW's two moments and the gradients, in float32, are allocated in the first step.
    reserve = 3 * 4 * sum(p.numel() for p in trained.parameters() if p.requires_grad)
    if lm.checkpointing(config.llm_checkpointing, reserve):
        say("language model: blocks are computed again in the backward pass (llm_checkpointing)", flush=True)
    optimised = {id(p) for p in trained.parameters()}
    assert not any(p.requires_grad for p in lm.parameters() if id(p) not in optimised), "the LLM is not frozen"
    say(check_loss_mask(model, train_loader, accelerator.device), flush=True)
    if accelerator.is_main_process:
        summary = {"max_visual_tokens": config.max_visual_tokens, "mamba_model": config.mamba_model}
        summary |= {"flags": vars(args), "config": config.to_dict(), "llm": lm.identity.to_dict()}
        write_text(output / "stage2_config.json", json.dumps(summary, ensure_ascii=False, indent=1, default=str))

    # ---------------------------------------------------------------- training
    checks = ScanChecks(vision, train_loader.dataset, val_loader.dataset)

    def save(name: str, **position: Any) -> None:
        parts = {"plan": plan, "llm": lm.identity.to_dict(), "adapters": adapters.to_dict() if adapters else None}
        save_checkpoint(output / name, vision, stage="vlm", config=config, scan_checks=checks(), **parts, **position)

    def evaluate(model: MedicalVLM) -> tuple[float, TokenStatistics]:
        """The caption loss per answer token (nats) under the prompts of new cases."""
        data = val_loader.dataset

        def read(batch: Mapping[str, Any]) -> tuple[Tensor, Found | None, Tensor, Tensor]:
            visual, found = model.read(batch)
            said = batch_believed(model.vision.head, found, [data.measured(row) for row in batch["row"].tolist()], mode)
            prompted = with_key_points(batch, lm.tokenizer, said, data.language)
            return visual, found, *model.caption_loss(visual, prompted)

        return validate(accelerator, model, val_loader, read)

    def best_so_far() -> float:
        parts = plan, lm, adapters, train_loader.dataset.findings, evaluate, save
        return validate_best(accelerator, start, output / BEST_FILE, *parts) if continued else math.inf

    continued = start is not None and start.stage == "vlm"
    # A state from before a flag existed can be resumed without it.
    flags = {name: value for name in ("llm_int8", "lora_rank") if (value := getattr(args, name))}
    stage = Stage(
        name="stage2",
        title="Stage 2",
        model=model,
        trained=trained,
        loss_counts=loss_counts,
        validate=lambda: evaluate(model),
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
    recent = [loss for record in history[-RECENT_EPOCHS:] if (loss := record["caption_loss"]) is not None]
    if recent:  # the steps of a very short epoch can all have been skipped
        say(f"最近 {RECENT_EPOCHS} 个 epoch 平均 caption_loss {sum(recent) / len(recent):.6f}")
    if cause := far_above(min(record["val_loss"] for record in history), of_text, args):
        say(cause)
    best = [BEST_FILE] if (output / BEST_FILE).is_file() else []
    if not best:
        say(f"every epoch collapsed: no {BEST_FILE} was written")
    say(f"saved in {output}: {', '.join([FINAL_FILE, *best, 'stage2_loss.png'])}", flush=True)


if __name__ == "__main__":
    run_main(main)
