"""Every report that an evaluation needs, with the case's own image and without it, and the store that keeps them.

=========  ===========================================================================================
own        the case's image
shuffled   the image of another patient
blank      an image without structure: every voxel the mean of CT normalisation, slices at mean position
prior      no image: the visual tokens are those of the mean features and mean slice positions of all cases
squares    the mean features with the case's own slice positions, lesion boxes and measured lesions: what a mask or a
           segmentation gives away alone
corrected  the case's image, with one point of its findings prompt changed (engine/evaluation/image_dependence.py)
sample1…   the case's image, sampled at temperature 1
=========  ===========================================================================================

The prior keeps the number of visual tokens. A prompt without them is one that the language model was never trained
on; the mean image is in distribution and holds nothing of the patient.

    OUT/generations-<identity>-<process>.jsonl     a line per report; the first line: what the identity is a digest of

Lines are written as they come, so that a stopped evaluation resumes. Files of another identity are not read, so a
folder can hold the generations of several checkpoints. Every process writes its own file and reads all of them, so the
number of processes may change between two starts.
"""

from __future__ import annotations

import base64
import functools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from tqdm import tqdm

from config.errors import InputError
from config.schema import FindingsPrompt
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset, Sample
from data.tables.caption_table import CaptionRow
from engine.evaluation.image_dependence import correct
from engine.evaluation.report_writer import PROMPT_FIELDS, ReportWriter
from engine.findings_prompt import batch_believed, with_key_points
from models.language_model.decoding import Decoding

OWN, SHUFFLED, BLANK, PRIOR, SQUARES, SAMPLE = "own", "shuffled", "blank", "prior", "squares", "sample"
CORRECTED = "corrected"
AUDITED = (OWN, SHUFFLED, BLANK, PRIOR, SQUARES)
EMBEDDING = "embedding"  # key of the records that hold a mean visual token
_BASELINE_CASES = 256  # that the mean image is made of
Record = dict[str, Any]


class GenerationStore:
    """Records by table, condition and row; the last one of a key counts."""

    def __init__(self, folder: Path, described: Mapping[str, Any], process: int = 0) -> None:
        """
        Args:
            folder: made if absent.
            described: JSON values that decide what is generated; the identity is their digest.
            process: number of this process.
        """
        text = json.dumps(described, sort_keys=True, ensure_ascii=False)
        self.identity = blake2b(text.encode("utf-8"), digest_size=6).hexdigest()
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"generations-{self.identity}-{process}.jsonl"
        self._described = dict(described)
        self.reload()

    def reload(self) -> None:
        """Read what all processes have written so far."""
        self._records: dict[tuple[str, str, int], Record] = {}
        for path in sorted(self.folder.glob(f"generations-{self.identity}-*.jsonl")):
            for record in _whole_lines(path):
                if "condition" in record:
                    self._records[record["table"], record["condition"], record["row"]] = record

    def get(self, table: str, condition: str, row: int, case: str) -> Record | None:
        """The record of a row; None where it has none, or its image or mask has changed since (``case``: digest)."""
        record = self._records.get((table, condition, row))
        return record if record is not None and record["case"] == case else None

    def add(self, records: Iterable[Record]) -> None:
        """Append records, each with table, condition, row and case, to the process's file."""
        new = not self._path.is_file() or not self._path.stat().st_size
        # A line that a crash cut short must not swallow the next one.
        torn = not new and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a", encoding="utf-8", newline="\n") as stream:
            if new:
                stream.write(json.dumps(self._described, ensure_ascii=False) + "\n")
            if torn:
                stream.write("\n")
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._records[record["table"], record["condition"], record["row"]] = record


