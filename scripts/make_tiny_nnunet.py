"""A small 2-D nnU-Net for the synthetic lesions, trained briefly and saved as nnU-Net itself saves.

    python scripts/make_tiny_nnunet.py --data outputs/quickstart/data --out outputs/quickstart/nnunet

It stands in for a user's network: OUT has nnU-Net 2's own layout, and nnU-Net's predictor runs on it. fold_0 learns
from all of DATA/train.csv; --fold K leaves a third of it out, and the network then segments that third into
fold_K/validation/, as nnU-Net does. At the end its segmentation of DATA/val.csv is scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, not scripts/

from engine.cli import Parser, positive_float, positive_int, run_main

FOLDS = 3


def parse_args() -> argparse.Namespace:
    parser = Parser(description="Train a small segmentation U-Net in nnU-Net's format")
    parser.add_argument("--data", type=Path, required=True, help="folder that make_phantoms.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for plans.json and fold_0/")
    parser.add_argument("--cache_dir", type=Path, help="preprocessed volumes (default: OUT/../cache)")
    parser.add_argument("--steps", type=positive_int, default=12000)
    # High for Adam: batch norm makes the convolutions' scale free.
    parser.add_argument("--lr", type=positive_float, default=1e-2)
    parser.add_argument("--features", type=positive_int, nargs=4, default=(8, 24, 48, 96), help="channels per stage")
    parser.add_argument("--one_class", action="store_true", help="one label, lesion, instead of one for each type")
    parser.add_argument("--fold", type=int, choices=range(1, FOLDS + 1), help="leave out this third of the cases")
    parser.add_argument("--half", action="store_true", help="save the weights in half precision")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # --help and a wrong flag are answered before the imports below, which take seconds

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from config.files import write_text
from config.nnunet_plans import PreprocessPlan
from config.toy_models import STAMP
from data.cache import CachedVolume, VolumeCache
from data.imaging.reader import read_mask, read_volume, write_on_grid
from data.phantom.finding import LESION_TYPES
from data.segmentation_scores import SegmentationScores, choose_min_lesion, compare, scores
from data.tables.caption_table import CaptionRow, read_caption_table
from data.view_selection import centred
from engine.prepare import fill_cache
from engine.run import best_device, native_bf16, set_seeds
from engine.segmentation import Network, segment
from engine.training.optimization import build_optimizer, build_schedule, require_finite
from models.nnunet.architecture import PLAIN, Architecture, Op, planned_architecture
from models.nnunet.checkpoint import save_nnunet_checkpoint
from models.nnunet.unet import ConvBlock, SegmentationUNet, UNetDecoder

PATCH = 128
FINGERPRINT_CASES = 60
FINGERPRINT_VOXELS = 1000  # drawn from the lesions of each case
SCORED_CASES = 60
SMOOTH = 5.0  # voxels, of the soft Dice of an image
MOST_FALSE = 64  # slices, the latest where the network saw a lesion that is not there


class Phase(NamedTuple):
    """A part of the training: images per step with and without lesion, ``side`` voxels wide."""

    fraction: float  # of the steps
    side: int
    with_lesion: int
    without: int
    decoder: bool


# A window is a quarter of a slice, and the encoder half of the network. Whole slices come last: nearly all of a scan's
# slices show no lesion.
PHASES = (
    Phase(0.15, 64, 8, 8, decoder=False),
    Phase(0.60, 64, 8, 8, decoder=True),
    Phase(0.25, PATCH, 3, 5, decoder=True),
)


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
    """Plans in nnU-Net's own layout. The spacing is the coarsest seen, so that every slice fits the patch. The network
    is without norms, as :func:`fold_norms` leaves it."""
    resampling = {"order": 3, "order_z": 0, "force_separate_z": None}
    stages = len(features)
    strides = [[1, 1], *[[2, 2]] * (stages - 1)]
    architecture = planned_architecture(
        PLAIN, 2, list(features), [[3, 3]] * stages, strides, blocks=[2] * stages, decoder_blocks=[1] * (stages - 1)
    )
    architecture["arch_kwargs"] |= {"norm_op": None, "norm_op_kwargs": None}  # see fold_norms
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


class SliceSampler:
    """Draws training images of preprocessed cases: every lesion equally often, whatever its size, and other slices.

    ``false_positives``: slices without lesion where the network saw one; half of those without are drawn from them.
    """

    def __init__(self, volumes: list[CachedVolume], rng: np.random.Generator) -> None:
        self.volumes, self.rng = volumes, rng
        self.lesions = [(case, lesion) for case, volume in enumerate(volumes) for lesion in volume.lesions]
        areas = [volume.lesion_voxels for volume in volumes]
        self.empty = [(case, int(z)) for case, area in enumerate(areas) for z in np.flatnonzero(area == 0)]
        self.false_positives: deque[tuple[int, int]] = deque(maxlen=MOST_FALSE)

    def draw(self, phase: Phase) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
        """Images (B, C, side, side), those with lesion first, labels (B, side, side), and case and slice of each.

        A window lies around the lesion, which need not be in its middle; in a slice without lesion, anywhere.
        """
        rng, images, labels, places = self.rng, [], [], []
        for number in range(phase.with_lesion + phase.without):
            centre = rng.integers(PATCH, size=2)
            if number < phase.with_lesion:
                case, lesion = self.lesions[rng.integers(len(self.lesions))]
                z = lesion.box[0][0] + int(rng.choice(np.flatnonzero(lesion.areas)))
                centre = lesion.core(z) + rng.integers(-phase.side // 3, phase.side // 3, size=2)
            elif self.false_positives and rng.random() < 0.5:
                case, z = self.false_positives[rng.integers(len(self.false_positives))]
            else:
                case, z = self.empty[rng.integers(len(self.empty))]
            image, label = self.volumes[case].image.plane(z), self.volumes[case].mask.plane(z)[None]
            y, x = np.clip(centre - phase.side // 2, 0, PATCH - phase.side)
            window = (slice(None), slice(y, y + phase.side), slice(x, x + phase.side))
            images.append(centred(image, (PATCH, PATCH))[window])
            labels.append(centred(label, (PATCH, PATCH))[window][0])
            places.append((case, z))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)).long(), places


def balanced_entropy(logits: Tensor, cover: Tensor) -> Tensor:
    """Mean cross-entropy of the background, and of the lesions, every slice counting the same: by voxels alone, a
    nodule of twenty would not be learnt beside consolidations of five hundred.

    ``logits``: (B, classes, y, x); ``cover``: the same shape, which fraction of each cell is of which class.
    """
    entropy = -cover * F.log_softmax(logits, dim=1)
    area = cover[:, 1:].sum((1, 2, 3))
    per_slice = entropy[:, 1:].sum((1, 2, 3)) / area.clamp(min=1e-6)
    return per_slice.sum() / (area > 0).sum().clamp(min=1) + entropy[:, 0].sum() / cover[:, 0].sum()


def entropy_and_dice(logits: Tensor, cover: Tensor, smooth: float = SMOOTH) -> Tensor:
    """nnU-Net's own loss, of :func:`balanced_entropy`'s arguments: mean cross-entropy minus the soft Dice of the lesion
    voxels of each image. ``smooth``: voxels; the Dice of an image without lesion is half where as many are found."""
    found, true = 1 - logits.softmax(1)[:, 0], 1 - cover[:, 0]
    both, either = (found * true).sum((1, 2)), (found + true).sum((1, 2))
    return F.cross_entropy(logits, cover) - ((2 * both + smooth) / (either + smooth)).mean()


def decoder_logits(decoder: UNetDecoder, features: list[Tensor]) -> Iterator[Tensor]:
    """Logits of every resolution, coarse to fine: the forward pass with deep supervision."""
    x = features[-1]
    layers = zip(decoder.transpconvs, decoder.stages, decoder.seg_layers, reversed(features[:-1]), strict=True)
    for transpconv, stage, seg_layer, beside in layers:
        x = stage(torch.cat((transpconv(x), beside), dim=1))
        yield seg_layer(x)


def training_loss(
    network: SegmentationUNet, head: nn.Conv2d, image: Tensor, label: Tensor, decoder: bool
) -> tuple[Tensor, Tensor]:
    """Loss of the deepest stage, by ``head``, and with ``decoder`` of all resolutions; and the finest logits.

    Without ``head``, the skip connections carry the types: on held-out slices, a linear classifier on the deepest stage
    knew 57 % of them, with ``head`` 97 %.
    """
    features = network.encoder(image)
    logits = head(features[-1]).float()
    cover = F.one_hot(label, logits.shape[1]).movedim(-1, 1).float()
    # Fractions, not one label a cell: the size of a lesion is read from how much of a cell it covers.
    loss = balanced_entropy(logits, F.adaptive_avg_pool2d(cover, logits.shape[-2:]))
    if decoder:
        for logits in decoder_logits(network.decoder, features):
            scale, part = logits.shape[-1] / cover.shape[-1], F.adaptive_avg_pool2d(cover, logits.shape[-2:])
            loss = loss + scale * entropy_and_dice(logits.float(), part, SMOOTH * scale**2)
    return loss, logits


def train(network: SegmentationUNet, sampler: SliceSampler, steps: int, lr: float) -> None:
    """Train all of ``network`` in the three phases, on a GPU where there is one."""
    device = torch.device(best_device())
    classes = network.architecture.num_classes
    head = nn.Conv2d(network.architecture.features[-1], classes, 1)  # for training alone: nnU-Net has none there
    trained = nn.ModuleList([network, head]).to(device)
    optimizer = build_optimizer(trained, lr, weight_decay=1e-4)
    schedule = build_schedule(optimizer, steps, warmup_ratio=0.05)
    bar = tqdm(range(1, steps + 1), desc="segmentation", unit="step", dynamic_ncols=True, disable=None)
    ends = np.cumsum([phase.fraction for phase in PHASES]) * steps
    for step in bar:
        phase = PHASES[int(np.searchsorted(ends[:-1], step))]
        image, label, places = sampler.draw(phase)
        image, label = image.to(device), label.clamp(max=classes - 1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or native_bf16()):
            loss, logits = training_loss(network, head, image, label, phase.decoder)
        value = require_finite(loss, step, lr)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if phase.side == PATCH:
            false = (logits[phase.with_lesion :].argmax(1) > 0).sum((1, 2)) > 1
            sampler.false_positives.extend(compress(places[phase.with_lesion :], false.tolist()))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value:.3f}")
    network.cpu()


def network_to_train(planned: Architecture) -> SegmentationUNet:
    """The network of the plans with batch norms, for training: windows then give the function of whole slices."""
    return SegmentationUNet(replace(planned, norm=Op("BatchNorm2d", nn.BatchNorm2d, {})))


def fold_norms(network: SegmentationUNet) -> None:
    """Merge each batch norm, as it is at inference, into its convolution. The function stays the same, and no later
    training of the encoder can move the norms' statistics."""
    network.eval()
    for block in network.modules():
        if isinstance(block, ConvBlock):
            block.conv, block.norm = fuse_conv_bn_eval(block.conv, block.norm), nn.Identity()


