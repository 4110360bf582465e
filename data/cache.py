"""Preprocessed volumes on disk: computed once, then read slice by slice through a memory map.

    root/<key>/image.npy    float32 (C_in, z, y, x)
    root/<key>/mask.npy     labels (z, y, x), where the case has a mask
    root/<key>/meta.json    spacing, voxel map, lesion voxels per slice, and what proves the entry whole

The key is a digest of the files' content, the preprocessing plan and the format version: a file that is moved
or renamed is found again, a file or a plan that changes is not mistaken for its predecessor.

An entry is written into a temporary folder and renamed into place, so it is seen whole or not at all. Of two
processes that prepare the same case, the second finds the first one's entry and drops its own. No file that
may be mapped is ever written to or replaced, which Windows would refuse.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from config.plans import PreprocessPlan
from data.nifti import read_mask, read_volume
from data.nnunet_preprocess import Preprocessed, VoxelMap, preprocess

logger = logging.getLogger(__name__)

FORMAT = 1  # raise it when the same files and plan would give other voxels or another layout
_ENDS = 1 << 16  # bytes hashed at either end of an array: finds zero-filled tails without reading gigabytes
_ABANDONED_S = 24 * 3600
_RENAME_TRIES = 5


@dataclass(frozen=True)
class CachedVolume:
    """One preprocessed case, memory-mapped and read-only.

    ``image``: float32 (C_in, z, y, x); ``mask``: labels (z, y, x) or None; ``lesion_voxels``: int64 (z,),
    voxels with a label per slice, or None; ``spacing``: (z, y, x) in mm.
    """

    image: np.ndarray
    mask: np.ndarray | None
    lesion_voxels: np.ndarray | None
    spacing: tuple[float, float, float]
    voxel_map: VoxelMap


class VolumeCache:
    """Preprocessed volumes under ``root`` for one ``plan``. Picklable; safe to share between processes."""

    def __init__(self, root: Path | str, plan: PreprocessPlan) -> None:
        self.root = Path(root)
        self.plan = plan
        # The patch is cut after preprocessing; two configurations that differ in it alone share entries.
        described = {key: value for key, value in plan.to_dict().items() if key != "patch_size"}
        self._plan_text = json.dumps(described, sort_keys=True)

    def get(self, image_path: Path | str, mask_path: Path | str | None = None) -> CachedVolume:
        """The preprocessed case, from the disk where it is there and whole, else prepared now.

        Raises InputError for files that :func:`data.nifti.read_volume` or ``read_mask`` refuse.
        """
        image_path = Path(image_path)
        mask_path = None if mask_path is None else Path(mask_path)
        entry = self.entry(image_path, mask_path)
        if entry.exists():
            try:
                return _load(entry)
            except _DamagedEntry as error:
                damage = str(error)
            # Outside the handler: its traceback may hold a mapped file, which Windows would not let go.
            logger.warning("cache entry %s is damaged (%s); preparing %s again", entry, damage, image_path)
            _discard(entry)
        case = self._prepare(image_path, mask_path)
        _publish(case, entry, image_path)
        return _load(entry)

    def entry(self, image_path: Path, mask_path: Path | None = None) -> Path:
        """The folder that holds, or will hold, this case."""
        digest = blake2b(f"{FORMAT}\n{self._plan_text}\n".encode(), digest_size=20)
        digest.update(file_digest(image_path))
        digest.update(b"no mask" if mask_path is None else file_digest(mask_path))
        return self.root / digest.hexdigest()

    def _prepare(self, image_path: Path, mask_path: Path | None) -> Preprocessed:
        volume = read_volume(image_path, self.plan.orientation)
        mask = None if mask_path is None else read_mask(mask_path, volume)
        return preprocess(volume, self.plan, mask)


def file_digest(path: Path) -> bytes:
    """BLAKE2b of a file's content, remembered in this process while size and modification time stand.

    A missing file is reported by the reader, in its words: its digest is empty.
    """
    try:
        stat = path.stat()
    except FileNotFoundError:
        return b""
    if not path.is_file():
        return b""
    return _content_digest(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=65536)
def _content_digest(path: Path, size: int, mtime_ns: int) -> bytes:
    digest = blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()


class _DamagedEntry(Exception):
    """An entry that is not what its writer left; the message says why."""


def _load(entry: Path) -> CachedVolume:
    try:
        meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
        image = _map(entry / "image.npy", meta["arrays"]["image"])
        has_mask = "mask" in meta["arrays"]
        return CachedVolume(
            image=image,
            mask=_map(entry / "mask.npy", meta["arrays"]["mask"]) if has_mask else None,
            lesion_voxels=np.array(meta["lesion_voxels"], dtype=np.int64) if has_mask else None,
            spacing=tuple(meta["spacing"]),
            voxel_map=VoxelMap.from_dict(meta["voxel_map"]),
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:  # ValueError: JSON, UTF-8, npy header
        raise _DamagedEntry(f"{type(error).__name__}: {error}") from error


def _map(path: Path, expected: Mapping[str, Any]) -> np.ndarray:
    """Map an array read-only after checking its size and both of its ends; the rest stays on the disk."""
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise _DamagedEntry(f"{path.name} has {size} bytes, expected {expected['bytes']}")
    if _digest_of_ends(path) != expected["ends"]:
        raise _DamagedEntry(f"the content of {path.name} changed")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if list(array.shape) != expected["shape"] or str(array.dtype) != expected["dtype"]:
        raise _DamagedEntry(f"{path.name} holds {array.dtype} {array.shape}")
    return array


def _publish(case: Preprocessed, entry: Path, source: Path) -> None:
    """Write ``case`` into a temporary folder beside ``entry``, then rename it into place."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(entry.parent)
    temporary = entry.with_name(f".tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        arrays = {"image": _save(temporary / "image.npy", case.image)}
        meta = {
            "arrays": arrays,
            "spacing": case.spacing,
            "voxel_map": case.voxel_map.to_dict(),
            "source": source.name,
        }
        if case.mask is not None:
            arrays["mask"] = _save(temporary / "mask.npy", case.mask)
            meta["lesion_voxels"] = np.count_nonzero(case.mask, axis=(1, 2)).tolist()
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        _rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    with path.open("wb") as file:
        np.save(file, np.ascontiguousarray(array), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())  # the entry must not outlive its content in a power cut
    return {
        "shape": list(array.shape),
        "dtype": str(array.dtype),
        "bytes": path.stat().st_size,
        "ends": _digest_of_ends(path),
    }


def _digest_of_ends(path: Path) -> str:
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        digest.update(file.read(_ENDS))
        file.seek(max(path.stat().st_size - _ENDS, 0))
        digest.update(file.read(_ENDS))
    return digest.hexdigest()


def _rename(temporary: Path, entry: Path) -> None:
    """Rename, unless another process was faster; a virus scanner may hold a new file for a moment."""
    for attempt in range(_RENAME_TRIES):
        try:
            temporary.rename(entry)
            return
        except OSError:
            if entry.exists():
                return  # the same content, prepared by another process
            if attempt == _RENAME_TRIES - 1:
                raise
            time.sleep(0.2 * 2**attempt)


def _discard(entry: Path) -> None:
    """Move a damaged entry out of the way first: a folder that is half deleted must not look like an entry."""
    aside = entry.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        entry.rename(aside)
    except FileNotFoundError:
        return  # another process discarded it
    shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(root: Path) -> None:
    """Temporary folders that a killed process left behind long ago."""
    for folder in root.glob(".tmp-*"):
        try:
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # its owner finished in between
            continue
