"""Preprocessed volumes on disk: computed once, then read slice by slice.

    root/<key>/image.bin    float32 (C_in, z, y, x), compressed slices
    root/<key>/mask.bin     labels (z, y, x), where the case has a mask
    root/<key>/meta.json    shapes, checksums, spacing, voxel map, lesions and their voxels per slice, problems
    root/files/<name>.json  digest of a source file's content, with the size and time it had

The key is a digest of the files' content, the preprocessing plan and the format version: a file that is moved or
renamed is found again, and one that changes is prepared anew. An entry is written into a temporary folder and renamed
into place, so it is seen whole or not at all. Of two processes that prepare the same case, the second drops its entry.
Every slice is checked as it is read; a damaged entry is reported and prepared again (:meth:`CaseCache.read`).

Slices are compressed by Blosc's LZ4, level 5, with shuffled bytes: neighbouring voxels share their exponents. Measured
on preprocessed CT, on one core: size ÷ 1.56, writing 1.0 GB/s, reading 2.3 to 3.0 GB/s; Zstandard 1 gives ÷ 1.75 at 0.4
and 0.55 GB/s. Files are not mapped: Windows does not replace a mapped file, and a map reads thirty times a slice ahead.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numcodecs import Blosc

from config.errors import InputError
from config.files import replace as replace_file
from config.files import write_text
from config.nnunet_plans import PreprocessPlan
from data.checks.image_checks import check_volume, describe_scan, voxel_digest
from data.checks.problems import Problem
from data.findings import FindingRecord
from data.imaging.reader import files_of, read_mask, read_volume
from data.imaging.volume import turned_to_lps
from data.lesions import Lesion, find_lesions, measure_scan
from data.nnunet_preprocess import VoxelMap, preprocess
from data.segmentation_scores import ComparedCase

logger = logging.getLogger(__name__)

FORMAT = 7  # raise it when the same files and plan would give other voxels or another layout
_ABANDONED_S = 24 * 3600
_RENAME_TRIES = 5
_UNREADABLE = (FileNotFoundError, ValueError, KeyError, TypeError, IndexError)  # ValueError: JSON, UTF-8
_SETTLED_NS = 2 * 10**9  # a file changed later than this may change again within one tick of its clock
_CODEC = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)

Result = TypeVar("Result")


class DamagedFile(InputError):
    """A file of the cache is not what its writer left."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path}: {reason}; python scripts/prepare_data.py --verify prepares such entries again")


class CachedArray:
    """A read-only array (…, z, y, x) on disk; slices are read when asked for. Reading raises :class:`DamagedFile`."""

    def __init__(self, path: Path, record: Mapping[str, Any]) -> None:
        """``record``: from :func:`write_slices`. Raises DamagedFile for a file of another size than recorded."""
        self.path, self.shape, self.dtype = path, tuple(record["shape"]), np.dtype(record["dtype"])
        self._begins, self._sums = record["begins"], record["crc32"]
        size = path.stat().st_size
        if size != self._begins[-1] or len(self._begins) != self.shape[-3] + 1 or len(self._sums) != self.shape[-3]:
            raise DamagedFile(path, f"it has {size} bytes, expected {self._begins[-1]}")

    def planes(self, first: int, last: int) -> np.ndarray:
        """Slices ``first`` to ``last - 1``: (…, last - first, y, x)."""
        plane = (*self.shape[:-3], *self.shape[-2:])
        out = np.empty((*self.shape[:-3], last - first, *self.shape[-2:]), self.dtype)
        begin = self._begins[first]
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(begin)
                block = file.read(self._begins[last] - begin)
        except FileNotFoundError as error:
            raise DamagedFile(self.path, "it is missing") from error
        for z in range(first, last):
            chunk = block[self._begins[z] - begin : self._begins[z + 1] - begin]
            if zlib.crc32(chunk) != self._sums[z]:
                raise DamagedFile(self.path, f"slice {z} changed")
            out[..., z - first, :, :] = np.frombuffer(_CODEC.decode(chunk), self.dtype).reshape(plane)
        return out

    def plane(self, index: int) -> np.ndarray:
        """One slice, (…, y, x)."""
        return self.planes(index, index + 1)[..., 0, :, :]

    def check(self) -> None:
        """Read every slice, one at a time. Raises DamagedFile."""
        for z in range(self.shape[-3]):
            self.planes(z, z + 1)

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """The whole array, always a copy."""
        return np.asarray(self.planes(0, self.shape[-3]), dtype)


