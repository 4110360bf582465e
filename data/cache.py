"""Preprocessed volumes on disk: computed once, then read slice by slice.

    root/<key>/image.bin    float32 (C_in, z, y, x), compressed slices (:mod:`data.slice_store`)
    root/<key>/mask.bin     labels (z, y, x), where the case has a mask
    root/<key>/meta.json    shapes, checksums, spacing, voxel map, lesions, lesion voxels per slice
    root/files/<name>.json  digest of a source file's content, with the size and time it had

The key is a digest of the files' content, the preprocessing plan and the format version: a file that is moved
or renamed is found again, a file or a plan that changes is not mistaken for its predecessor.

An entry is written into a temporary folder and renamed into place, so it is seen whole or not at all. Of two
processes that prepare the same case, the second finds the first one's entry and drops its own. Every slice is
checked as it is read; a damaged entry is said aloud and prepared again, so that nothing need be forced to the
disk when it is written: what a power cut takes is made anew.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from hashlib import blake2b
from pathlib import Path

import numpy as np

from config.nnunet_plans import PreprocessPlan
from data.imaging.reader import files_of, read_mask, read_volume
from data.lesions import Lesion, find_lesions
from data.nnunet_preprocess import Preprocessed, VoxelMap, preprocess
from data.slice_store import DamagedFile, StoredArray, write_slices

logger = logging.getLogger(__name__)

FORMAT = 5  # raise it when the same files and plan would give other voxels or another layout
_ABANDONED_S = 24 * 3600
_RENAME_TRIES = 5
_UNREADABLE = (FileNotFoundError, ValueError, KeyError, TypeError, IndexError)  # ValueError: JSON, UTF-8
_SETTLED_NS = 2 * 10**9  # a file changed later than this may change again within one tick of its clock


class CachedArray:
    """An array of an entry. ``shape`` and ``dtype`` as NumPy's; slices are read when asked for."""

    def __init__(self, stored: StoredArray, mend: Callable[[DamagedFile], StoredArray]) -> None:
        self._stored, self._mend = stored, mend

    @property
    def shape(self) -> tuple[int, ...]:
        return self._stored.shape

    @property
    def dtype(self) -> np.dtype:
        return self._stored.dtype

    def planes(self, first: int, last: int) -> np.ndarray:
        """Slices ``first`` to ``last - 1``, (…, last - first, y, x); a damaged entry is prepared again."""
        try:
            return self._stored.planes(first, last)
        except (DamagedFile, FileNotFoundError) as error:
            self._stored = self._mend(DamagedFile(str(error)))
        return self._stored.planes(first, last)

    def plane(self, index: int) -> np.ndarray:
        """One slice, (…, y, x)."""
        return self.planes(index, index + 1)[..., 0, :, :]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        """The whole array, always a copy."""
        return np.asarray(self.planes(0, self.shape[-3]), dtype)


