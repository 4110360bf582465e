"""What a run reads: the encoder of the user's nnU-Net, the tables, and the loaders over the prepared cases."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from config.nnunet_plans import PreprocessPlan
from config.schema import Config
from config.toy_models import check_toy_models
from data.cache import CaseCache
from data.checks.data_check import check_validation, quick_check
from data.checks.problems import Level, Problem, raise_errors
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset, encode_answer
from data.segmentation_scores import choose_min_lesion
from data.tables.caption_table import CaptionRow, read_caption_table, read_prompts
from data.view_selection import ViewSelection, slices_for
from engine.interrupt import data_workers
from engine.parallel import my_part
from engine.run import EpochBatches
from engine.scan_checks import check_scans
from engine.segmentation import SegmentedCache, describe_segmentation, free_network, open_cache, prepare_cases
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder

DECIDED_BY_DATA = ("slices", "min_lesion_mm3")  # where the configuration leaves them empty


def with_decisions(config: Config, trained: Config) -> Config:
    """``config`` with what the data of an earlier training decided, where it is empty."""
    return config.replace(**{key: getattr(trained, key) for key in DECIDED_BY_DATA if getattr(config, key) is None})


def load_encoder(config: Config) -> tuple[NnUNetEncoder, PreprocessPlan]:
    """The encoder with nnU-Net's weights, and the plan of its input.

    Raises InputError: the checkpoint is missing, unsafe, or not nnU-Net's.
    """
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    stage, grid = config.encoder_output_stage, config.encoder_target_spatial
    encoder = NnUNetEncoder.from_checkpoint(source, stage, grid, planes=config.slices or 1)
    return encoder, PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order)


def load_plan(config: Config) -> PreprocessPlan:
    """The plan alone, for what prepares data. Raises InputError as :func:`load_encoder` does."""
    source = load_nnunet_checkpoint(config.resolved("nnunet_encoder_checkpoint"))
    return PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order)


def prepare_data(
    config: Config, plan: PreprocessPlan, accelerator: Accelerator, problems: Sequence[Problem] = (), *, force: bool
) -> tuple[Config, CaseCache]:
    """Fill the cache from both tables, check every scan, and resolve the keys of :data:`DECIDED_BY_DATA`.

    Args:
        problems: found before, counted with those of the scans.
        force: go on with scans that cannot be a chest CT.

    Raises:
        InputError: a table has a bad row, a volume cannot be read or is no chest CT: before step 0.
    """
    names = {"train": "caption_csv_train", "val": "caption_csv_val"}
    tables = {
        name: read_caption_table(config.resolved(key), image_root=config.table_root, path_map=config.path_map)
        for name, key in names.items()
    }
    cache = open_cache(config, plan)
    rows = [row for rows in tables.values() for row in rows]
    prepare_cases(cache, my_part(accelerator, rows))
    accelerator.wait_for_everyone()
    prepare_cases(cache, rows)  # what the others prepared is there, unless their cache is on another machine
    free_network()
    check_scans(cache, tables, problems, force=force)
    config = resolve_views(config, cache, tables)
    sizes = f"{len(tables['train'])} training cases, {len(tables['val'])} validation cases"
    print(f"data: {sizes}, cache {config.cache_dir}", flush=True)
    return config, cache


def resolve_views(config: Config, cache: CaseCache, tables: dict[str, Sequence[CaptionRow]]) -> Config:
    """``config`` with ``slices`` and ``min_lesion_mm3``, printed with what the masks say of the segmentation."""
    cases = {name: [cache.get(row.image_path, row.mask_path) for row in rows] for name, rows in tables.items()}
    least = config.min_lesion_mm3
    if isinstance(cache, SegmentedCache):
        known, compared = ([case.compared for case in cases[name] if case.compared] for name in ("train", "val"))
        # The few lesions of a validation table may all be large.
        least = choose_min_lesion([*known, *compared]) if least is None else least
        if other := sum(cache.network_of(row.image_path) != cache.checkpoint for row in tables["train"]):
            print(f"segmentation: {other} training cases by the fold of the nnU-Net that held them out", flush=True)
        print(describe_segmentation(compared, least, known), flush=True)
        config = config.replace(min_lesion_mm3=least)
        if not any(case.findings for case in cases["train"]):
            print("warning: the segmentation finds no lesion in any training case: check nnunet_encoder_checkpoint")
    if config.slices is None:
        if len(cache.plan.patch_size) == 3 or config.slice_policy == "middle":
            slices = 1
        else:
            selection = ViewSelection(cache.plan, (1, 1), 1, config.slice_policy, min_lesion_mm3=least or 0.0)
            around = config.roi_side**2 if config.roi_policy == "lesion" else 0
            counts = [len(selection.lesions(case)) for case in cases["train"]]
            slices = slices_for(counts, config.max_visual_tokens, around)
        config = config.replace(slices=slices)
    origins = Counter(case.lesions_from or "nothing" for case in cases["train"])
    named = ", ".join(f"{origin} ({count} cases)" for origin, count in origins.most_common())
    print(f"views: slices {config.slices}, slice_policy {config.slice_policy}, lesions from {named}", flush=True)
    return config


def build_loaders(
    args: argparse.Namespace,
    config: Config,
    cache: CaseCache,
    encoder: NnUNetEncoder,
    collator: CaptionCollator,
    accelerator: Accelerator,
) -> tuple[DataLoader, DataLoader, EpochBatches]:
    """Training and validation loader over prepared cases, this process's part of them, and the training order.

    Every validation case is read by one process; how many a process has differs by one.
    """
    train_table, val_table = config.resolved("caption_csv_train"), config.resolved("caption_csv_val")
    train = MedicalVLMDataset.from_config(config, train_table, cache, encoder, args.seed, train=True)
    val = MedicalVLMDataset.from_config(config, val_table, cache, encoder, args.seed)
    options = {
        "collate_fn": collator,
        **data_workers(config.num_workers),
        "pin_memory": accelerator.device.type == "cuda",
        # Each pass draws a seed for its workers; from the global generator, dropout would differ in a resumed epoch.
        "generator": torch.Generator().manual_seed(args.seed),
    }
    order = EpochBatches(len(train), args.seed, args.batch_size, accelerator.process_index, accelerator.num_processes)
    mine = my_part(accelerator, list(range(len(val))))
    loaders = (
        DataLoader(train, batch_sampler=order, **options),
        DataLoader(val, args.batch_size, sampler=mine, **options),
    )
    # accelerate moves the batches to the device; it must not divide them once more.
    ours = {"num_processes": 1, "process_index": 0, "put_on_device": True, "device": accelerator.device}
    ours["non_blocking"] = True  # from pinned memory, while the device computes
    return *(prepare_data_loader(loader, **ours) for loader in loaders), order


def report_truncation(
    accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, loader: DataLoader, limit: int
) -> None:
    """Print how many reports are cut at ``limit`` tokens."""
    answers = [row.answer for row in loader.dataset.rows]
    cut = sum(encode_answer(tokenizer, answer, limit)[1] for answer in answers)
    if cut:
        accelerator.print(
            f"warning: {cut} of {len(answers)} reports are longer than max_answer_tokens {limit} and are cut"
        )


def check_tables(config: Config, validation: Level = "warning", *, toys: bool = False) -> list[Problem]:
    """Check both tables and the header of every image, in seconds, before a model is loaded. Returns the warnings.

    ``validation``: the level of a validation table whose loss says nothing. ``toys``: --allow_toy_model.

    Raises InputError: as :func:`read_caption_table` and :func:`quick_check` do, for that validation table, or for toy
    models with own images, which the quick start's table names.
    """
    tables = (config.resolved("caption_csv_train"), config.resolved("caption_csv_val"))
    train, val = (read_caption_table(t, image_root=config.table_root, path_map=config.path_map) for t in tables)
    if not toys:
        check_toy_models(config, [row.image_path for row in (*train, *val)], allow=False)
    if config.caption_prompt_json:
        read_prompts(Path(config.caption_prompt_json))
    found = quick_check(train=train, val=val)
    problems = check_validation(val, validation)
    raise_errors(problems, config.caption_csv_val)
    for problem in problems:
        print(f"{problem.level}: {config.caption_csv_val}: {problem}", flush=True)
    return found
