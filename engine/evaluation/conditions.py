"""Every report that an evaluation needs: with the case's own image, and without it.

=========  ===========================================================================================
own        the case's image
shuffled   the image of another patient
blank      an image without structure: every voxel the mean of CT normalisation, slices at mean position
prior      no image: the visual tokens are those of the mean features and mean slice positions of all cases
squares    the mean features with the case's own slice positions and lesion boxes: what a mask gives away alone
sample1…   the case's image, sampled at temperature 1
=========  ===========================================================================================

The prior keeps the number of visual tokens. A prompt without them is one that the language model was never trained
on; the mean image is in distribution and holds nothing of the patient.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config.errors import InputError
from data.medical_vlm_dataset import CaptionCollator, MedicalVLMDataset, Sample
from engine.evaluation.generation_store import GenerationStore
from engine.evaluation.report_writer import ReportWriter
from models.language_model.decoding import Decoding

OWN, SHUFFLED, BLANK, PRIOR, SQUARES, SAMPLE = "own", "shuffled", "blank", "prior", "squares", "sample"
AUDITED = (OWN, SHUFFLED, BLANK, PRIOR, SQUARES)
_BASELINE_CASES = 256  # that the mean image is made of
Record = dict[str, Any]
Maker = Callable[[list[int]], list[Record]]  # records of these rows


@dataclass
class EvaluatedTable:
    """A table with its samples. ``name``: a digest of its file; ``cases``: digests of image and mask by row."""

    name: str
    data: MedicalVLMDataset
    cases: list[str]

    @classmethod
    def of(cls, name: str, data: MedicalVLMDataset) -> EvaluatedTable:
        return cls(name, data, [data.cache.entry(row.image_path, row.mask_path).name for row in data.rows])

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class MeanImage:
    """Mean over the images of a table. ``features``: (K, C, T, T); ``position``: (K,)."""

    features: Tensor
    position: Tensor


@dataclass
class ReportPasses:
    """Fills a store with the reports of a table, condition by condition; each process takes its own rows."""

    writer: ReportWriter
    collator: CaptionCollator
    store: GenerationStore
    batch_size: int
    seed: int
    process: int = 0
    processes: int = 1

    def run(self, table: EvaluatedTable, condition: str, mean: MeanImage | None = None) -> None:
        """Generate what is missing. ``mean`` is needed by ``blank``, ``prior`` and ``squares``."""
        order = list(range(len(table)))
        if condition == SHUFFLED:
            order = shuffled_order([row.patient or str(row.image_path) for row in table.data.rows], self.seed)
        known: dict[tuple, Record] = {}

        def make(rows: list[int]) -> list[Record]:
            samples = [self._sample(table, row, order[row], condition, mean) for row in rows]
            batch = self.batch(samples)
            return self._records(self._visual(batch, condition, mean), batch, samples, condition, known)

        self._fill(table, key_of(table, condition), range(len(table)), self.batch_size, make)

    def run_rows(self, table: EvaluatedTable, key: str, rows: Sequence[int], make: Callable[[int], Record]) -> None:
        """Make what is missing of these rows' records, one at a time."""
        self._fill(table, key, rows, 1, lambda row: [make(*row)])

    def _fill(self, table: EvaluatedTable, key: str, rows: Sequence[int], size: int, make: Maker) -> None:
        """Make and store the records of the missing rows, ``size`` at a time."""
        mine = [row for row in self._missing(table, key, rows) if row % self.processes == self.process]
        with tqdm(total=len(mine), desc=key, unit="case", dynamic_ncols=True, disable=None if mine else True) as bar:
            for part in chunks(mine, size):
                self.store.add(
                    {"table": table.name, "condition": key, "row": row, "case": table.cases[row]} | record
                    for row, record in zip(part, make(part), strict=True)
                )
                bar.update(len(part))

    def complete(self, table: EvaluatedTable, condition: str) -> bool:
        """Whether every row has its report under this condition."""
        return not self._missing(table, key_of(table, condition), range(len(table)))

    def _missing(self, table: EvaluatedTable, key: str, rows: Sequence[int]) -> list[int]:
        return [row for row in rows if self.store.get(table.name, key, row, table.cases[row]) is None]

    def records(self, table: EvaluatedTable, condition: str) -> list[Record]:
        """Of every row, in order. Call ``store.reload()`` first where other processes have written."""
        key = key_of(table, condition)
        found = [self.store.get(table.name, key, row, case) for row, case in enumerate(table.cases)]
        if None in found:
            raise RuntimeError(f"{found.count(None)} reports of {table.name}/{condition} are missing")
        return found

    def batch(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """Collated, on the model's device."""
        device = self.writer.device
        return {
            key: [image.to(device) for image in value] if isinstance(value, list) else value.to(device)
            for key, value in self.collator(samples).items()
        }

    def mean_image(self, table: EvaluatedTable) -> MeanImage:
        """Mean features and slice positions of up to 256 cases, spread evenly over the table."""
        step = max(1, -(-len(table) // _BASELINE_CASES))
        chosen = range(0, len(table), step)
        features, position = 0, 0
        for rows in chunks(chosen, self.batch_size):
            batch = self.batch([table.data[row] for row in rows])
            with torch.no_grad():
                features = features + self.writer.model.vision.features(batch["images"]).float().sum(0)
            position = position + batch["slice_position"].sum(0)
        return MeanImage(features / len(chosen), position / len(chosen))

    def _sample(self, table: EvaluatedTable, row: int, image_of: int, condition: str, mean: MeanImage | None) -> Sample:
        sample = table.data[image_of]
        sample = replace(sample, question=table.data.questions[row], answer=table.data.rows[row].answer, row=row)
        if condition == BLANK:
            nothing = {"images": torch.zeros_like(sample.images), "roi": torch.zeros_like(sample.roi)}
            return replace(sample, **nothing, slice_position=mean.position.cpu().clone())
        return sample

    def _visual(self, batch: Mapping[str, Any], condition: str, mean: MeanImage | None) -> Tensor:
        if condition == PRIOR:
            return self.writer.visual_of_features(mean.features, mean.position, batch)
        if condition == SQUARES:
            return self.writer.visual_of_features(mean.features, batch["slice_position"], batch, batch["roi"])
        return self.writer.visual(batch)

    def _records(
        self, visual: Tensor, batch: Mapping[str, Any], samples: Sequence[Sample], condition: str, known: dict
    ) -> list[Record]:
        if condition.startswith(SAMPLE):
            torch.manual_seed(self.seed * 1_000_003 + samples[0].row * 101 + int(condition.removeprefix(SAMPLE)))
            return [{"text": one.text} for one in self.writer.write(visual, batch, Decoding(temperature=1.0))]
        losses = [{"nats": nats, "tokens": tokens} for nats, tokens in self.writer.losses(visual, batch)]
        if condition in (BLANK, PRIOR):
            texts = self._shared_texts(visual, batch, samples, known)
        else:
            written = self.writer.write(visual, batch)
            texts = [asdict(one) if condition == OWN else {"text": one.text} for one in written]
        return [text | loss for text, loss in zip(texts, losses, strict=True)]

    def _shared_texts(
        self, visual: Tensor, batch: Mapping[str, Any], samples: Sequence[Sample], known: dict
    ) -> list[Record]:
        """Reports that depend on the question alone: each question is answered once."""
        keys = [(sample.question, tuple(sample.images.shape)) for sample in samples]
        new = {key: b for b, key in enumerate(keys) if key not in known}
        if new:
            rows = torch.tensor(list(new.values()), device=visual.device)
            part = {name: batch[name][rows] for name in ("question_ids", "question_mask")}
            for key, one in zip(new, self.writer.write(visual[rows], part), strict=True):
                known[key] = {"text": one.text}
        return [known[key] for key in keys]


def key_of(table: EvaluatedTable, condition: str) -> str:
    """Key of a condition in the store: the shuffled order and the mean image depend on the number of rows."""
    return f"{condition}/{len(table)}" if condition in (SHUFFLED, BLANK, PRIOR, SQUARES) else condition


def shuffled_order(patients: Sequence[str], seed: int) -> list[int]:
    """For each case the case whose image it gets: a permutation that gives no case an image of its own patient.

    Raises:
        InputError: impossible, because one patient has more than half of the cases.
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


def chunks(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """Consecutive parts of at most ``size`` rows."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])
