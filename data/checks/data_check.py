"""Everything that can be wrong with tables and images, found in one pass and told by row.

The quick pass reads tables and headers, the full one every voxel. Training runs the quick pass first.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from config.errors import InputError
from data.checks.image_checks import check_header, check_volume
from data.checks.problems import Problem, from_error
from data.imaging.reader import read_header, read_mask, read_volume
from data.imaging.volume import ImageHeader, Volume
from data.tables.caption_table import CaptionRow

_SHORT_REPORT = 8  # characters


@dataclass(frozen=True)
class CheckedImage:
    """One row's image after its check; what could not be read is None. ``digest`` is of the voxels."""

    row: CaptionRow
    header: ImageHeader | None
    volume: Volume | None
    mask: np.ndarray | None
    digest: str
    problems: list[Problem]


def quick_check(*tables: Sequence[CaptionRow]) -> None:
    """Read the header of every image and mask, and compare the tables. Nothing is printed if all is well.

    Raises:
        InputError: one or more files cannot be used; the line names the first and counts the others.
    """
    wrong = [p for table in tables for row in table for p in check_image(row, quick=True).problems if p.fatal]
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more problems)" if len(wrong) > 1 else ""
        remedy = f"{first.remedy}; " if first.remedy else ""
        raise InputError(
            f"row {first.row}: {first.image}: {first.problem}{more}; {remedy}scripts/check_data.py lists all at once"
        )


def check_image(row: CaptionRow, quick: bool = False) -> CheckedImage:
    """All that can be said about one row's image, mask and text. Raises nothing that its files cause."""
    problems = _text_doubts(row)
    header: ImageHeader | None = None
    volume: Volume | None = None
    mask: np.ndarray | None = None
    digest = ""
    try:
        header = read_header(row.image_path)
        problems += check_header(header)
        if not quick:
            volume = read_volume(row.image_path)
            problems += check_volume(volume)
            digest = hashlib.blake2b(volume.array, digest_size=16, salt=b"%d" % volume.array.shape[0]).hexdigest()
    except InputError as error:
        problems.append(from_error(row.number, row.image_path, error))
    if row.mask_path is not None:
        try:
            labels = read_header(row.mask_path)
            if quick and header is not None:  # else the voxels' exact places are compared below
                problems += _other_grid(row, header, labels)
            if volume is not None:
                mask = read_mask(row.mask_path, volume)
                if not mask.any():
                    problems.append(Problem(0, "the mask is empty", "no slice is chosen by it", level="note"))
        except InputError as error:
            problems.append(replace(from_error(row.number, row.mask_path, error), image=str(row.mask_path)))
    named = [replace(p, row=row.number, image=p.image or str(row.image_path)) for p in problems]
    return CheckedImage(row, header, volume, mask, digest, list(dict.fromkeys(named)))


def _other_grid(row: CaptionRow, header: ImageHeader, labels: ImageHeader) -> list[Problem]:
    if np.allclose(labels.extent_mm, header.extent_mm, rtol=1e-2) and sorted(labels.shape) == sorted(header.shape):
        return []
    words = f"mask has {labels.shape} voxels over {_mm(labels)} mm, its image {header.shape} over {_mm(header)} mm"
    return [Problem(row.number, words, "the mask must be drawn on the image's own grid", str(row.mask_path))]


def _mm(header: ImageHeader) -> str:
    return " x ".join(f"{size:.0f}" for size in header.extent_mm)


def _text_doubts(row: CaptionRow) -> list[Problem]:
    found = []
    if len(row.answer) < _SHORT_REPORT:
        found.append(Problem(0, f"the report is only '{row.answer}'", "is it whole?", level="warning"))
    if row.question and row.question == row.answer:
        found.append(Problem(0, "question and report are the same text", "check the columns", level="warning"))
    return found


def compare_rows(train: Sequence[CaptionRow], val: Sequence[CaptionRow], digests: dict[Path, str]) -> list[Problem]:
    """Images that stand twice, one report for most cases, and patients that both tables share.

    ``digests``: voxel digests of images, where they were read; the same scan under two names has one digest.
    Problems of the validation table carry ``table='val'``, the others ``'train'``.
    """
    problems = [*_duplicates(train, digests, "train"), *_duplicates(val, digests, "val")]
    problems += _shared(train, val, lambda row: row.patient, "patient '{}'")
    problems += _shared(train, val, lambda row: _content(row, digests), "this image")
    for name, rows in (("train", train), ("val", val)):
        texts: dict[str, int] = defaultdict(int)
        for row in rows:
            texts[row.answer] += 1
        text, count = max(texts.items(), key=lambda item: item[1], default=("", 0))
        if count > 2 and count > len(rows) / 2:
            words = f"{count} of {len(rows)} reports are the same text ('{text[:20]}')"
            problems.append(Problem(0, words, "a model learns to say nothing else", level="warning", table=name))
    return problems


def _duplicates(rows: Sequence[CaptionRow], digests: dict[Path, str], table: str) -> Iterable[Problem]:
    seen: dict[str, list[CaptionRow]] = defaultdict(list)
    for row in rows:
        seen[_content(row, digests)].append(row)
    for same in seen.values():
        for earlier, later in zip(same, same[1:], strict=False):
            if (earlier.question, earlier.answer) == (later.question, later.answer):
                words = f"says the same as row {earlier.number}: same image, question and report"
            elif earlier.answer != later.answer and earlier.question == later.question:
                words = f"has the image of row {earlier.number} and another report"
            else:
                continue  # two questions about one image
            yield Problem(later.number, words, "keep one of them", str(later.image_path), level="warning", table=table)


def _shared(
    train: Sequence[CaptionRow], val: Sequence[CaptionRow], key: Callable[[CaptionRow], str], what: str
) -> Iterable[Problem]:
    of_train: dict[str, CaptionRow] = {}
    for row in train:
        of_train.setdefault(key(row), row)
    for row in val:
        other = of_train.get(key(row))
        if other is not None and key(row):
            yield Problem(
                row.number, f"{what.format(key(row))} is in the training table too (row {other.number})",
                "split by patient: the validation score would be too good", str(row.image_path), "warning", "val",
            )  # fmt: skip


def _content(row: CaptionRow, digests: dict[Path, str]) -> str:
    return digests.get(row.image_path) or str(row.image_path.absolute())
