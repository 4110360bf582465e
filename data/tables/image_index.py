"""The image of an examination number: the one file, or folder of DICOM slices, below a folder that bears it.

Matches are tried in this order: the exact name; the name with nnU-Net's ``_0000``; the number as a whole word of the
path; the same without leading zeros, which Excel removes. Masks, labels and segmentations are excluded by their names.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path

from config.schema import resolve_path
from data.imaging.dicom import DICOM_SUFFIXES, is_dicom
from data.imaging.reader import SUFFIXES, name_of

_MASK = re.compile(r"(.*[_\-. ])?(masks?|labels?|labelst[rs]|seg|segs|segmentations?)", re.IGNORECASE)
_FILES = tuple(suffix for suffix in SUFFIXES if suffix not in (".img", ".img.gz", *DICOM_SUFFIXES))  # .hdr: its pair


class ImageIndex:
    """Images below ``root``, which is listed on first use."""

    def __init__(self, root: Path, path_map: dict[str, str] | None = None) -> None:
        self.root, self.path_map = root, path_map

    def path(self, cell: str) -> Path:
        """The path that a cell names, relative to ``root``."""
        try:
            return resolve_path(cell, self.root, self.path_map)
        except ValueError:  # a zero byte: no path, and not there either
            return self.root / cell

    def find(self, number: str) -> list[Path]:
        """Images of the first kind of match that has any: none, one, or several where the number is ambiguous."""
        wanted = number.casefold()
        for name in (wanted, f"{wanted}_0000"):
            if name in self._by_stem:
                return [path for _, path in self._by_stem[name]]
        padded = [f"0*{wanted.lstrip('0') or '0'}"] if wanted.isascii() and wanted.isdigit() else []
        for word in (re.escape(wanted), *padded):
            pattern = re.compile(rf"(?<![0-9a-z]){word}(?![0-9a-z])")
            if fits := [path for part in self._by_stem.values() for text, path in part if pattern.search(text)]:
                return fits
        return []

    @cached_property
    def _by_stem(self) -> dict[str, list[tuple[str, Path]]]:
        """By name without suffix: the path below ``root``, for words, and the image."""
        images: set[Path] = set()
        for folder, _, names in os.walk(self.root):
            images |= {Path(folder, name) for name in names if name.lower().endswith(_FILES)}
            # An archive's slices have names without a suffix, often: the first such file tells.
            others = (Path(folder, name) for name in names if "." not in name or name.replace(".", "").isdigit())
            slices = any(name.lower().endswith(DICOM_SUFFIXES) for name in names)
            if slices or ((first := next(others, None)) is not None and is_dicom(first)):
                images.add(Path(folder))
        stems: dict[str, list[tuple[str, Path]]] = {}
        for path in sorted(images - {self.root}):
            below = path.relative_to(self.root).parent / name_of(path)
            if not any(_MASK.fullmatch(part) for part in below.parts):
                stems.setdefault(below.name.casefold(), []).append((below.as_posix().casefold(), path))
        return stems