def write_slices(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write (…, z, y, x), one chunk per z; returns the record that :class:`CachedArray` needs."""
    begins, sums = [0], []
    with path.open("wb") as file:
        for z in range(array.shape[-3]):
            chunk = _CODEC.encode(np.ascontiguousarray(array[..., z, :, :]))
            file.write(chunk)
            begins.append(begins[-1] + len(chunk))
            sums.append(zlib.crc32(chunk))
    return {"shape": list(array.shape), "dtype": array.dtype.str, "begins": begins, "crc32": sums}


@dataclass(frozen=True)
class CachedVolume:
    """One preprocessed case, on disk.

    ``image``: float32 (C_in, z, y, x); ``mask``: labels (z, y, x) or None; ``spacing``: (z, y, x) in mm;
    ``lesion_voxels``: int64 (z,), voxels with a label per slice, or None; ``lesions``: of the mask, largest first;
    ``axcodes``: where x, y and z of the volume run to before ``transpose_forward``, such as "LPS".
    ``lesions_from``: "mask" or "segmentation", or None where nobody looked for lesions. ``findings``: the lesions,
    measured on the scan's own grid, largest first; ``compared``: the segmentation beside the mask,
    where there is one. ``problems``: of the scan as a chest CT
    (:func:`data.checks.image_checks.check_volume`). ``voxels``: digest of the scan's voxels.
    ``described``: :func:`data.checks.image_checks.describe_scan`.
    """

    image: CachedArray
    mask: CachedArray | None
    spacing: tuple[float, float, float]
    voxel_map: VoxelMap
    lesion_voxels: np.ndarray | None = None
    lesions: tuple[Lesion, ...] = ()
    axcodes: str = "LPS"
    lesions_from: str | None = None
    findings: tuple[FindingRecord, ...] = ()
    compared: ComparedCase | None = None
    problems: tuple[Problem, ...] = ()
    voxels: str = ""
    described: Mapping[str, float] = field(default_factory=dict)

    @property
    def first_slice_is_highest(self) -> bool:
        """Slices run from head to feet."""
        return "I" in self.axcodes and self.axcodes.index("I") == 2 - self.voxel_map.transpose_forward[0]


class CaseCache(ABC):
    """Preprocessed cases of one ``plan`` under ``root``. Picklable; safe to share between processes."""

    plan: PreprocessPlan
    root: Path
    network: str | None
    volumes: VolumeCache
    _own_arrays: tuple[str, ...] = ("image", "mask")  # of an entry, read by ``ensure(verify=True)``
    _damage = "cache entry of %s is damaged and prepared again: %s"

    @abstractmethod
    def entry(self, image_path: Path, mask_path: Path | None = None) -> Path:
        """The folder that holds, or will hold, this case."""

    @abstractmethod
    def _prepare(self, entry: Path, image_path: Path, mask_path: Path | None) -> None: ...

    @abstractmethod
    def _open(self, entry: Path, meta: dict[str, Any], image_path: Path, mask_path: Path | None) -> CachedVolume: ...

    def get(self, image_path: Path, mask_path: Path | None = None) -> CachedVolume:
        """The case, prepared now where it is not there.

        Raises InputError: a source file is refused, or a file of the cache is damaged (:class:`DamagedFile`).
        """
        entry = self.entry(image_path, mask_path)
        if not entry.exists():
            self._prepare(entry, image_path, mask_path)
        return self._load(entry, image_path, mask_path)

    def ensure(self, image_path: Path, mask_path: Path | None = None, *, verify: bool = False) -> bool:
        """Prepare the case where it is not there or is damaged; whether anything was prepared.

        A missing or truncated file of an entry is always noticed; ``verify`` reads every slice too.
        Raises InputError for source files that are refused.
        """
        entry = self.entry(image_path, mask_path)
        if entry.exists():
            try:
                volume = self._load(entry, image_path, mask_path)
                for array in (getattr(volume, name) for name in self._own_arrays if verify):
                    if array is not None:
                        array.check()
                return False
            except DamagedFile as damage:
                logger.warning(self._damage, image_path, damage)
                _discard(entry)
        self._prepare(entry, image_path, mask_path)
        return True

    def read(self, image_path: Path, mask_path: Path | None, use: Callable[[CachedVolume], Result]) -> Result:
        """``use`` of the case. Where that meets a damaged file, the case is prepared again, and used again."""
        try:
            return use(self.get(image_path, mask_path))
        except DamagedFile:
            self.ensure(image_path, mask_path, verify=True)
            return use(self.get(image_path, mask_path))

    def _load(self, entry: Path, image_path: Path, mask_path: Path | None) -> CachedVolume:
        """Raises DamagedFile for an entry that is not what its writer left."""
        try:
            meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
            return self._open(entry, meta, image_path, mask_path)
        except InputError:  # a DamagedFile, or a source file that is refused
            raise
        except _UNREADABLE as error:
            raise DamagedFile(entry, f"{type(error).__name__}: {error}") from error


class VolumeCache(CaseCache):
    """Preprocessed volumes."""

    network: str | None = None  # digest of what segments them

    @property
    def volumes(self) -> VolumeCache:
        """As of a cache of segmented cases."""
        return self

    def __init__(self, root: Path | str, plan: PreprocessPlan) -> None:
        self.root, self.plan = Path(root), plan
        # The patch is cut after preprocessing; two configurations that differ in it alone share entries.
        described = {key: value for key, value in plan.to_dict().items() if key != "patch_size"}
        self._plan_text = json.dumps(described, sort_keys=True)

    def entry(self, image_path: Path, mask_path: Path | None = None) -> Path:
        digest = blake2b(f"{FORMAT}\n{self._plan_text}\n".encode(), digest_size=20)
        for path in (image_path, mask_path):
            for file in [] if path is None else files_of(Path(path)):  # all files of a series
                digest.update(file_digest(file, self.root / "files"))
        if mask_path is None:
            digest.update(b"no mask")
        return self.root / digest.hexdigest()

    def _prepare(self, entry: Path, image_path: Path, mask_path: Path | None) -> None:
        volume = read_volume(image_path, self.plan.orientation)
        mask = None if mask_path is None else read_mask(mask_path, volume)
        case = preprocess(volume, self.plan, mask)

        def write(folder: Path) -> None:
            arrays = {"image": write_slices(folder / "image.bin", case.image)}
            meta = {"arrays": arrays, "spacing": case.spacing, "voxel_map": asdict(case.voxel_map)}
            lps, _ = turned_to_lps(volume)
            meta |= {"source": volume.path.name, "axcodes": volume.axcodes, "voxels": voxel_digest(lps)}
            meta["problems"] = [asdict(problem) for problem in check_volume(lps)]
            meta["described"] = describe_scan(lps)
            if case.mask is not None:
                arrays["mask"] = write_slices(folder / "mask.bin", case.mask)
                meta |= describe_labels(case.mask)
                meta["findings"] = [f.to_dict() for f in measure_scan(mask, volume, source="mask")]
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

        publish(write, entry)

    def _open(self, entry: Path, meta: dict[str, Any], image_path: Path, mask_path: Path | None) -> CachedVolume:
        arrays = {name: CachedArray(entry / f"{name}.bin", record) for name, record in meta["arrays"].items()}
        return CachedVolume(
            image=arrays["image"],
            mask=arrays.get("mask"),
            spacing=tuple(meta["spacing"]),
            voxel_map=VoxelMap.from_dict(meta["voxel_map"]),
            axcodes=meta["axcodes"],
            problems=tuple(Problem(**problem) for problem in meta["problems"]),
            voxels=meta["voxels"],
            described=meta["described"],
            **(label_fields(meta) | {"lesions_from": "mask"} if "mask" in arrays else {}),
            findings=tuple(map(FindingRecord.from_dict, meta.get("findings", ()))),
        )


def describe_labels(labels: np.ndarray) -> dict[str, Any]:
    """What ``meta.json`` says of labels (z, y, x); :func:`label_fields` reads it."""
    voxels = np.count_nonzero(labels, axis=(1, 2)).tolist()
    return {"lesion_voxels": voxels, "lesions": [lesion.to_list() for lesion in find_lesions(labels)]}


def label_fields(meta: Mapping[str, Any]) -> dict[str, Any]:
    """``lesion_voxels`` and ``lesions`` of :class:`CachedVolume`."""
    lesions = tuple(map(Lesion.from_list, meta["lesions"]))
    return {"lesion_voxels": np.array(meta["lesion_voxels"], dtype=np.int64), "lesions": lesions}


def file_digest(path: Path, memory: Path | None = None) -> bytes:
    """BLAKE2b of a file's content; of a folder, of all the files in it; of a .hdr or .mhd, of its voxel file too.

    It is remembered while size and modification time stand: in this process, and in the folder ``memory`` for the next
    one. The digest of a missing file is empty: the reader reports it.
    """
    if path.is_dir():
        digest = blake2b(digest_size=20)
        for file in sorted(path.iterdir()):
            if file.is_file():
                digest.update(file.name.encode("utf-8") + b"\0" + file_digest(file, memory))
        return digest.digest()
    parts = files_of(path) if path.suffix.lower() in (".hdr", ".mhd") else [path]
    try:
        stats = {part.absolute(): part.stat() for part in parts}
    except FileNotFoundError:
        return b""
    return b"".join(_content_digest(part, s.st_size, s.st_mtime_ns, memory) for part, s in stats.items())


@lru_cache(maxsize=65536)
def _content_digest(path: Path, size: int, mtime_ns: int, memory: Path | None) -> bytes:
    note = None if memory is None else memory / f"{blake2b(str(path).encode('utf-8'), digest_size=12).hexdigest()}.json"
    if note is not None and note.is_file():
        try:
            known = json.loads(note.read_text(encoding="utf-8"))
            if (known["size"], known["mtime_ns"]) == (size, mtime_ns):
                return bytes.fromhex(known["digest"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged; reading %s again", note, path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, partial(blake2b, digest_size=20))
    if note is not None and time.time_ns() - mtime_ns > _SETTLED_NS:
        known = {"file": path.name, "size": size, "mtime_ns": mtime_ns, "digest": digest.hexdigest()}
        write_text(note, json.dumps(known))
    return digest.digest()


def publish(write: Callable[[Path], None], entry: Path, scratch: Path | None = None) -> None:
    """Let ``write`` fill a temporary folder beside ``entry``, or in ``scratch`` on the same disk, then rename it into
    place."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    if scratch is None:
        _remove_abandoned(entry.parent)
    temporary = (scratch or entry.parent) / f".tmp-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        _rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _discard(entry: Path) -> None:
    """Renamed first: a folder that is half deleted must not look like an entry."""
    aside = entry.with_name(f".tmp-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):  # another process discarded it
        replace_file(entry, aside)  # on Windows another one may read it at the moment
    shutil.rmtree(aside, ignore_errors=True)


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


@cache
def _remove_abandoned(root: Path) -> None:
    """Temporary folders that a killed process left behind long ago; looked for once by each process."""
    for folder in root.glob(".tmp-*"):
        with suppress(FileNotFoundError):  # its owner may finish in between
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
