"""The built-in data set: phantoms on disk with reports, in the layout that the training scripts read.

::

    out_dir/images/train_0000.nii.gz    int16 HU
            masks/train_0000.nii.gz     uint8, index of the finding type
            cases/train_0000.json       what is drawn, and the CRC-32 of both files
            train.csv val.csv test.csv  image_path,question,answer,mask_path (relative to the CSV)
            test_no_masks.csv           the test table without its masks: scans as they come
            prompts.json                {"caption_prompt": [...]}
            cases.json                  all cases: id, split, findings, lung z-range, seed

A case depends on (seed, split, number) alone, not on the number of cases. The language changes the texts only.
"""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from config.errors import InputError
from config.files import write_text
from config.processes import pool_size
from data.phantom.case import Phantom, make_case, write_case
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.report import finding_keys, wording, write_report

# Raised when the same seed no longer gives the same files, so that a rerun does not keep old ones.
GENERATOR_VERSION = 6
SPLITS = ("train", "val", "test")
_WITHOUT_MASKS = "test_no_masks"
_COLUMNS = ("image_path", "question", "answer", "mask_path")
_EMPTY_QUESTION_FRACTION = 0.2
_PLACEMENT_ATTEMPTS = 8

# One deck holds every type equally often; an effusion has one zone only and is in it three times.
_DECK = [
    (kind, side, zone if kind != "effusion" else "lower") for kind in LESION_TYPES for side in SIDES for zone in ZONES
]


@dataclass(frozen=True)
class DatasetPaths:
    """Files that :func:`make_dataset` writes."""

    root: Path
    train_csv: Path
    val_csv: Path
    test_csv: Path
    prompt_json: Path
    cases_json: Path