def score(unet: SegmentationUNet, cache: VolumeCache, rows: list[CaptionRow]) -> SegmentationScores:
    """The segmentation of whole scans against their masks, on the preprocessed grid."""
    network, compared = Network(unet.eval(), torch.device("cpu"), False, {}), []
    for row in rows:
        volume = cache.get(row.image_path, row.mask_path)
        found = segment(network, volume, (PATCH, PATCH))
        compared.append(compare(found, np.asarray(volume.mask), volume.spacing))
    return scores(compared, choose_min_lesion(compared))


def segment_held_out(unet: SegmentationUNet, cache: VolumeCache, rows: list[CaptionRow], folder: Path) -> None:
    """Write the segmentation of each case into ``folder``, under the name of its image and on its grid."""
    network = Network(unet.eval(), torch.device("cpu"), False, {})
    for row in tqdm(rows, desc="validation", unit="case", dynamic_ncols=True, disable=None):
        volume = cache.get(row.image_path, row.mask_path)
        labels = volume.voxel_map.labels_to_original(segment(network, volume, (PATCH, PATCH)))
        write_on_grid(folder / row.image_path.name, labels, row.image_path, cache.plan.orientation)


def main() -> None:
    args = parse_args()
    set_seeds(args.seed)
    rng = np.random.default_rng(args.seed)
    rows = read_caption_table(args.data / "train.csv")
    intensity, spacing = measure(rows, rng)
    plans = make_plans(intensity, spacing, args.features)
    names = ("background", "lesion") if args.one_class else ("background", *LESION_TYPES)
    dataset = {"channel_names": {"0": "CT"}, "labels": {name: value for value, name in enumerate(names)}}
    held_out = rows[args.fold - 1 :: FOLDS] if args.fold else []
    learnt = [row for row in rows if row not in held_out]
    dataset |= {"numTraining": len(rows), "file_ending": ".nii.gz", STAMP: True}
    cache = VolumeCache(args.cache_dir or args.out.parent / "cache", PreprocessPlan.from_nnunet(plans, "2d"))
    fill_cache(cache, rows)
    sampler = SliceSampler([cache.get(row.image_path, row.mask_path) for row in learnt], rng)

    planned = Architecture.from_plans(plans, "2d", in_channels=1, num_classes=len(names))
    network = network_to_train(planned)
    train(network, sampler, args.steps, args.lr)
    fold_norms(network)
    target = args.out / f"fold_{args.fold or 0}" / "checkpoint_best.pth"
    stored = network.half() if args.half else network
    save_nnunet_checkpoint(target, stored.state_dict_nnunet(), plans, "2d", dataset)
    network.float()  # what was saved is scored
    for name, content in (("plans.json", plans), ("dataset.json", dataset)):
        write_text(args.out / name, json.dumps(content, indent=1))
    print(f"segmentation: saved in {args.out}", flush=True)
    segment_held_out(network, cache, held_out, target.parent / "validation")
    table = args.data / "val.csv"
    if table.is_file() and (rows := read_caption_table(table)[:SCORED_CASES]):
        print(f"segmentation of {len(rows)} held-out cases: {score(network, cache, rows)}", flush=True)


if __name__ == "__main__":
    run_main(main)
