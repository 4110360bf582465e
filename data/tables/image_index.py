"""From the number of an examination to its file: the one image below a folder that bears it.

An exact name comes first, then a name with nnU-Net's ``_0000``, then the number as a whole word of the path, then
the same without leading zeros, which Excel takes away. The first of these that fits anything decides; where it fits
two, neither is taken. Files and folders that call themselves mask, label or segmentation are no images.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from data.imaging.dicom import DICOM_SUFFIXES
from data.imaging.reader import SUFFIXES

_SKIPPED = (".img", ".img.gz")  # the .hdr stands for the pair
_MASK = re.compile(r"(.*[_\-. ])?(masks?|labels?|labelst[rs]|seg|segs|segmentations?)", re.IGNORECASE)
_NAMED = tuple(suffix for suffix in SUFFIXES if suffix not in (*_SKIPPED, *DICOM_SUFFIXES))


class ImageIndex:
    """Images below ``root``: files, and folders of DICOM slices. The folder is listed on first use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, number: str) -> list[Path]:
        """Every image that fits equally well: empty for none, more than one where it is ambiguous."""
        wanted = number.strip().casefold()
        if not wanted:
            return []
        for name in (wanted, f"{wanted}_0000"):
            if name in self._by_stem:
                return self._by_stem[name]
        patterns = [rf"(?<![0-9a-z]){re.escape(wanted)}(?![0-9a-z])"]
        if wanted.isascii() and wanted.isdigit():
            patterns.append(rf"(?<![0-9a-z])0*{int(wanted)}(?![0-9a-z])")
        for pattern in patterns:
            fits = [path for words, path in self._words if re.search(pattern, words)]
            if fits:
                return fits
        return []

    @cached_property
    def _images(self) -> list[Path]:
        images: set[Path] = set()
        for path in self.root.rglob("*") if self.root.is_dir() else ():
            name = path.name.lower()
            if name.endswith(DICOM_SUFFIXES):
                images.add(path.parent)
            elif name.endswith(_NAMED) and path.is_file():
                images.add(path)
        images.discard(self.root)
        return sorted(path for path in images if not self._is_mask(path))

    def _is_mask(self, path: Path) -> bool:
        parts = (*path.relative_to(self.root).parent.parts, stem(path))
        return any(_MASK.fullmatch(part) for part in parts)

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        stems: dict[str, list[Path]] = defaultdict(list)
        for path in self._images:
            stems[stem(path).casefold()].append(path)
        return dict(stems)

    @cached_property
    def _words(self) -> list[tuple[str, Path]]:
        return [
            ((path.relative_to(self.root).parent / stem(path)).as_posix().casefold(), path) for path in self._images
        ]


def stem(path: Path) -> str:
    """The name without an image's suffix."""
    name = path.name
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]