def make_dataset(
    out_dir: Path | str,
    n_train: int,
    n_val: int,
    n_test: int,
    seed: int,
    language: str = "zh",
    max_findings: int = 1,
    normal_share: float = 0.1,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> DatasetPaths:
    """Make the data set, or complete an interrupted one: cases whose files are whole are kept.

    Args:
        out_dir: folder of the data set; made if absent.
        n_train, n_val, n_test: cases per split.
        seed, language: equal seeds give equal files; reports and questions are in "zh" or "en".
        max_findings: an abnormal case has 1 to this many findings, uniformly.
        normal_share: fraction of healthy chests, spread evenly over each split.
        workers: processes; with 1 everything runs in this one.
        progress: called as progress(done, total) after every case.

    Raises:
        InputError: a number out of range or an unknown language.
    """
    wording(language)  # raises for an unknown one
    least = {"n_train": (n_train, 0), "n_val": (n_val, 0), "n_test": (n_test, 0), "seed": (seed, 0)}
    for name, (value, low) in (least | {"max_findings": (max_findings, 1), "workers": (workers, 1)}).items():
        if value < low:
            raise InputError(f"{name} is {value}; it must be at least {low}")
    if not 0 <= normal_share <= 1:
        raise InputError(f"normal_share is {normal_share}; it must lie between 0 and 1")
    root = Path(out_dir)
    for folder in ("images", "masks", "cases"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = []
    for number, (split, count) in enumerate(zip(SPLITS, (n_train, n_val, n_test), strict=True)):
        for index in range(count):
            wanted = _plan([seed, number, 7], index, max_findings, normal_share)
            job = {"id": f"{split}_{index:04d}", "split": split, "generator": GENERATOR_VERSION}
            jobs.append({**job, "seed": [seed, number, index], "wanted": wanted})
    cases = []
    # "spawn" on every system: it is what Windows has, and forking a process with threads is unsafe.
    context = multiprocessing.get_context("spawn")
    build, alone = partial(_build, root), workers == 1 or len(jobs) < 2
    pool = nullcontext() if alone else ProcessPoolExecutor(pool_size(workers, len(jobs)), mp_context=context)
    with pool:
        for case in map(build, jobs) if alone else pool.map(build, jobs, chunksize=4):
            cases.append(case)
            if progress is not None:
                progress(len(cases), len(jobs))
    return _write_tables(root, cases, language)


def _plan(stream: list[int], index: int, max_findings: int, normal_share: float) -> list[list[str]]:
    """(type, side, zone) of each finding of a case. Every split is balanced, however long it is."""
    if int((index + 1) * normal_share + 0.5) > int(index * normal_share + 0.5):
        return []
    deck = np.random.default_rng([*stream, index // len(_DECK)]).permutation(len(_DECK))
    rng = np.random.default_rng([*stream, index, 1])
    wanted = [_DECK[deck[index % len(_DECK)]]]
    while len(wanted) < int(np.random.default_rng([*stream, index, 2]).integers(1, max_findings + 1)):
        extra = _DECK[int(rng.integers(len(_DECK)))]
        if extra[0] != "effusion" or extra not in wanted:
            wanted.append(extra)
    # An effusion is drawn first; the others are placed in the aerated lung that remains.
    return [list(finding) for finding in sorted(wanted, key=lambda finding: finding[0] != "effusion")]


def _build(root: Path, job: dict) -> dict:
    """The record of a case; the case is made unless an earlier run finished the same one and its files are whole."""
    image, mask = (root / folder / f"{job['id']}.nii.gz" for folder in ("images", "masks"))
    record_path = root / "cases" / f"{job['id']}.json"
    if record_path.is_file() and image.is_file() and mask.is_file():
        try:
            record = json.loads(record_path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:  # damaged on disk: the case is made again
            record = {}
        crc = [zlib.crc32(path.read_bytes()) for path in (image, mask)]
        if record.items() >= {**job, "crc32": crc}.items():
            return record
    phantom = _make(job)
    record = {
        **job,
        "findings": [asdict(f) for f in phantom.findings],
        "lung_z_mm": {side: list(span) for side, span in phantom.lung_z.items()},
        "spacing_zyx_mm": list(phantom.spacing),
        "crc32": list(write_case(phantom, image, mask)),
    }
    write_text(record_path, json.dumps(record, ensure_ascii=False, indent=1))
    return record


def _make(job: dict) -> Phantom:
    """A phantom; where a lesion fits nowhere in one patient, another patient is drawn."""
    for attempt in range(_PLACEMENT_ATTEMPTS):
        try:
            return make_case([*job["seed"], attempt], job["wanted"])
        except RuntimeError as error:
            problem = error
    raise problem


def _write_tables(root: Path, cases: list[dict], language: str) -> DatasetPaths:
    """The CSV files, the prompts and the list of all cases."""
    questions = wording(language).questions
    texts = {split: io.StringIO() for split in (*SPLITS, _WITHOUT_MASKS)}
    tables = {split: csv.writer(text, lineterminator="\n") for split, text in texts.items()}
    for name, table in tables.items():
        table.writerow(_COLUMNS[:-1] if name == _WITHOUT_MASKS else _COLUMNS)
    keyed = []
    for case in cases:
        rng = np.random.default_rng([*case["seed"], 3])
        findings = [Finding(**f) for f in case["findings"]]
        empty = rng.random() < _EMPTY_QUESTION_FRACTION
        question = questions[int(rng.integers(len(questions)))]
        answer, name = write_report(findings, rng, language), f"{case['id']}.nii.gz"
        row = (f"images/{name}", "" if empty else question, answer, f"masks/{name}")
        tables[case["split"]].writerow(row)
        if case["split"] == "test":
            tables[_WITHOUT_MASKS].writerow(row[:-1])
        keyed.append({**case, "keys": finding_keys(findings, language)})
    for split, text in texts.items():
        write_text(root / f"{split}.csv", text.getvalue())
    paths = DatasetPaths(root, *(root / f"{split}.csv" for split in SPLITS), root / "prompts.json", root / "cases.json")
    write_text(paths.prompt_json, json.dumps({"caption_prompt": list(questions)}, ensure_ascii=False, indent=1))
    write_text(paths.cases_json, json.dumps(keyed, ensure_ascii=False, indent=1))
    return paths
