"""What a run reads: the encoder of the user's nnU-Net, the tables, and the loaders over the prepared cases."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from config.nnunet_plans import PreprocessPlan
from config.schema import Config
from data.checks.data_check import check_validation, quick_check
from data.checks.problems import Level, raise_errors
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset
from data.tables.caption_table import read_caption_table
from engine.run import EpochShuffle
from engine.segmentation import open_cache, prepare_cases
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder


def load_encoder(config: Config) -> tuple[NnUNetEncoder, PreprocessPlan]:
    """The encoder with nnU-Net's weights, and the plan of its input.

    Raises InputError: the checkpoint is missing, unsafe, or not nnU-Net's.
    """
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    stage, grid = config.encoder_output_stage, config.encoder_target_spatial
    encoder = NnUNetEncoder.from_checkpoint(source, stage, grid, planes=config.slices)
    return encoder, PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order)


def load_plan(config: Config) -> PreprocessPlan:
    """The plan alone, for what prepares data. Raises InputError as :func:`load_encoder` does."""
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    return PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order)


def build_loaders(
    args: argparse.Namespace,
    config: Config,
    plan: PreprocessPlan,
    encoder: NnUNetEncoder,
    collator: CaptionCollator,
    accelerator: Accelerator,
) -> tuple[DataLoader, DataLoader, EpochShuffle]:
    """Training and validation loader, sharded over the processes, and the training order.

    Raises InputError: a table is missing or has a bad row, or a volume cannot be read: before step 0.
    """
    cache = open_cache(config, plan)
    train_table, val_table = config.resolved("caption_csv_train"), config.resolved("caption_csv_val")
    train = MedicalVLMDataset.from_config(config, train_table, cache, encoder, args.seed, train=True)
    val = MedicalVLMDataset.from_config(config, val_table, cache, encoder, args.seed)
    with accelerator.main_process_first():
        prepare_cases(cache, [*train.rows, *val.rows])
    if accelerator.is_main_process:
        print(f"data: {len(train)} training cases, {len(val)} validation cases, cache {config.cache_dir}", flush=True)
    options = {
        "batch_size": args.batch_size,
        "collate_fn": collator,
        "num_workers": config.num_workers,
        "persistent_workers": config.num_workers > 0,
        "pin_memory": accelerator.device.type == "cuda",
        # Each pass draws a seed for its workers; from the global generator, dropout would differ in a resumed epoch.
        "generator": torch.Generator().manual_seed(args.seed),
    }
    order = EpochShuffle(len(train), args.seed)
    train_loader = DataLoader(train, sampler=order, **options)
    return *accelerator.prepare(train_loader, DataLoader(val, **options)), order


def check_tables(config: Config, validation: Level = "warning") -> None:
    """Check both tables and the header of every image, in seconds, before a model is loaded.

    ``validation``: the level of a validation table whose loss says nothing (:func:`check_validation`).

    Raises InputError: as :func:`read_caption_table` and :func:`quick_check` do, or for that validation table.
    """
    tables = (config.resolved("caption_csv_train"), config.resolved("caption_csv_val"))
    train, val = (read_caption_table(t, image_root=config.table_root, path_map=config.path_map) for t in tables)
    quick_check(train, val)
    problems = check_validation(val, validation)
    raise_errors(problems, config.caption_csv_val)
    for problem in problems:
        print(f"{problem.level}: {config.caption_csv_val}: {problem}", flush=True)
