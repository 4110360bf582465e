"""Lesions of a scan from the user's own nnU-Net, decoder and all, in training and for a new scan without a mask.

    root/segmentation/<key>/mask.bin    labels (z, y, x) on the grid of the preprocessed case
    root/segmentation/<key>/meta.json   checksums, lesions, lesion voxels per slice, findings measured on the scan's
                                        grid, and what a mask says of the segmentation

The key is a digest of the case's cache entry and of the nnU-Net file, so another network segments anew. The network is
as nnU-Net trained it, also where the encoder is trained further: views do not change during training.

A nnU-Net segments the cases that it was trained on better than new ones. Where the other folds of its
cross-validation lie beside it, a case is segmented by the fold that held it out (:func:`held_out_by`).
"""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

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
from data.findings import FindingRecord
from data.imaging.reader import name_of, read_volume
from data.lesions import measure_scan
from data.report_language.terms import FINDINGS
from data.segmentation_scores import ComparedCase, compare, scores
from data.tables.caption_table import CaptionRow
from engine.prepare import Files, ensure_all, fill_cache, preparing_threads, unique_files
from engine.run import best_device
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.sliding_window import labels_of, sliding_window
from models.nnunet.unet import SegmentationUNet

VERSION = 5  # raise it when the same network would give other labels, or other things are noted of them
KNOWN_ERRORS = 2.5  # standard errors by which training cases must be segmented better to be called known
_SLICES = 8
_ONE_AT_A_TIME = threading.Lock()  # of threads that prepare cases, see Network.shares_device


class Network(NamedTuple):
    """nnU-Net, whole. ``regions``: its classes are overlapping regions; ``names``: findings of its labels."""

    unet: SegmentationUNet
    device: torch.device
    regions: bool
    names: dict[int, str]

    @property
    def shares_device(self) -> bool:
        """Several scans at a time: slices on a CPU. One fills a GPU, and a block network takes a volume's memory."""
        return self.device.type == "cpu" and self.unet.architecture.dim == 2


class SegmentedCache(CaseCache):
    """Preprocessed cases with nnU-Net's own segmentation as their mask, made once and kept."""

    _own_arrays = ("mask",)
    _damage = "segmentation of %s is damaged and made again: %s"

    def __init__(self, volumes: VolumeCache, checkpoint: Path) -> None:
        """``checkpoint``: nnU-Net's file, which must have the plan of ``volumes``."""
        self.volumes, self.plan, self.root = volumes, volumes.plan, volumes.root
        self.checkpoint = checkpoint
        self.network = file_digest(checkpoint, self.root / "files").hex()
        self.held_out = held_out_by(checkpoint)

    def network_of(self, image_path: Path) -> Path:
        """The nnU-Net file that segments this case. nnU-Net's own images are named ``CASE_0000``."""
        name = name_of(image_path)
        return self.held_out.get(name) or self.held_out.get(name.removesuffix("_0000"), self.checkpoint)

    def ensure(self, image_path: Path, mask_path: Path | None = None, *, verify: bool = False) -> bool:
        prepared = self.volumes.ensure(image_path, mask_path, verify=verify)
        return super().ensure(image_path, mask_path, verify=verify) or prepared

    def entry(self, image_path: Path, mask_path: Path | None = None) -> Path:
        """Where the labels of this case are, or will be."""
        case = self.volumes.entry(image_path, mask_path).name
        network = file_digest(self.network_of(image_path), self.root / "files").hex()
        key = blake2b(f"{VERSION}\n{case}\n{network}".encode(), digest_size=20).hexdigest()
        return self.root / "segmentation" / key

    def _prepare(self, entry: Path, image_path: Path, mask_path: Path | None) -> None:
        volume = self.volumes.get(image_path, mask_path)
        with _ONE_AT_A_TIME:
            network = _network(self.network_of(image_path), self.plan)
        with nullcontext() if network.shares_device else _ONE_AT_A_TIME:
            labels = segment(network, volume, self.plan.patch_size)
        findings = measure(labels, volume, image_path, self.plan, network.names)

        def write(folder: Path) -> None:
            meta = {"array": write_slices(folder / "mask.bin", labels), **describe_labels(labels)}
            meta["findings"] = [finding.to_dict() for finding in findings]
            if volume.mask is not None:
                meta["compared"] = asdict(compare(labels, np.asarray(volume.mask), volume.spacing))
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

        publish(write, entry)

    def _open(self, entry: Path, meta: dict[str, Any], image_path: Path, mask_path: Path | None) -> CachedVolume:
        """The case with the stored labels in place of its mask."""
        volume, mask = self.volumes.get(image_path, mask_path), CachedArray(entry / "mask.bin", meta["array"])
        known = {"mask": mask, "lesions_from": "segmentation", **label_fields(meta)}
        known["findings"] = tuple(map(FindingRecord.from_dict, meta["findings"]))
        compared = ComparedCase(**meta["compared"]) if "compared" in meta else None
        return replace(volume, compared=compared, **known)


