"""Checks of tables and images that find every problem in one pass.

The quick check reads tables and headers, the full one every voxel. Training runs the quick check first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import numpy as np

from config.errors import InputError
from data.checks.image_checks import check_header, check_volume, voxel_digest
from data.checks.problems import Level, Problem, from_error, raise_errors
from data.imaging.reader import read_header, read_mask, read_volume
from data.imaging.volume import ImageHeader, Volume
from data.lesions import find_lungs, measure_lesions
from data.report_language.labeller import label_report
from data.tables.caption_table import CaptionRow

_SHORT_REPORT = 8  # characters
Rows = Sequence[CaptionRow]


@dataclass
class CheckedImage:
    """One row's image after its check; what could not be read is None. ``digest`` is of the voxels."""

    row: CaptionRow
    header: ImageHeader | None = None
    volume: Volume | None = None
    mask: np.ndarray | None = None
    digest: str = ""
    problems: list[Problem] = field(default_factory=list)


def quick_check(**tables: Sequence[CaptionRow]) -> list[Problem]:
    """Read the header of every image and mask of the named tables. Returns what is only a warning.

    Raises InputError: one or more files cannot be used; the line names the first and counts the others.
    """
    problems = [
        replace(problem, table=name)
        for name, rows in tables.items()
        for row in rows
        for problem in check_image(row, quick=True).problems
    ]
    raise_errors(replace(problem, problem=f"{problem.image}: {problem.problem}") for problem in problems)
    return problems


def check_image(row: CaptionRow, quick: bool = False) -> CheckedImage:
    """All problems of one row's image, mask and text. Raises nothing that its files cause."""
    checked = CheckedImage(row)
    problems = []
    if len(row.answer) < _SHORT_REPORT:
        problems.append(Problem(0, f"the report is only '{row.answer}'", "check that it is complete", level="warning"))
    if row.question and row.question == row.answer:
        problems.append(Problem(0, "question and report are the same text", "check the columns", level="warning"))
    try:
        checked.header = read_header(row.image_path)
        problems += check_header(checked.header)
        if not quick:
            checked.volume = volume = read_volume(row.image_path)
            problems += check_volume(volume)
            checked.digest = voxel_digest(volume)
    except InputError as error:
        problems.append(from_error(row.number, row.image_path, error))
    try:
        if row.mask_path is not None:
            problems += _mask_problems(checked, row.mask_path, quick)
    except InputError as error:
        problems.append(from_error(row.number, row.mask_path, error))
    named = (replace(p, row=row.number, image=p.image or str(row.image_path)) for p in problems)
    checked.problems = list(dict.fromkeys(named))
    return checked


def _mask_problems(checked: CheckedImage, path: Path, quick: bool) -> list[Problem]:
    """Read the mask into ``checked``; a quick check compares the headers' grids only."""
    labels, header = read_header(path), checked.header
    if checked.volume is not None:
        checked.mask = read_mask(path, checked.volume)
        empty = Problem(0, "the mask is empty", "it selects no slice", level="note")
        return _side_problems(checked) if checked.mask.any() else [empty]
    if not quick or header is None:
        return []
    if np.allclose(labels.extent_mm, header.extent_mm, rtol=1e-2) and sorted(labels.shape) == sorted(header.shape):
        return []
    of_mask, of_image = (" x ".join(f"{size:.0f}" for size in one.extent_mm) for one in (labels, header))
    words = f"mask has {labels.shape} voxels over {of_mask} mm, its image {header.shape} over {of_image} mm"
    return [Problem(0, words, "the mask must be drawn on the image's own grid", str(path))]


def _side_problems(checked: CheckedImage) -> list[Problem]:
    """A warning where all findings with a side are on one side in the report, and all lesions of the mask on the other;
    none in a scan without lungs, which has a problem of its own."""
    stated = {mention.side for mention in label_report(checked.row.answer) if mention.polarity != "absent"} - {None}
    if len(stated) != 1 or "bilateral" in stated:
        return []
    spacing = checked.volume.spacing
    try:
        lesions = measure_lesions(checked.mask, spacing, find_lungs(checked.volume.array, spacing))
    except InputError:
        return []
    drawn = {lesion.side for lesion in lesions}
    if len(drawn) != 1 or drawn == stated:
        return []
    words = f"mask on the {drawn.pop()}, report says {stated.pop()}"
    return [Problem(0, words, "find on the contact sheet which one is mirrored, or of another case", level="warning")]


def check_validation(rows: Sequence[CaptionRow], level: Level = "error") -> list[Problem]:
    """A problem where the loss of a validation table carries no information: one case, or one report for all.

    The align objective compares each report with those of other cases, so its loss is then exactly 0.
    """
    if len({row.answer for row in rows}) > 1 or not rows:
        return []
    found = "a single case" if len(rows) == 1 else f"{len(rows)} cases with the same report"
    words = f"the validation table has {found}, so val_loss says nothing"
    remedy = "expected at least 2 cases with different reports; 30 or more make val_loss meaningful"
    return [Problem(0, words, remedy, level=level, table="val")]


def compare_rows(train: Rows, val: Rows, digests: dict[Path, str]) -> list[Problem]:
    """Duplicate images, one report for most cases, and patients or images that are in both tables.

    ``digests``: voxel digests of the images that were read; one scan under two names has one digest.
    Problems of the validation table carry ``table='val'``, the others ``'train'``.
    """
    problems = []
    for name, rows in (("train", train), ("val", val)):
        problems += _duplicates(rows, partial(_content, digests), name)
        for text, count in Counter(row.answer for row in rows).most_common(1):
            if count > 2 and count > len(rows) / 2:
                words = f"{count} of {len(rows)} reports are the same text ('{text[:20]}')"
                problems.append(Problem(0, words, "a model learns to write only this", level="warning", table=name))
    return problems + rows_in_training(train, val, digests)


def rows_in_training(train: Rows, rows: Rows, digests: dict[Path, str]) -> list[Problem]:
    """A warning for each patient and image of ``rows`` that the training table has too; ``digests``: of the images."""
    problems = []
    remedy = "split by patient: the validation score would be too good"
    for what, key in (("patient '{}'", attrgetter("patient")), ("this image", partial(_content, digests))):
        first = {key(row): row.number for row in reversed(train) if key(row)}
        for row in rows:
            if key(row) in first:
                words = f"{what.format(key(row))} is in the training table too (row {first[key(row)]})"
                problems.append(Problem(row.number, words, remedy, str(row.image_path), "warning", "val"))
    return problems


def _content(digests: dict[Path, str], row: CaptionRow) -> str:
    return digests.get(row.image_path) or str(row.image_path.absolute())


def _duplicates(rows: Sequence[CaptionRow], content: Callable[[CaptionRow], str], table: str) -> Iterator[Problem]:
    seen: dict[tuple[str, str], CaptionRow] = {}  # by image and question: two questions about one image may stand
    for row in rows:
        other = seen.get((content(row), row.question))
        if other:
            words = f"has the image of row {other.number} and another report"
            if other.answer == row.answer:
                words = f"says the same as row {other.number}: same image, question and report"
            yield Problem(row.number, words, "keep one of them", str(row.image_path), "warning", table)
        seen[content(row), row.question] = row
