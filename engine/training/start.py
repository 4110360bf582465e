"""What a Stage-2 training starts from: a checkpoint or none, its vision part, and adapters of the language model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate import Accelerator

from config.errors import InputError
from config.files import keep_previous
from config.nnunet_plans import PreprocessPlan
from config.schema import Config
from engine.checkpoint import Checkpoint, check_agreement, load_checkpoint, load_vision_weights
from engine.loaders import load_encoder
from engine.parallel import on_main
from engine.training.diagnostics import TokenStatistics
from engine.training.train_state import started_from
from models.language_model.lora import Adapters
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM, VisionBridge
from models.pretrained import rebuild_vision

BEST_FILE, FINAL_FILE = "vision_bridge_vlm_best_val.pt", "vision_bridge_vlm_final.pt"
STATE_FILE = "stage2_state.pt"


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
        # A run that was killed after its last checkpoint and before its end goes on from where it began.
        unfinished = started_from(output / STATE_FILE) if args.resume == "auto" else {}
        path = unfinished.get("start", last)
        if path is None:
            return None
    checkpoint = load_checkpoint(Path(path))
    if checkpoint.collapsed and not args.allow_collapsed:
        raise InputError(
            f"{path} is stamped as collapsed (token_std {checkpoint.diagnostics['token_std']:.2g}, effective rank "
            f"{checkpoint.diagnostics['effective_rank']:.1f}): its tokens say nothing about the image; "
            "train Stage 1 again (--objective align), or use --from_scratch, or insist with --allow_collapsed"
        )
    return checkpoint


def build_vision(config: Config, start: Checkpoint | None, lm: MambaLM) -> tuple[VisionBridge, list[str]]:
    """The vision part, and lines that say where its weights come from."""
    if start is None:
        encoder, _ = load_encoder(config)
        output_std = float(lm.model.get_input_embeddings().weight.float().std())
        vision = VisionBridge.build(config, encoder, lm.width, output_std, with_cmi=config.use_cmi)
        return vision, ["start: nnU-Net encoder, untrained bridge"]
    lines = [f"start: {start.path} (epoch {start.epoch}, val_loss {start.val_loss:.6f})"]
    lines += check_agreement(start, config)
    vision = rebuild_vision(VisionBridge, config, vars(start), with_cmi=config.use_cmi)
    at_random = load_vision_weights(vision, start)
    if at_random:
        lines.append(f"the checkpoint has no CMI: these start at random: {', '.join(at_random)}")
    return vision, lines


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


def validate_best(
    accelerator: Accelerator,
    start: Checkpoint,
    path: Path,
    plan: PreprocessPlan,
    lm: MambaLM,
    adapters: Adapters | None,
    findings: Sequence[str],
    validate: Callable[[MedicalVLM], tuple[float, TokenStatistics]],
    save: Callable[..., None],
) -> float:
    """Validation loss, on the present table, of the best checkpoint of the training that ``start`` is the last of.

    It is kept until an epoch is better. Where ``path`` holds none, or one that cannot be compared and is kept under
    another name, ``start`` becomes the best.
    """

    def comparable() -> bool:
        """Decided by one process: the main one renames the file, and writes it below."""
        if not path.is_file():
            return False
        best, rank = load_checkpoint(path), adapters.rank if adapters else 0
        planes = len(plan.patch_size) == 3  # a 3-D encoder's volume is pooled to as many as there are slices
        of_best = best.preprocess_plan, best.llm["width"], best.llm.get("adapters", ""), rank_of(best)
        of_best += tuple(best.findings or ()), planes and best.config.slices
        if same := of_best == (plan, lm.width, lm.adapters, rank, tuple(findings), planes and start.config.slices):
            return same
        print(f"{path.name} is of another training and is kept as {keep_previous(path).name}", flush=True)
        return False

    best = load_checkpoint(path) if on_main(accelerator, comparable) else start
    if adapters and best is not start:
        adapters.load(best.adapters)
    val_loss, statistics = validate(MedicalVLM(best.build_vision().to(accelerator.device), lm))
    if adapters and best is not start:
        adapters.load(start.adapters)
    if best is start and accelerator.is_main_process:
        position = {"step": start.step, "epoch": start.epoch, "val_loss": val_loss}
        save(path.name, **position, diagnostics=statistics.to_dict())
    accelerator.print(f"best so far: epoch {best.epoch}, val_loss {val_loss:.6f} on this table", flush=True)
    return val_loss