@dataclass(frozen=True)
class CachedVolume:
    """One preprocessed case, on disk.

    ``image``: float32 (C_in, z, y, x); ``mask``: labels (z, y, x) or None; ``lesion_voxels``: int64 (z,),
    voxels with a label per slice, or None; ``spacing``: (z, y, x) in mm; ``lesions``: of the mask, largest first;
    ``axcodes``: where x, y and z of the volume run to before ``transpose_forward``, such as "LPS".
    """

    image: CachedArray
    mask: CachedArray | None
    lesion_voxels: np.ndarray | None
    spacing: tuple[float, float, float]
    voxel_map: VoxelMap
    lesions: tuple[Lesion, ...] = ()
    axcodes: str = "LPS"

    @property
    def first_slice_is_highest(self) -> bool:
        """Slices run from head to feet."""
        return "I" in self.axcodes and self.axcodes.index("I") == 2 - self.voxel_map.transpose_forward[0]


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

        Raises InputError for files that :func:`data.imaging.reader.read_volume` or ``read_mask`` refuse.
        """
        image_path = Path(image_path)
        mask_path = None if mask_path is None else Path(mask_path)
        entry = self.entry(image_path, mask_path)
        if not entry.exists():
            self._prepare(entry, image_path, mask_path)
        try:
            return self._load(entry, image_path, mask_path)
        except DamagedFile as error:
            damage = error
        self._replace(entry, image_path, mask_path, damage)
        return self._load(entry, image_path, mask_path)

    def ensure(self, image_path: Path, mask_path: Path | None = None, *, verify: bool = False) -> bool:
        """Prepare the case unless it is there; was anything done?

        A missing or truncated file of an entry is always seen. ``verify`` reads every slice of it as well.
        Raises InputError as :meth:`get` does.
        """
        entry = self.entry(image_path, mask_path)
        if not entry.exists():
            self._prepare(entry, image_path, mask_path)
            return True
        try:
            if not verify:
                self._load(entry, image_path, mask_path)
                return False
            records = json.loads((entry / "meta.json").read_text(encoding="utf-8"))["arrays"]
            for name, record in records.items():
                stored = StoredArray(entry / f"{name}.bin", record)
                for z in range(stored.shape[-3]):
                    stored.planes(z, z + 1)
            self._load(entry, image_path, mask_path)
            return False
        except (DamagedFile, *_UNREADABLE) as error:
            damage = error if isinstance(error, DamagedFile) else DamagedFile(f"{type(error).__name__}: {error}")
        self._replace(entry, image_path, mask_path, damage)
        return True

    def entry(self, image_path: Path, mask_path: Path | None = None) -> Path:
        """The folder that holds, or will hold, this case."""
        digest = blake2b(f"{FORMAT}\n{self._plan_text}\n".encode(), digest_size=20)
        memory = self.root / "files"
        for file in files_of(image_path):  # a series is many, also where one of its files stands for it
            digest.update(file_digest(file, memory))
        for file in [] if mask_path is None else files_of(mask_path):
            digest.update(file_digest(file, memory))
        if mask_path is None:
            digest.update(b"no mask")
        return self.root / digest.hexdigest()

    def _prepare(self, entry: Path, image_path: Path, mask_path: Path | None) -> None:
        volume = read_volume(image_path, self.plan.orientation)
        mask = None if mask_path is None else read_mask(mask_path, volume)
        publish(partial(_write_case, preprocess(volume, self.plan, mask), image_path, volume.axcodes), entry)

    def _replace(self, entry: Path, image_path: Path, mask_path: Path | None, damage: DamagedFile) -> None:
        logger.warning("cache entry %s is damaged (%s); preparing %s again", entry, damage, image_path)
        discard(entry)
        self._prepare(entry, image_path, mask_path)

    def _load(self, entry: Path, image_path: Path, mask_path: Path | None) -> CachedVolume:
        """Raises DamagedFile for an entry that is not what its writer left."""

        def mending(name: str) -> Callable[[DamagedFile], StoredArray]:
            def mend(damage: DamagedFile) -> StoredArray:
                self._replace(entry, image_path, mask_path, damage)
                return _open(entry, name)

            return mend

        try:
            meta = json.loads((entry / "meta.json").read_text(encoding="utf-8"))
            has_mask = "mask" in meta["arrays"]
            stored = {name: StoredArray(entry / f"{name}.bin", record) for name, record in meta["arrays"].items()}
            return CachedVolume(
                image=CachedArray(stored["image"], mending("image")),
                mask=CachedArray(stored["mask"], mending("mask")) if has_mask else None,
                lesion_voxels=np.array(meta["lesion_voxels"], dtype=np.int64) if has_mask else None,
                spacing=tuple(meta["spacing"]),
                voxel_map=VoxelMap.from_dict(meta["voxel_map"]),
                lesions=tuple(map(Lesion.from_list, meta["lesions"])) if has_mask else (),
                axcodes=meta.get("axcodes", self.plan.orientation),
            )
        except _UNREADABLE as error:
            raise DamagedFile(f"{type(error).__name__}: {error}") from error


def file_digest(path: Path, memory: Path | None = None) -> bytes:
    """BLAKE2b of a file's content; of a folder, of all the files in it; of a .hdr or .mhd, of its voxel file too.

    It is remembered while size and modification time stand: in this process, and in the folder ``memory``
    for the next one, which then need not read every file of a large table to find its entries.
    A missing file is reported by the reader, in its words: its digest is empty.
    """
    if path.is_dir():
        digest = blake2b(digest_size=20)
        for file in sorted(path.iterdir()):
            if file.is_file():
                digest.update(file.name.encode("utf-8") + b"\0" + file_digest(file, memory))
        return digest.digest()
    parts = files_of(path) if path.suffix.lower() in (".hdr", ".mhd") else [path]
    digests = []
    for part in parts:
        try:
            stat = part.stat()
        except FileNotFoundError:
            return b""
        digests.append(_content_digest(part.absolute(), stat.st_size, stat.st_mtime_ns, memory))
    return b"".join(digests)


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
    digest = blake2b(digest_size=20)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    if note is not None and time.time_ns() - mtime_ns > _SETTLED_NS:
        memory.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f".tmp-{uuid.uuid4().hex}")
        content = {"file": path.name, "size": size, "mtime_ns": mtime_ns, "digest": digest.hexdigest()}
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(note)
    return digest.digest()


def _open(entry: Path, name: str) -> StoredArray:
    record = json.loads((entry / "meta.json").read_text(encoding="utf-8"))["arrays"][name]
    return StoredArray(entry / f"{name}.bin", record)


def publish(write: Callable[[Path], None], entry: Path) -> None:
    """Let ``write`` fill a temporary folder beside ``entry``, then rename it into place."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(entry.parent)
    temporary = entry.with_name(f".tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        write(temporary)
        _rename(temporary, entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(entry: Path) -> None:
    """Move a damaged entry out of the way first: a folder that is half deleted must not look like an entry."""
    aside = entry.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        entry.rename(aside)
    except FileNotFoundError:
        return  # another process discarded it
    shutil.rmtree(aside, ignore_errors=True)


def _write_case(case: Preprocessed, source: Path, axcodes: str, folder: Path) -> None:
    arrays = {"image": write_slices(folder / "image.bin", case.image)}
    meta = {"arrays": arrays, "spacing": case.spacing, "voxel_map": case.voxel_map.to_dict(), "source": source.name}
    meta["axcodes"] = axcodes
    if case.mask is not None:
        arrays["mask"] = write_slices(folder / "mask.bin", case.mask)
        meta["lesion_voxels"] = np.count_nonzero(case.mask, axis=(1, 2)).tolist()
        meta["lesions"] = [lesion.to_list() for lesion in find_lesions(case.mask)]
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


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
        try:
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(folder, ignore_errors=True)
        except FileNotFoundError:  # its owner finished in between
            continue
