"""``slice_policy: nnunet``: the user's own network finds the lesions, in training and where no mask exists.

    root/segmentation/<key>/mask.bin    labels (z, y, x) on the grid of the preprocessed case
    root/segmentation/<key>/meta.json   checksums, lesions, lesion voxels per slice

The key is a digest of the case's cache entry and of the nnU-Net file, so another network segments anew. The network is
as nnU-Net trained it, also where the encoder is trained further: views do not change during training.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from config.schema import Config
from data.cache import (
    CachedArray,
    CachedVolume,
    CaseCache,
    VolumeCache,
    describe_labels,
    file_digest,
    label_fields,
    publish,
    write_slices,
)
from data.tables.caption_table import CaptionRow
from engine.prepare import Files, fill_cache, unique_files
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.sliding_window import labels_of, sliding_window
from models.nnunet.unet import SegmentationUNet

VERSION = 3  # raise it when the same network would give other labels, or other things are noted of them
_SLICES = 8
_ONE_AT_A_TIME = threading.Lock()  # of threads that prepare cases: a network fills the device by itself


class SegmentedCache(CaseCache):
    """Preprocessed cases with nnU-Net's own segmentation as their mask, made once and kept."""

    _own_arrays = ("mask",)
    _damage = "segmentation of %s is damaged and made again: %s"

    def __init__(self, volumes: VolumeCache, checkpoint: Path) -> None:
        """``checkpoint``: nnU-Net's file, which must have the plan of ``volumes``."""
        self.volumes, self.plan, self.root = volumes, volumes.plan, volumes.root
        self.checkpoint = checkpoint
        self.network = file_digest(checkpoint, self.root / "files").hex()

    def ensure(self, image_path: Path, mask_path: Path | None = None, *, verify: bool = False) -> bool:
        prepared = self.volumes.ensure(image_path, mask_path, verify=verify)
        return super().ensure(image_path, mask_path, verify=verify) or prepared

    def entry(self, image_path: Path, mask_path: Path | None = None) -> Path:
        """Where the labels of this case are, or will be."""
        case = self.volumes.entry(image_path, mask_path).name
        key = blake2b(f"{VERSION}\n{case}\n{self.network}".encode(), digest_size=20).hexdigest()
        return self.root / "segmentation" / key

    def _prepare(self, entry: Path, image_path: Path, mask_path: Path | None) -> None:
        volume = self.volumes.get(image_path, mask_path)
        with _ONE_AT_A_TIME:
            if entry.exists():
                return
            labels = segment(*_network(self.checkpoint), volume, self.plan.patch_size)

        def write(folder: Path) -> None:
            meta = {"array": write_slices(folder / "mask.bin", labels), **describe_labels(labels)}
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

        publish(write, entry)

    def _open(self, entry: Path, meta: dict[str, Any], image_path: Path, mask_path: Path | None) -> CachedVolume:
        """The case with the stored labels in place of its mask."""
        volume, mask = self.volumes.get(image_path, mask_path), CachedArray(entry / "mask.bin", meta["array"])
        return replace(volume, mask=mask, **label_fields(meta))


def open_cache(config: Config, plan: PreprocessPlan) -> CaseCache:
    """The cache that the configuration's slice policy needs.

    Raises InputError: the policy is ``nnunet`` and the nnU-Net checkpoint is missing, or has another plan.
    """
    volumes = VolumeCache(Path(config.cache_dir), plan)
    if config.slice_policy != "nnunet":
        return volumes
    path = config.resolved("nnunet_encoder_checkpoint")
    remedy = "set nnunet_encoder_checkpoint to the file that was trained with"
    if not path.is_file():
        raise InputError(
            "slice_policy is nnunet, which segments every scan with the whole nnU-Net, and "
            f"{path} is not there; {remedy}"
        )
    source = load_nnunet_checkpoint(path)
    if PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order) != plan:
        raise InputError(f"{path} has another plan than the model was trained with; {remedy}")
    return SegmentedCache(volumes, path)


def prepare_cases(cache: CaseCache, rows: Sequence[CaptionRow]) -> None:
    """Fill the cache before the first step, and segment where the policy wants it. Raises InputError for a bad file."""
    segmented = isinstance(cache, SegmentedCache)
    fill_cache(cache.volumes if segmented else cache, rows)  # a thread for each volume; the network then has all
    if segmented:
        segment_all(cache, unique_files(rows))


def segment_all(cache: SegmentedCache, files: Sequence[Files]) -> int:
    """Segment what is not segmented yet, with a progress bar; how many were. The cases must have been prepared."""
    missing = {entry: pair for pair in files if not (entry := cache.entry(*pair)).exists()}
    for pair in tqdm(missing.values(), desc="segmenting volumes", unit="case", dynamic_ncols=True, disable=None):
        cache.ensure(*pair)
    return len(missing)


def segment(
    network: SegmentationUNet, device: torch.device, regions: bool, volume: CachedVolume, patch: Sequence[int]
) -> np.ndarray:
    """Labels uint8 (z, y, x) of a preprocessed case. A 2-D network reads :data:`_SLICES` slices at a time."""
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        if len(patch) == 3:
            image = torch.from_numpy(np.asarray(volume.image)).to(device)[None]
            return labels_of(sliding_window(network, image, patch), regions=regions)[0].cpu().numpy()
        labels = np.empty(volume.image.shape[1:], np.uint8)
        for first in range(0, len(labels), _SLICES):
            planes = volume.image.planes(first, min(first + _SLICES, len(labels)))  # (C, slices, y, x)
            images = torch.from_numpy(planes).to(device).transpose(0, 1)
            found = labels_of(sliding_window(network, images, patch), regions=regions)
            labels[first : first + _SLICES] = found.cpu().numpy()
    return labels


def free_network() -> None:
    """Drop the segmentation network, which :func:`segment`'s callers keep loaded, from the device's memory."""
    _network.cache_clear()


@lru_cache(maxsize=1)
def _network(checkpoint: Path) -> tuple[SegmentationUNet, torch.device, bool]:
    """The whole network, where it runs, and whether its classes are overlapping regions."""
    source = load_nnunet_checkpoint(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    regions = any(isinstance(label, list) for label in source.dataset_json.get("labels", {}).values())
    return SegmentationUNet.from_checkpoint(source).to(device).eval(), device, regions