def held_out_by(checkpoint: Path) -> dict[str, Path]:
    """Names of the cases that a fold of this nnU-Net has not learnt from → that fold's file, named as ``checkpoint``.

    At the end of its training each fold of nnU-Net segments them into ``fold_K/validation``; ``fold_all`` holds none
    out. What several folds hold out goes to the fold of ``checkpoint``, where it is one of them.
    """
    folds = sorted(checkpoint.parent.parent.glob("fold_[0-9]*"), key=lambda fold: (fold == checkpoint.parent, fold))
    files = [file for fold in folds if (file := fold / checkpoint.name).is_file()]
    return {name_of(case): file for file in files for case in (file.parent / "validation").glob("*")}


def open_cache(config: Config, plan: PreprocessPlan) -> CaseCache:
    """The cache that the configuration's slice policy needs; ``auto`` segments where the nnU-Net has its decoder.

    Raises InputError: the nnU-Net checkpoint is missing, has another plan, or for ``nnunet`` no decoder.
    """
    volumes = VolumeCache(Path(config.cache_dir), plan)
    if config.slice_policy not in ("auto", "nnunet"):
        return volumes
    path = config.resolved("nnunet_encoder_checkpoint")
    remedy = "set nnunet_encoder_checkpoint to the file that was trained with"
    if not path.is_file():
        raise InputError(
            f"slice_policy is {config.slice_policy}, which segments every scan with the whole nnU-Net, and "
            f"{path} is not there; {remedy}, or choose another slice_policy"
        )
    source = load_nnunet_checkpoint(path)
    if PreprocessPlan.from_nnunet(source.plans, source.configuration, config.image_axis_order) != plan:
        raise InputError(f"{path} has another plan than the model was trained with; {remedy}")
    if source.has_decoder:
        return SegmentedCache(volumes, path)
    if config.slice_policy == "nnunet":
        raise InputError(f"slice_policy is nnunet, and {path} has no decoder to segment with; set slice_policy: auto")
    print(f"note: {path} has no decoder: slices follow the masks, or are spread where a row has none", flush=True)
    return volumes


def describe_segmentation(
    compared: Sequence[ComparedCase], min_lesion_mm3: float, training: Sequence[ComparedCase] = ()
) -> str:
    """A line with the scores of the segmentation beside masks, and a warning where it cannot carry a report.

    ``training``: cases of the training table, which nnU-Net may have learnt by heart.
    """
    if not compared:
        return (
            f"segmentation: no mask to compare it with; lesions below {min_lesion_mm3:g} mm3 are dropped "
            "(give validation cases a mask_path to see how good the segmentation is)"
        )
    result = scores(compared, min_lesion_mm3)
    weak = "\nwarning: this segmentation cannot carry a report: train the nnU-Net longer, or set slice_policy: mask"
    line = f"segmentation: {result}{weak if result.weak else ''}"
    if knows(training, compared):
        line += (
            f"\nnote: Dice {scores(training, min_lesion_mm3).dice:.2f} on the training cases: this nnU-Net knows them, "
            "and segments new ones worse; the findings head learns better where nnU-Net's other folds lie beside "
            "this one: they segment the cases that they held out"
        )
    return line


def knows(training: Sequence[ComparedCase], others: Sequence[ComparedCase]) -> bool:
    """Whether the Dice of training cases is above that of others by more than chance explains."""
    known, new = ([case.dice for case in cases if case.dice is not None] for cases in (training, others))
    if min(len(known), len(new)) < 2:
        return False
    error = np.sqrt(np.var(known) / len(known) + np.var(new) / len(new))
    return bool(np.mean(known) - np.mean(new) > KNOWN_ERRORS * error)


