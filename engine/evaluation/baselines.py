"""Reports of training cases, copied: what a model must exceed to be worth its training.

nearest    the training case whose mean visual token is nearest: cosine, about the mean of the training cases
lookup     the training report whose findings are most similar to those that the model itself states
frequent   the most frequent training report; where no two are equal, the first one with the most frequent findings
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config.errors import InputError, counted
from config.schema import Config
from data.cache import CaseCache, file_digest
from data.checks.data_check import rows_in_training
from data.findings import FindingRecord
from data.medical_vlm_dataset import MedicalVLMDataset
from data.tables.caption_table import CaptionRow, scan_caption_table
from data.view_selection import EncoderGeometry
from engine.evaluation.finding_metrics import Mentions
from engine.evaluation.localisation import described
from engine.segmentation import prepare_cases

BASELINES = {
    "nearest": "copying the nearest training case's report",
    "lookup": "copying the training report with the most similar findings",
    "frequent": "copying the most frequent training report",
}
_POINTS = 3, 1, 1, 1  # of a finding's name, side, level and size: the name counts as much as all others


class TrainingCases(NamedTuple):
    """``rows``: of ``data``, those that are no evaluated case. ``note``: what they are, or why there are none."""

    data: MedicalVLMDataset | None
    rows: list[int]
    note: str


class CopiedReports(NamedTuple):
    """Reports of training cases by baseline, for each evaluated case.

    ``reports`` is empty where there are none. ``note``: where they come from, or why there are none.
    """

    reports: dict[str, list[str]]
    note: str


def training_cases(
    config: Config, cache: CaseCache, encoder: EncoderGeometry, evaluated: Sequence[CaptionRow]
) -> TrainingCases:
    """The training table, prepared, its images without random changes. A line says why where it cannot be used."""
    try:
        path = config.resolved("caption_csv_train")
        shared = warn_of_training_cases(config, path, evaluated)
        read_once = config.replace(memory_cache_mb=0)
        data = MedicalVLMDataset.from_config(read_once, path, cache, encoder, seed=0)
        rows = [k for k, row in enumerate(data.rows) if row.number not in shared]
        if not rows:
            raise InputError(f"every case of {path} is evaluated")
        prepare_cases(cache, [data.rows[k] for k in rows])
    except InputError as error:
        note = f"no baselines, as no report of the training table can be copied: {error}"
        print(f"note: {note}", flush=True)
        return TrainingCases(None, [], note)
    left_out = f", {len(shared)} evaluated ones left out" if shared else ""
    return TrainingCases(data, rows, f"{counted(len(rows), 'training case')} of {path}{left_out}")


def warn_of_training_cases(config: Config, path: Path, rows: Sequence[CaptionRow]) -> set[int]:
    """Print how many of the rows are in the training table: by patient, by path or by the content of the image.

    Returns the numbers of its rows that show one of them. Raises InputError: it cannot be read.
    """
    train = scan_caption_table(path, config.table_root, config.path_map).rows
    memory = Path(config.cache_dir) / "files"  # where the digests of training are kept
    digests = {row.image_path: file_digest(row.image_path, memory).hex() for row in (*train, *rows)}
    if problems := rows_in_training(train, rows, digests):
        count = f"{len({problem.row for problem in problems})} of {counted(len(rows), 'case')}"
        first = f"row {problems[0].row}: {problems[0].problem}"
        print(f"warning: {count} in {path} too, so scores are too good ({first})", flush=True)
    return {problem.row for problem in rows_in_training(rows, train, digests)}


def copied_reports(
    training: Sequence[str],
    mentions: Mentions,
    predicted: Mentions,
    embeddings: tuple[np.ndarray, np.ndarray],
    note: str,
) -> CopiedReports:
    """The reports of all baselines.

    Args:
        training: reports of the training cases, at least one.
        mentions: their findings.
        predicted: findings that the model states in each evaluated case.
        embeddings: mean visual tokens of the evaluated and of the training cases, [cases, D] each.
        note: where the training cases come from.
    """
    rows = {
        "nearest": nearest_rows(*embeddings),
        "lookup": similar_rows(predicted, mentions),
        "frequent": [frequent_row(training, mentions)] * len(predicted),
    }
    return CopiedReports({name: [training[row] for row in chosen] for name, chosen in rows.items()}, note)


def predicted_findings(
    mentions: Sequence[FindingRecord], believed: Sequence[Mapping[str, Any]] | None = None
) -> list[FindingRecord]:
    """What the model itself finds in a case: what its findings prompt says, where it has one (``believed``: stored
    records), else what its generated report describes as present."""
    return described(mentions) if believed is None else [FindingRecord.from_dict(one) for one in believed]


def nearest_rows(evaluated: np.ndarray, training: np.ndarray) -> list[int]:
    """The training row [training, D] nearest to each case [cases, D]; the first of equal ones."""
    mean = training.mean(0)
    units = []
    for vectors in (evaluated, training):
        centred = (vectors - mean).astype(np.float64)
        length = np.linalg.norm(centred, axis=1, keepdims=True)
        units.append(np.divide(centred, length, out=np.zeros_like(centred), where=length > 0))
    return (units[0] @ units[1].T).argmax(1).tolist()


def similar_rows(predicted: Mentions, training: Mentions) -> list[int]:
    """The training report with the most similar findings for each case; the first of equal ones.

    Two findings agree in their name (3 points), side, level (1 each) and size (smaller / larger), of 6. Each finding of
    either report counts with its best partner in the other; the similarity is the mean over the findings of both, and 1
    where both have none.
    """
    reports = [described(mentions) for mentions in training]
    owner = np.repeat(np.arange(len(reports)), [len(report) for report in reports])
    known = [finding for report in reports for finding in report]
    sizes = np.bincount(owner, minlength=len(reports))
    chosen = []
    for stated in predicted:
        points = agreement_points(stated, known)
        best = np.zeros((len(reports), len(stated)))
        np.maximum.at(best, owner, points.T)
        of_known = points.max(0) if len(stated) else np.zeros(len(known))
        both = best.sum(1) + np.bincount(owner, of_known, len(reports))
        number = sizes + len(stated)
        similarity = np.divide(both, number, out=np.ones(len(reports)), where=number > 0)
        chosen.append(int(similarity.argmax()))
    return chosen


def agreement_points(some: Sequence[FindingRecord], others: Sequence[FindingRecord]) -> np.ndarray:
    """How far findings agree, 0 to 1: [some, others]; two without a side, level or size agree in it."""
    total = np.zeros((len(some), len(others)))
    for points, name in zip(_POINTS, ("finding", "side", "level"), strict=False):
        one, other = ([str(getattr(finding, name)) for finding in findings] for findings in (some, others))
        total += points * (np.array(one)[:, None] == np.array(other)[None]) if total.size else 0
    one, other = (np.array([finding.size_mm or 0 for finding in findings], float) for findings in (some, others))
    low, high = np.minimum.outer(one, other), np.maximum.outer(one, other)
    total += _POINTS[3] * np.divide(low, high, out=np.ones_like(low), where=high > 0)
    return total / sum(_POINTS)


def frequent_row(training: Sequence[str], mentions: Mentions) -> int:
    """The first row of the most frequent report, but for white space; where all differ, of the most frequent findings,
    sizes apart."""
    texts = ["".join(text.split()) for text in training]
    if len(set(texts)) < len(texts):
        return texts.index(Counter(texts).most_common(1)[0][0])
    found = [sorted((m.finding, str(m.side), str(m.level)) for m in described(report)) for report in mentions]
    common = Counter(map(tuple, found)).most_common(1)[0][0]
    return next(row for row, one in enumerate(found) if tuple(one) == common)
