"""A small 2-D nnU-Net for the synthetic lesions, trained briefly and saved as nnU-Net itself saves.

    python scripts/make_tiny_nnunet.py --data outputs/quickstart/data --out outputs/quickstart/nnunet

It stands in for a user's network: OUT/fold_0/checkpoint_best.pth and OUT/plans.json have nnU-Net 2's own layout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, positive_float, positive_int, run_main


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Train a small segmentation U-Net in nnU-Net's format")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_phantoms.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for plans.json and fold_0/")
    parser.add_argument("--cache_dir", type=Path, help="preprocessed volumes (default: OUT/../cache)")
    parser.add_argument("--steps", type=positive_int, default=1800)
    parser.add_argument("--batch_size", type=positive_int, default=16)
    # High for Adam: instance norm makes the convolutions' scale free, and 3e-3 took ten times the steps.
    parser.add_argument("--lr", type=positive_float, default=3e-2)
    parser.add_argument("--features", type=positive_int, nargs=4, default=(8, 24, 48, 96), help="channels per stage")
    decoder = "the last steps train the decoder too; a few hundred if its segmentation is to be used"
    parser.add_argument("--decoder_steps", type=positive_int, default=60, help=decoder)
    windows = "fraction of the steps on windows around lesions; the rest on whole slices, whose statistics differ"
    parser.add_argument("--window_share", type=float, default=0.8, help=windows)
    parser.add_argument("--random_slices", type=positive_int, default=1, help="per case, beside those with most lesion")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from config.nnunet_plans import PreprocessPlan
from config.toy_models import STAMP
from data.cache import VolumeCache
from data.imaging.reader import read_mask, read_volume
from data.phantom.finding import FINDING_TYPES
from data.tables.caption_table import CaptionRow, read_caption_table
from data.view_selection import centred
from engine.prepare import fill_cache
from engine.run import native_bf16, set_seeds
from engine.training.optimization import build_optimizer, build_schedule, require_finite
from models.nnunet.architecture import PLAIN, Architecture, planned_architecture
from models.nnunet.checkpoint import save_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet

PATCH = 128
LESION_SLICES = 4  # per case, those with most lesion
FINGERPRINT_CASES = 60
FINGERPRINT_VOXELS = 1000  # drawn from the lesions of each case
CROP = 48  # voxels; most steps see a window around a lesion, a seventh of the work of a slice
LESION_FRACTION = 0.8


def measure(rows: list[CaptionRow], rng: np.random.Generator) -> tuple[dict[str, float], float]:
    """Intensities of lesion voxels (HU) and the coarsest in-plane spacing (mm), as in nnU-Net's fingerprint."""
    values, spacings = [], []
    for row in rows[:FINGERPRINT_CASES]:
        volume = read_volume(row.image_path)
        spacings.append(max(volume.spacing[1:]))
        lesion = volume.array[read_mask(row.mask_path, volume) > 0] if row.mask_path is not None else np.empty(0)
        if lesion.size:
            # As many of every case, as nnU-Net draws them, or large lesions would set the range alone.
            values.append(rng.choice(lesion, FINGERPRINT_VOXELS))
    lesion = np.concatenate(values)
    statistics = {name: float(getattr(np, name)(lesion)) for name in ("max", "mean", "median", "min", "std")}
    low, high = (float(np.percentile(lesion, share)) for share in (0.5, 99.5))
    return {**statistics, "percentile_00_5": low, "percentile_99_5": high}, max(spacings)


def make_plans(intensity: dict[str, float], spacing: float, features: list[int]) -> dict[str, Any]:
    """Plans in nnU-Net's own layout. The spacing is the coarsest seen, so that every slice fits the patch."""
    resampling = {"order": 3, "order_z": 0, "force_separate_z": None}
    stages = len(features)
    strides = [[1, 1], *[[2, 2]] * (stages - 1)]
    architecture = planned_architecture(
        PLAIN, 2, list(features), [[3, 3]] * stages, strides, blocks=[2] * stages, decoder_blocks=[1] * (stages - 1)
    )
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 12,
        "patch_size": [PATCH, PATCH],
        "spacing": [spacing, spacing],
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {**architecture, "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]},
    }
    for kind, changes in (("data", {}), ("seg", {"is_seg": True, "order": 1}), ("probabilities", {"order": 1})):
        configuration[f"resampling_fn_{kind}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{kind}_kwargs"] = {"is_seg": False, **resampling, **changes}
    return {
        "dataset_name": "Dataset900_Phantom",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"2d": configuration},
        "foreground_intensity_properties_per_channel": {"0": intensity},
    }


def training_slices(
    cache: VolumeCache, rows: list[CaptionRow], rng: np.random.Generator, at_random: int
) -> tuple[Tensor, Tensor]:
    """Per case the slices with most lesion and others at random: images (S, C, y, x), labels (S, y, x) uint8."""
    images, labels = [], []
    for row in rows:
        volume = cache.get(row.image_path, row.mask_path)
        area = volume.lesion_voxels
        largest = [int(i) for i in np.argsort(-area)[:LESION_SLICES] if area[i] > 0]
        for index in [*largest, *rng.integers(len(area), size=at_random).tolist()]:
            images.append(centred(volume.image.plane(index), (PATCH, PATCH)))
            labels.append(centred(volume.mask.plane(index)[None], (PATCH, PATCH))[0].astype(np.uint8))
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))


