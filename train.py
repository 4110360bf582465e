"""Stage 1: train the vision part (nnU-Net encoder and Vision-Mamba bridge). The language model does not run.

    python train.py --epochs 3 --batch_size 4 --lr 1e-4
    python train.py --objective proxy_l2 --epochs 3

Writes OUTPUT/vision_bridge_best_val.pt (never from a collapsed epoch) and OUTPUT/vision_bridge_final.pt.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from engine.cli import Parser, add_training_flags, config_from, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Stage 1: vision and bridge")
    add_training_flags(parser, epochs=3, batch_size=4, lr=1e-4)
    parser.add_argument(
        "--objective",
        choices=("align", "proxy_l2"),
        default="align",
        help="align: contrast with the reports; proxy_l2: mean square of the tokens (its minimum is zero output)",
    )
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import torch
from torch import Tensor, nn

from config.errors import InputError
from config.schema import Config, write_config
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from engine.checkpoint import save_checkpoint
from engine.findings_prompt import learnt_findings, set_sizes
from engine.loaders import build_loaders, check_tables, load_encoder, prepare_data
from engine.run import start_run
from engine.scan_checks import ScanChecks
from engine.training.loop import Stage, train, validate
from models.findings_head import Found
from models.language_model.embedding_table import load_embedding_table
from models.language_model.identity import lm_identity, read_lm_config, read_tokenizer
from models.language_model.report_embedding import embed_reports, report_frequencies
from models.medical_vlm import VisionBridge, check_regions
from models.objectives import Align, ProxyL2, Stage1, stage1_counts


def build_objectives(
    args: argparse.Namespace, config: Config, train: MedicalVLMDataset, val: MedicalVLMDataset
) -> tuple[nn.Module, nn.Module, float]:
    """Objectives for training and for validation, and the standard deviation that tokens start with."""
    if args.objective == "proxy_l2":
        return ProxyL2(), ProxyL2(), read_lm_config(config.mamba_model).initializer_range
    table, tokenizer = load_embedding_table(config.mamba_model), read_tokenizer(config.mamba_model)
    reports = [row.answer for row in train.rows]
    if len(set(reports)) < 2:
        raise InputError(
            f"{config.caption_csv_train}: all reports are the same text; --objective align needs at least two"
        )
    frequencies, output_std = report_frequencies(reports, tokenizer), float(table.std())
    objectives = [
        Align(
            *embed_reports([row.answer for row in part.rows], tokenizer, table, frequencies, len(reports)), output_std
        )
        for part in (train, val)
    ]
    return objectives[0], objectives[1], output_std


def main() -> None:
    # ---------------------------------------------------------------- configuration and device
    args = parse_args()
    config = config_from(args)
    check_regions(config)
    accelerator, output = start_run(args, config, "stage1")
    problems = check_tables(config, "error" if args.objective == "align" else "warning", toys=args.allow_toy_model)
    if config.use_cmi:
        accelerator.print("note: CMI reads the question and is trained in Stage 2; here encoder and bridge are trained")

    # ---------------------------------------------------------------- data and model
    encoder, plan = load_encoder(config)
    identity = lm_identity(config.mamba_model)
    collator = CaptionCollator(None, config.max_question_tokens, config.max_answer_tokens)
    config, cache = prepare_data(config, plan, accelerator, problems, force=args.force)
    if accelerator.is_main_process:
        write_config(config, output / "stage1_config.yaml")
    train_loader, val_loader, order = build_loaders(args, config, cache, encoder, collator, accelerator)
    objective, val_objective, output_std = build_objectives(args, config, train_loader.dataset, val_loader.dataset)
    findings = learnt_findings(train_loader.dataset, val_loader.dataset)
    vision = VisionBridge.build(config, encoder, identity.width, output_std, with_cmi=False, findings=findings)
    set_sizes(vision.head, train_loader.dataset, val_loader.dataset)
    accelerator.print(
        f"model: {vision.freeze(train_encoder=config.train_encoder)}; encoder stage {encoder.output_stage}, "
        f"tokens of width {identity.width}",
        flush=True,
    )
    if args.objective == "proxy_l2":
        accelerator.print(
            "objective proxy_l2: its minimum is the zero output, so a low loss is no success; "
            "watch token_std and effective_rank, or use --objective align",
            flush=True,
        )
    val_objective.to(accelerator.device).eval()
    model = Stage1(vision, objective)

    # ---------------------------------------------------------------- training
    checks = ScanChecks(vision, train_loader.dataset, val_loader.dataset)

    def save(name: str, diagnostics: dict[str, Any], **position: Any) -> None:
        parts = {"plan": plan, "llm": identity.to_dict(), "scan_checks": checks()}
        diagnostics = {**diagnostics, "objective": args.objective}
        save_checkpoint(
            output / name, vision, stage="vision", config=config, diagnostics=diagnostics, **parts, **position
        )

    def read(batch: Mapping[str, Any]) -> tuple[Tensor, Found | None, Tensor, Tensor]:
        visual, found = vision.read(batch)
        count = torch.tensor(len(batch["row"]), device=visual.device)
        return visual, found, val_objective(visual, batch["row"]).double() * count, count

    stage = Stage(
        name="stage1",
        title=f"Stage 1, {args.objective}",
        model=model,
        trained=model,
        loss_counts=stage1_counts,
        validate=lambda: validate(accelerator, model, val_loader, read),
        validate_first=True,
        save=save,
        best_file="vision_bridge_best_val.pt",
        final_file="vision_bridge_final.pt",
        loss_name="train_loss",
        log_every=10,
        settings={"objective": args.objective},
    )
    history = train(stage, args, config, accelerator, output, train_loader, order)

    # ---------------------------------------------------------------- results
    best = min((e for e in history if not e["collapsed"]), key=lambda e: e["val_loss"], default=None)
    if best is None:
        line = "every epoch collapsed, the untrained bridge included: no vision_bridge_best_val.pt was written"
    elif best["epoch"] == 0:
        line = "best: epoch 0, the untrained bridge on the nnU-Net encoder; no later epoch was better and not collapsed"
    else:
        line = f"best: epoch {best['epoch']}, val_loss {best['val_loss']:.6f}"
    written = ["vision_bridge_best_val.pt"] * (best is not None) + ["vision_bridge_final.pt", "stage1_loss.png"]
    accelerator.print(f"{line}\nsaved in {output}: {', '.join(written)}", flush=True)


if __name__ == "__main__":
    run_main(main)