@dataclass
class ReportPasses:
    """The reports of one table, condition by condition; each process takes its own rows.

    ``table``: a digest of its file; ``mode``, ``language``: of the findings prompt, which comes from the image that a
    report is written from.
    """

    writer: ReportWriter
    collator: CaptionCollator
    store: GenerationStore
    table: str
    data: MedicalVLMDataset
    batch_size: int
    seed: int
    process: int = 0
    processes: int = 1
    mode: FindingsPrompt = "off"
    language: str | None = None
    _answers: dict[tuple, str] = field(default_factory=dict)  # texts that depend on condition and question alone

    @functools.cached_property
    def cases(self) -> list[str]:
        """Digests of image and mask by row."""
        return [self.data.cache.entry(row.image_path, row.mask_path).name for row in self.data.rows]

    def __len__(self) -> int:
        return len(self.data)

    def run(self, condition: str, most: int | None = None) -> None:
        """Generate what is missing, of the first ``most`` rows."""
        order = list(range(len(self)))
        if condition == SHUFFLED:
            order = shuffled_order(patients_of(self.data.rows), self.seed)

        def make(rows: list[int]) -> list[Record]:
            return self._generate([self._sample(row, order[row], condition) for row in rows], condition)

        self.fill(self.key(condition), range(len(self))[:most], self.batch_size, make)

    def fill(self, key: str, rows: Iterable[int], size: int, make: Callable[[list[int]], list[Record]]) -> None:
        """Make and store the missing records of these rows, ``size`` rows at a time."""
        known = self.stored(key)
        mine = [row for row in rows if known[row] is None and row % self.processes == self.process]
        with tqdm(total=len(mine), desc=key, unit="case", dynamic_ncols=True, disable=None if mine else True) as bar:
            for part in (mine[start : start + size] for start in range(0, len(mine), size)):
                self.store.add(
                    {"table": self.table, "condition": key, "row": row, "case": self.cases[row]} | record
                    for row, record in zip(part, make(part), strict=True)
                )
                bar.update(len(part))

    def embed(self, rows: Iterable[int]) -> None:
        """Store the mean visual token of these rows' images where it is missing."""

        def make(part: list[int]) -> list[Record]:
            vectors = self.writer.embedding(self.batch([self.data[row] for row in part])).cpu().numpy()
            return [{"vector": base64.b64encode(vector.astype("<f4").tobytes()).decode()} for vector in vectors]

        self.fill(EMBEDDING, rows, self.batch_size, make)

    def embeddings(self, rows: Iterable[int]) -> np.ndarray:
        """What :meth:`embed` has stored of these rows, float32 [rows, D]."""
        records = self.stored(EMBEDDING)
        return np.stack([np.frombuffer(base64.b64decode(records[row]["vector"]), "<f4") for row in rows])

    def key(self, condition: str) -> str:
        """Key of a condition in the store: the shuffled order and the mean image depend on the number of rows."""
        return f"{condition}/{len(self)}" if condition in (SHUFFLED, BLANK, PRIOR, SQUARES) else condition

    def stored(self, key: str) -> list[Record | None]:
        """Records by row, None where there is none. After other processes have written, ``store.reload()`` first."""
        return [self.store.get(self.table, key, row, case) for row, case in enumerate(self.cases)]

    def records(self, condition: str) -> list[Record]:
        """As :meth:`stored`, of every row."""
        found = self.stored(self.key(condition))
        if None in found:
            raise RuntimeError(f"{found.count(None)} reports of {self.table}/{condition} are missing")
        return found

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collated, on the model's device."""
        return send_to_device(self.collator(samples), self.writer.device)

    @functools.cached_property
    def mean_image(self) -> tuple[Tensor, Tensor]:
        """Mean features (K, C, T, T) and slice positions (K,) of up to 256 cases, spread evenly over the table."""
        step = max(1, -(-len(self) // _BASELINE_CASES))
        chosen = range(0, len(self), step)
        features, position = 0, 0
        for start in range(0, len(chosen), self.batch_size):
            batch = self.batch([self.data[row] for row in chosen[start : start + self.batch_size]])
            with torch.no_grad():
                features = features + self.writer.model.vision.features(batch["images"]).float().sum(0)
            position = position + batch["slice_position"].sum(0)
        return features / len(chosen), position / len(chosen)

    def _sample(self, row: int, image_of: int, condition: str) -> Sample:
        sample = self.data[image_of]
        sample = replace(sample, question=self.data.questions[row], answer=self.data.rows[row].answer, row=row)
        if condition == BLANK:
            nothing = {"images": torch.zeros_like(sample.images), "roi": torch.zeros_like(sample.roi), "measured": []}
            return replace(sample, **nothing, slice_position=self.mean_image[1].cpu().clone())
        return replace(sample, measured=[]) if condition == PRIOR else sample

    def _generate(self, samples: Sequence[Sample], condition: str) -> list[Record]:
        batch = self.batch(samples)
        if condition == PRIOR:
            visual, found = self.writer.visual_of_features(*self.mean_image, batch)
        elif condition == SQUARES:
            given = batch["slice_position"], batch, batch["roi"]
            visual, found = self.writer.visual_of_features(self.mean_image[0], *given)
        else:
            visual, found = self.writer.visual(batch)
        if not torch.isfinite(visual).all():
            named = ", ".join(str(self.data.rows[sample.row].image_path) for sample in samples)
            raise InputError(f"visual tokens are not finite: check the images ({named}) and the nnU-Net")
        head = self.writer.model.vision.head
        said = batch_believed(head, found, [sample.measured for sample in samples], self.mode)
        changes = []
        if condition == CORRECTED:
            seeds = [np.random.default_rng([self.seed, sample.row]) for sample in samples]
            changes = [correct(one or [], head.names, rng) for one, rng in zip(said, seeds, strict=True)]
            said = [asked for asked, _, _ in changes]
        batch = with_key_points(batch, self.writer.tokenizer, said, self.language)
        if condition == CORRECTED:
            written = self.writer.write_prompted(visual, batch, said, self.language)
            return [
                {"text": one.text, "asked": [f.to_dict() for f in asked], "kind": kind, "point": point.to_dict()}
                for one, (asked, kind, point) in zip(written, changes, strict=True)
            ]
        if condition.startswith(SAMPLE):
            torch.manual_seed(self.seed * 1_000_003 + samples[0].row * 101 + int(condition.removeprefix(SAMPLE)))
            return [{"text": one.text} for one in self.writer.write(visual, batch, Decoding(temperature=1.0))]
        losses = [{"nats": nats, "tokens": tokens} for nats, tokens in self.writer.losses(visual, batch)]
        if condition in (BLANK, PRIOR):
            keys = [(condition, sample.question, tuple(sample.images.shape)) for sample in samples]
            texts = [{"text": text} for text in self._shared_texts(visual, batch, said, keys)]
        else:
            written = self.writer.write_prompted(visual, batch, said, self.language)
            texts = [asdict(one) if condition == OWN else {"text": one.text} for one in written]
            if condition == OWN:
                known = [one and [finding.to_dict() for finding in one] for one in said]
                texts = [text | {"believed": one} for text, one in zip(texts, known, strict=True)]
        return [text | loss for text, loss in zip(texts, losses, strict=True)]

    def _shared_texts(
        self, visual: Tensor, batch: Mapping[str, Any], said: Sequence, keys: Sequence[tuple]
    ) -> list[str]:
        """Reports that depend on their key alone: each is generated once."""
        new = {key: b for b, key in enumerate(keys) if key not in self._answers}
        if new:
            rows = list(new.values())
            part = {name: batch[name][rows] for name in PROMPT_FIELDS}
            written = self.writer.write_prompted(visual[rows], part, [said[b] for b in rows], self.language)
            self._answers |= {key: one.text for key, one in zip(new, written, strict=True)}
        return [self._answers[key] for key in keys]


def patients_of(rows: Iterable[CaptionRow]) -> list[str]:
    """Whose images these are, as far as the table says."""
    return [row.patient or str(row.image_path) for row in rows]


def shuffled_order(patients: Sequence[str], seed: int) -> list[int]:
    """For each case the case whose image it gets: a permutation that gives no case an image of its own patient.

    Raises InputError: impossible, because one patient has more than half of the cases.
    """
    most = max(map(patients.count, set(patients)), default=0)
    if 2 * most > len(patients):
        raise InputError(
            f"{most} of {len(patients)} cases are of one patient or image: images cannot be shuffled between patients; "
            "evaluate a table of more patients (at least 2 cases)"
        )
    # The cases of each patient form a block; a rotation by the largest block moves every case out of its own.
    drawn = list(range(len(patients)))
    random.Random(seed).shuffle(drawn)
    first: dict[str, int] = {}
    for position, case in enumerate(drawn):
        first.setdefault(patients[case], position)
    around = sorted(drawn, key=lambda i: first[patients[i]])
    order = [0] * len(patients)
    for position, case in enumerate(around):
        order[case] = around[(position + most) % len(around)]
    return order


def _whole_lines(path: Path) -> Iterator[Record]:
    """Records of the complete lines; one that a crash cut short is generated again."""
    for line in path.read_bytes().split(b"\n"):
        try:
            yield json.loads(line)
        except ValueError:  # also bytes that are no UTF-8
            continue