def prepare_cases(cache: CaseCache, rows: Sequence[CaptionRow]) -> None:
    """Fill the cache before the first step, and segment where the policy wants it. Raises InputError for a bad file."""
    fill_cache(cache.volumes, rows)
    if isinstance(cache, SegmentedCache):
        segment_all(cache, unique_files(rows))


def segment_all(cache: SegmentedCache, files: Sequence[Files], *, verify: bool = False) -> int:
    """Segment what is not segmented yet, or damaged, with a progress bar; how many were. The cases must have been
    prepared. ``verify``: see :meth:`CaseCache.ensure`.

    One scan is measured while another is in the network. On a CPU the threads share the cores.
    """
    cases = {cache.entry(*pair): pair for pair in files}.values()  # a scan under two names once
    threads, cores = preparing_threads(), torch.get_num_threads()
    torch.set_num_threads(max(1, cores // threads))
    try:
        return ensure_all(cache, cases, threads, "segmenting volumes", verify=verify)
    finally:
        torch.set_num_threads(cores)


def segment(network: Network, volume: CachedVolume, patch: Sequence[int]) -> np.ndarray:
    """Labels uint8 (z, y, x) of a preprocessed case. A 2-D network reads :data:`_SLICES` slices at a time."""
    unet, device, regions, _ = network
    with torch.autocast(device.type, enabled=device.type == "cuda"):
        if len(patch) == 3:
            image = torch.from_numpy(np.asarray(volume.image)).to(device)[None]
            return labels_of(sliding_window(unet, image, patch), regions=regions)[0].cpu().numpy()
        labels = np.empty(volume.image.shape[1:], np.uint8)
        for first in range(0, len(labels), _SLICES):
            planes = volume.image.planes(first, min(first + _SLICES, len(labels)))  # (C, slices, y, x)
            images = torch.from_numpy(planes).to(device).transpose(0, 1)
            found = labels_of(sliding_window(unet, images, patch), regions=regions)
            labels[first : first + _SLICES] = found.cpu().numpy()
    return labels


def measure(
    labels: np.ndarray, volume: CachedVolume, image_path: Path, plan: PreprocessPlan, names: dict[int, str]
) -> list[FindingRecord]:
    """The lesions of a segmentation as findings, on the scan's own grid."""
    if not labels.any():
        return []
    restored = volume.voxel_map.labels_to_original(labels)
    return measure_scan(restored, read_volume(image_path, plan.orientation), names, source="segmentation")


def free_network() -> None:
    """The segmentation network leaves memory, and what torch keeps of freed GPU memory goes back to the driver: the
    language model needs the room."""
    _network.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@cache  # each fold's, until free_network
def _network(checkpoint: Path, plan: PreprocessPlan) -> Network:
    """Raises InputError: the file has another plan than ``plan``, whose axis order is of the configuration."""
    source = load_nnunet_checkpoint(checkpoint)
    own = PreprocessPlan.from_nnunet(source.plans, source.configuration)
    if replace(own, orientation=plan.orientation) != plan:
        raise InputError(
            f"{checkpoint} has another plan than the nnU-Net whose cases it held out: folds of one training have the "
            "same; remove this one from the folder of the others"
        )
    # A worker of a loader, which meets a damaged entry, must not open the GPU beside its parent.
    device = torch.device("cpu" if get_worker_info() else best_device())
    labels = source.dataset_json.get("labels", {})
    # A list of one label is that label: nnU-Net's LabelManager takes longer ones alone for regions.
    labels = {
        name: label[0] if isinstance(label, list) and len(label) == 1 else label for name, label in labels.items()
    }
    regions = any(isinstance(label, list) for label in labels.values())
    names = {} if regions else {int(value): name for name, value in labels.items() if name in FINDINGS}
    network = Network(SegmentationUNet.from_checkpoint(source).to(device).eval(), device, regions, names)
    if network.shares_device:
        network.unet.to(memory_format=torch.channels_last)  # convolutions on a CPU take 1.5 times as long without
    return network