def lesion_crops(images: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A window of :data:`CROP` from each slice, four of five around a lesion voxel where there is one."""
    cut_images, cut_labels = [], []
    for image, label in zip(images, labels, strict=True):
        lesion = label.nonzero()
        if len(lesion) and rng.random() < LESION_FRACTION:
            centre = lesion[rng.integers(len(lesion))].numpy()
        else:
            centre = rng.integers(PATCH, size=2)
        corner = np.clip(centre - CROP // 2 + rng.integers(-CROP // 4, CROP // 4, size=2), 0, PATCH - CROP)
        window = tuple(slice(int(c), int(c) + CROP) for c in corner)
        cut_images.append(image[:, window[0], window[1]])
        cut_labels.append(label[window])
    return torch.stack(cut_images), torch.stack(cut_labels)


def segmentation_loss(logits: Tensor, cover: Tensor) -> Tensor:
    """Mean cross-entropy of the background, and of the lesions, every slice counting the same: by voxels alone, a
    nodule of twenty would not be learnt beside consolidations of five hundred.

    ``logits``: (B, types, y, x); ``cover``: the same shape, which fraction of each cell is of which type.
    """
    entropy = -cover * F.log_softmax(logits, dim=1)
    area = cover[:, 1:].sum((1, 2, 3))
    per_slice = entropy[:, 1:].sum((1, 2, 3)) / area.clamp(min=1e-6)
    return per_slice.sum() / (area > 0).sum().clamp(min=1) + entropy[:, 0].sum() / cover[:, 0].sum()


def dice_and_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """nnU-Net's own loss: mean cross-entropy minus the lesions' soft Dice over the batch, of (B, types, y, x)."""
    probability = logits.softmax(1)[:, 1:]
    truth = F.one_hot(label, logits.shape[1]).movedim(-1, 1)[:, 1:].float()
    both, either = (probability * truth).sum((0, 2, 3)), (probability + truth).sum((0, 2, 3))
    present = truth.sum((0, 2, 3)) > 0
    dice = (2 * both + 1) / (either + 1)
    return F.cross_entropy(logits, label) - dice[present].sum() / present.sum().clamp(min=1)


def training_loss(network: SegmentationUNet, head: nn.Module, image: Tensor, label: Tensor, *, full: bool) -> Tensor:
    """Deep supervision of the deepest stage by ``head``, and with ``full`` the decoder's loss too.

    Without ``head``, the skip connections carry the types: on held-out slices, a linear classifier on the deepest stage
    knew 57 % of them, with ``head`` 97 %.
    """
    features = network.encoder(image.contiguous(memory_format=torch.channels_last))
    types = F.one_hot(label, len(FINDING_TYPES)).movedim(-1, 1).float()
    coarse = head(features[-1])
    # Fractions, not one label a cell: the size of a lesion is read from how much of a cell it covers.
    loss = segmentation_loss(coarse.float(), F.adaptive_avg_pool2d(types, coarse.shape[-2:]))
    return loss + dice_and_entropy(network.decoder(features).float(), label) if full else loss


def main() -> None:
    args = parse_args()
    set_seeds(args.seed)
    rng = np.random.default_rng(args.seed)
    rows = read_caption_table(args.data / "train.csv")
    intensity, spacing = measure(rows, rng)
    plans = make_plans(intensity, spacing, args.features)
    labels_of_types = {"background": 0, **{name: value for value, name in enumerate(FINDING_TYPES) if value}}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels_of_types, "numTraining": len(rows)}
    dataset |= {"file_ending": ".nii.gz", STAMP: True}
    cache = VolumeCache(args.cache_dir or args.out.parent / "cache", PreprocessPlan.from_nnunet(plans, "2d"))
    fill_cache(cache, rows)
    images, labels = training_slices(cache, rows, rng, args.random_slices)

    network = SegmentationUNet(Architecture.from_plans(plans, "2d", in_channels=1, num_classes=len(FINDING_TYPES)))
    head = nn.Conv2d(args.features[-1], len(FINDING_TYPES), 1)  # for training alone: nnU-Net has none there
    trained = nn.ModuleList([network, head]).to(memory_format=torch.channels_last)  # a fifth faster on a CPU
    optimizer = build_optimizer(trained, args.lr, weight_decay=1e-4)
    schedule = build_schedule(optimizer, args.steps, warmup_ratio=0.05)
    bar = tqdm(range(1, args.steps + 1), desc="segmentation", unit="step", dynamic_ncols=True, disable=None)
    for step in bar:
        windowed = step <= args.window_share * args.steps
        count = args.batch_size * (2 if windowed else 1)
        chosen = torch.from_numpy(rng.choice(len(images), count, replace=False))
        image, label = images[chosen], labels[chosen].long()
        if windowed:
            image, label = lesion_crops(image, label, rng)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16()):
            loss = training_loss(network, head, image, label, full=step > args.steps - args.decoder_steps)
        value = require_finite(loss, step, args.lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value:.3f}")
    target = args.out / "fold_0" / "checkpoint_best.pth"
    save_nnunet_checkpoint(target, network.state_dict_nnunet(), plans, "2d", dataset)
    for name, content in (("plans.json", plans), ("dataset.json", dataset)):
        (args.out / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(f"segmentation: {len(images)} slices, last loss {value:.3f}, saved in {args.out}", flush=True)


if __name__ == "__main__":
    run_main(main)
