"""``slice_policy: nnunet``: the user's own network finds the lesions, in training and where no mask exists.

    root/segmentation/<key>/mask.bin    labels (z, y, x) on the grid of the preprocessed case
    root/segmentation/<key>/meta.json   checksums, lesions, lesion voxels per slice

The key is a digest of the case's cache entry and of the nnU-Net file, so another network segments anew. It is the
network as nnU-Net trained it, decoder and all, also where the encoder is trained further: the views do not change
during training.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

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
    DamagedFile,
    VolumeCache,
    discard,
    file_digest,
    publish,
    write_slices,
)
from data.lesions import Lesion, find_lesions
from data.tables.caption_table import CaptionRow
from engine.prepare import Files, fill_cache, unique_files
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.sliding_window import labels_of, sliding_window
from models.nnunet.unet import SegmentationUNet

logger = logging.getLogger(__name__)

VERSION = 3  # raise it when the same network would give other labels, or other things are noted of them
_SLICES = 8
_ONE_AT_A_TIME = threading.Lock()  # of threads that prepare cases: a network fills the device by itself


class SegmentedCache(CaseCache):
    """Preprocessed cases with nnU-Net's own segmentation as their mask, made once and kept. Picklable."""

    def __init__(self, volumes: VolumeCache, checkpoint: Path) -> None:
        """``checkpoint``: nnU-Net's file, which must have the plan of ``volumes``."""
        self.volumes = volumes
        self.plan = volumes.plan
        self.root = volumes.root
        self.checkpoint = checkpoint
        self.network = file_digest(checkpoint, self.root / "files").hex()

    def get(self, image_path: Path, mask_path: Path | None = None) -> CachedVolume:
        volume = self.volumes.get(image_path, mask_path)
        folder = self.folder(image_path, mask_path)
        if not folder.exists():
            self._segment(folder, volume)
        return self._load(folder, volume)

    def ensure(self, image_path: Path, mask_path: Path | None = None, *, verify: bool = False) -> bool:
        prepared = self.volumes.ensure(image_path, mask_path, verify=verify)
        volume, folder = self.volumes.get(image_path, mask_path), self.folder(image_path, mask_path)
        if folder.exists():
            try:
                labels = self._load(folder, volume).mask
                if verify:
                    labels.check()
                return prepared
            except DamagedFile as damage:
                logger.warning("segmentation of %s is damaged and made again: %s", image_path, damage)
                discard(folder)
        self._segment(folder, volume)
        return True

    def folder(self, image_path: Path, mask_path: Path | None = None) -> Path:
        """Where the labels of this case are, or will be."""
        entry = self.volumes.entry(Path(image_path), None if mask_path is None else Path(mask_path))
        key = blake2b(f"{VERSION}\n{entry.name}\n{self.network}".encode(), digest_size=20).hexdigest()
        return self.root / "segmentation" / key

    def _segment(self, folder: Path, volume: CachedVolume) -> None:
        with _ONE_AT_A_TIME:
            if folder.exists():
                return
            labels = segment(*_network(self.checkpoint), volume, self.plan.patch_size)

        def write(temporary: Path) -> None:
            meta = {
                "array": write_slices(temporary / "mask.bin", labels),
                "lesion_voxels": np.count_nonzero(labels, axis=(1, 2)).tolist(),
                "lesions": [lesion.to_list() for lesion in find_lesions(labels)],
            }
            (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

        publish(write, folder)

    @staticmethod
    def _load(folder: Path, volume: CachedVolume) -> CachedVolume:
        """``volume`` with the stored labels in place of its mask. Raises DamagedFile."""
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            return replace(
                volume,
                mask=CachedArray(folder / "mask.bin", meta["array"]),
                lesion_voxels=np.array(meta["lesion_voxels"], dtype=np.int64),
                lesions=tuple(map(Lesion.from_list, meta["lesions"])),
            )
        except DamagedFile:
            raise
        except (FileNotFoundError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DamagedFile(folder, f"{type(error).__name__}: {error}") from error


def open_cache(config: Config, plan: PreprocessPlan) -> CaseCache:
    """The cache that the configuration's slice policy needs.

    Raises:
        InputError: the policy is ``nnunet`` and the nnU-Net checkpoint is missing, or has another plan.
    """
    volumes = VolumeCache(Path(config.cache_dir), plan)
    if config.slice_policy != "nnunet":
        return volumes
    path = config.resolved("nnunet_encoder_checkpoint")
    if not path.is_file():
        raise InputError(
            f"slice_policy is nnunet, which segments every scan with the whole nnU-Net, and {path} is not there; set "
            "nnunet_encoder_checkpoint to the file that was trained with"
        )
    source = load_nnunet_checkpoint(path)
    if PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order) != plan:
        raise InputError(
            f"{path} has another plan than the model was trained with; set nnunet_encoder_checkpoint to the file that "
            "was trained with"
        )
    return SegmentedCache(volumes, path)


def prepare_cases(cache: CaseCache, rows: Sequence[CaptionRow]) -> None:
    """Fill the cache before the first step, and segment where the policy wants it.

    Raises InputError as :func:`engine.prepare.fill_cache` does.
    """
    if isinstance(cache, VolumeCache):
        fill_cache(cache, rows)
        return
    fill_cache(cache.volumes, rows)  # several volumes at once, a thread each; the network then has all threads
    segment_all(cache, unique_files(rows))


def segment_all(cache: SegmentedCache, files: Sequence[Files]) -> int:
    """Segment what is not segmented yet, with a progress bar; how many were. The cases must have been prepared."""
    missing = {folder: pair for pair in files if not (folder := cache.folder(*pair)).exists()}
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
