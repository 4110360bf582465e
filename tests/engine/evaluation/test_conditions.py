"""Conditions from images to the verdict, of a model that ignores the image and one that does not; the store on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config.errors import InputError
from data.medical_vlm_dataset import Sample
from data.phantom.finding import Finding
from data.phantom.report import write_report
from data.tables.caption_table import CaptionRow
from engine.evaluation.baselines import CopiedReports
from engine.evaluation.card_pages import card_blocks, opening_blocks
from engine.evaluation.conditions import AUDITED, GenerationStore, ReportPasses, shuffled_order
from engine.evaluation.confidence import Labeller, Outcomes, confidence_scores
from engine.evaluation.report_card import TableResults, report_card
from engine.evaluation.report_writer import Report

ZH = Labeller("zh")
KINDS = ("nodule", "cavity", "consolidation", "fibrosis", "calcification")


class Table:
    """Cases whose image is one number, their row's; reports of phantoms, every fifth one normal."""

    cache = SimpleNamespace(entry=lambda image, mask: image)

    def __init__(self, n: int) -> None:
        rng = np.random.default_rng(5)
        self.rows, self.questions = [], ["问题甲", "问题乙"] * n
        for row in range(n):
            findings = [Finding(KINDS[row % 5], ("right", "left")[row % 2], ("upper", "middle", "lower")[row % 3], 20)]
            text = write_report([] if row % 5 == 4 else findings, rng)
            self.rows.append(CaptionRow(row + 2, Path(f"{row}.nii.gz"), "", text, None))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Sample:
        return Sample(torch.full((1, 1, 2, 2), float(row + 1)), torch.tensor([0.5]), torch.zeros(1, 4), "", "", row)


class Model:
    """Stands for a :class:`ReportWriter`. ``looks``: it writes the report of the image that it is shown."""

    device = torch.device("cpu")

    def __init__(self, table: Table, looks: bool) -> None:
        self.reports, self.looks, self.written = [row.answer for row in table.rows], looks, 0
        self.shown: list[tuple[Tensor, Tensor | None]] = []
        self.model = SimpleNamespace(vision=SimpleNamespace(features=lambda images: images[:, None], head=None))
        self.tokenizer = None

    def visual(self, batch: Mapping[str, Any]) -> tuple[Tensor, None]:
        return batch["images"][:, 0, 0, 0, 0], None

    def embedding(self, batch: Mapping[str, Any]) -> Tensor:
        self.written += len(batch["row"])
        return torch.stack([self.visual(batch)[0], torch.full((len(batch["row"]),), 1 / 3)], 1)

    def visual_of_features(
        self, features: Tensor, position: Tensor, batch: Mapping[str, Any], roi: Tensor | None = None
    ) -> tuple[Tensor, None]:
        self.shown.append((position, roi))
        return torch.zeros(len(batch["question_ids"])), None

    def _texts(self, visual: Tensor, batch: Mapping[str, Any]) -> list[str]:
        # Without a look it writes one of two reports, by its question: fluent, and of nobody.
        asked = batch["question_ids"][:, 0].tolist()
        shown = [int(value) - 1 if self.looks else -1 for value in visual]
        return [self.reports[k if k >= 0 else q] for k, q in zip(shown, asked, strict=True)]

    def write(self, visual: Tensor, batch: Mapping[str, Any], decoding: object = None) -> list[Report]:
        self.written += len(visual)
        return [Report(text, [1], [-0.1]) for text in self._texts(visual, batch)]

    def write_prompted(self, visual: Tensor, batch: Mapping[str, Any], *_: object) -> list[Report]:
        return self.write(visual, batch)

    def losses(self, visual: Tensor, batch: Mapping[str, Any]) -> list[tuple[float, int]]:
        own = [self.reports[row] for row in batch["row"]]
        right = [text == truth for text, truth in zip(self._texts(visual, batch), own, strict=True)]
        return [(3.0 if self.looks and hit else 10.0, 10) for hit in right]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    questions = torch.tensor([[len(sample.question) % 2 + ("乙" in sample.question)] for sample in samples])
    return {
        "images": torch.stack([sample.images for sample in samples]),
        "slice_position": torch.stack([sample.slice_position for sample in samples]),
        "roi": torch.stack([sample.roi for sample in samples]),
        "question_ids": questions,
        "question_mask": torch.ones_like(questions),
        "row": torch.tensor([sample.row for sample in samples]),
    }


def passes_of(folder: Path, data: Table, model: Model, process: int = 0, processes: int = 1) -> ReportPasses:
    store = GenerationStore(folder, {"looks": model.looks}, process)
    return ReportPasses(model, collate, store, "t", data, 7, 1, process, processes)


def audit(folder: Path, n: int, looks: bool, **copied: list[str]) -> tuple[dict[str, Any], Model]:
    data = Table(n)
    model, none = Model(data, looks), [[] for _ in range(n)]
    passes = passes_of(folder, data, model)
    for condition in AUDITED:
        passes.run(condition)
    records, truth = {name: passes.records(name) for name in AUDITED}, [row.answer for row in data.rows]
    confidence, lesions = confidence_scores(Outcomes.of(none, data.rows, ZH), None, ""), ["heights", "squares"]
    results = TableResults(ZH, truth, records, [None] * n, none, confidence, [None] * n, lesion_inputs=lesions)
    if copied:
        results.copied = CopiedReports(copied, "planted")
    return report_card(results), model


def test_a_model_that_looks_is_said_to_depend_on_the_image(tmp_path: Path) -> None:
    card, model = audit(tmp_path, 60, looks=True)
    found = card["audit"]
    assert found["verdict"] == "the reports depend on the image" and found["verdict_code"] == "depends"
    assert found["own"]["macro_f1"] == 1 and found["shuffled"]["macro_f1"] < 0.5 and found["blank"]["macro_f1"] < 0.4
    assert found["shuffled"]["loss_gap"]["value"] == pytest.approx(0.7)
    assert found["normal_false_finding_rate"] == 0 and found["normal_cases"] == 12
    assert all(reason.startswith("yes") for reason in found["reasons"][:4])
    assert card["location_acc"] == 1 and card["size_within_3mm"] == 1 and card["pointing_game"] is None
    assert model.written == 60 + 60 + 2 + 2 + 60, "own and shuffled; blank and prior once a question; squares"


def test_a_model_that_ignores_the_image_is_said_to(tmp_path: Path) -> None:
    card, _ = audit(tmp_path, 60, looks=False)
    found = card["audit"]
    assert found["verdict"] == "the reports do not depend on the image" and found["verdict_code"] == "independent"
    assert found["own"]["macro_f1"] == found["shuffled"]["macro_f1"] == found["blank"]["macro_f1"]
    assert found["prior"]["same_reports"] == 1 and found["shuffled"]["loss_gap"]["value"] == 0
    assert found["duplicate_rate"] == 1 and found["normal_false_finding_rate"] == 1
    assert all(reason.startswith("no") for reason in found["reasons"][:4])


def test_reports_are_compared_with_copied_ones(tmp_path: Path) -> None:
    """Of a model that looks, and writes a false report of every third image; the nearest case has the right one."""
    right = [row.answer for row in Table(60).rows]
    wrong = [right[4] if row % 3 == 0 else text for row, text in enumerate(right)]
    card, _ = audit(tmp_path / "worse", 60, looks=True, nearest=wrong, frequent=[right[4]] * 60)
    found, nearest = card["audit"], card["baselines"]["nearest"]
    assert found["verdict_code"] == "depends" and card["baselines_note"] == "planted"
    assert nearest["whole_reports"]["exact_acc"]["value"] == pytest.approx(1 - 16 / 60)
    assert nearest["difference"]["whole_reports"]["exact_acc"]["value"] == pytest.approx(16 / 60)
    for name in ("macro_f1", "micro_f1", "crg", "location_acc", "size_within_3mm"):
        assert nearest["difference"][name]["value"] > 0 and nearest["difference"][name]["interval"][0] > 0
    assert card["baselines"]["frequent"]["location_acc"]["value"] == 0
    assert card["findings"]["crg"]["value"] == 1 and card["baselines"]["frequent"]["crg"]["value"] == 1 / 3
    assert [floor["crg"]["value"] for floor in card["floors"].values()][:2] == [1 / 3, 1 / 3]

    card, _ = audit(tmp_path / "blind", 60, looks=False, nearest=right)
    assert card["audit"]["verdict_code"] == "independent", "which says more than that it is below a baseline"
    assert any("no: exact_acc is above copying" in reason for reason in card["audit"]["reasons"])
    named = card | {"csv": "", "checkpoint": ""}
    markdown = "\n".join(block for block, _ in [*opening_blocks(named, []), *card_blocks(named, [], [])])
    assert "Beside its baselines and floors" in markdown and "| score | the model | nearest | floors |" in markdown


def test_squares_are_the_mean_image_with_what_is_known_of_the_case(tmp_path: Path) -> None:
    card, model = audit(tmp_path, 14, looks=True)
    prior = [position for position, roi in model.shown if roi is None]
    squares = [(position, roi) for position, roi in model.shown if roi is not None]
    assert [position.shape for position in prior] == [(1,)] * 2
    assert [(position.shape, roi.shape) for position, roi in squares] == [((7, 1), (7, 1, 4))] * 2
    assert card["audit"]["squares"]["macro_f1"] < card["audit"]["own"]["macro_f1"]
    alone = "heights and squares alone, with the mean image, give macro-F1"
    assert card["audit"]["reasons"][-1].startswith(alone)
    assert card["audit"]["verdict_code"] == "unclear", "with 14 cases"


@pytest.mark.parametrize("patients", ["abcdefgh", "aabbccdd", "aaabbcde", "aaaabbbb", "ab"])
def test_nobody_gets_an_image_of_his_own(patients: str) -> None:
    for seed in range(20):
        order = shuffled_order(list(patients), seed)
        assert sorted(order) == list(range(len(patients)))
        assert all(patients[case] != patients[image] for case, image in enumerate(order))


@pytest.mark.parametrize("patients", ["a", "aaab"])
def test_one_patient_alone_cannot_be_shuffled(patients: str) -> None:
    with pytest.raises(InputError, match="cannot be shuffled between patients"):
        shuffled_order(list(patients), 0)


def test_a_stopped_evaluation_goes_on(tmp_path: Path) -> None:
    data = Table(30)
    passes_of(tmp_path, data, Model(data, looks=True)).run("own")
    [path] = tmp_path.glob("generations-*.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:20]))  # the head and 19 records
    model = Model(data, looks=True)
    again = passes_of(tmp_path, data, model)
    with pytest.raises(RuntimeError, match="11 reports of t/own are missing"):
        again.records("own")
    again.run("own")
    assert model.written == 30 - 19
    assert [r["text"] for r in again.records("own")] == [row.answer for row in data.rows]


def test_embeddings_are_made_once_and_exactly_kept(tmp_path: Path) -> None:
    data, rows = Table(12), [7, 2, 9]
    first, again = Model(data, looks=True), Model(data, looks=True)
    passes_of(tmp_path, data, first).embed(rows)
    passes = passes_of(tmp_path, data, again)
    passes.embed(rows)
    assert (first.written, again.written) == (3, 0)
    assert (passes.embeddings(rows) == np.array([[8, 1 / 3], [3, 1 / 3], [10, 1 / 3]], np.float32)).all()


def test_processes_take_their_own_rows_and_changed_cases_are_missing(tmp_path: Path) -> None:
    data = Table(12)
    models = [Model(data, looks=True) for _ in range(2)]
    for process, model in enumerate(models):
        passes_of(tmp_path, data, model, process, 2).run("shuffled")
    assert [model.written for model in models] == [6, 6]
    passes = passes_of(tmp_path, data, models[0])
    assert len(passes.records("shuffled")) == 12
    assert replace(passes, table="other").stored("shuffled/12") == [None] * 12
    data.rows[3] = replace(data.rows[3], image_path=Path("changed.nii.gz"))
    assert replace(passes).stored("shuffled/12").count(None) == 1


def record(row: int, text: str) -> dict:
    return {"table": "t", "condition": "own", "row": row, "case": f"digest{row}", "text": text}


def text_of(store: GenerationStore, row: int) -> str | None:
    found = store.get("t", "own", row, f"digest{row}")
    return found and found["text"]


def test_a_line_that_a_crash_cut_short_is_missing_and_spoils_no_other(tmp_path: Path) -> None:
    GenerationStore(tmp_path, {"a": 1}).add([record(0, "右肺结节。"), record(1, "空洞。")])
    [path] = tmp_path.glob("generations-*.jsonl")
    path.write_bytes(path.read_bytes()[:-8])  # in the middle of a character
    store = GenerationStore(tmp_path, {"a": 1})
    assert text_of(store, 0) == "右肺结节。" and text_of(store, 1) is None
    store.add([record(1, "实变。")])
    assert text_of(GenerationStore(tmp_path, {"a": 1}), 1) == "实变。"


def test_processes_read_each_other_and_no_other_identity(tmp_path: Path) -> None:
    first, second = (GenerationStore(tmp_path, {"a": 1}, process) for process in (0, 1))
    second.add([record(0, "结节。")])
    assert text_of(first, 0) is None
    first.reload()
    assert text_of(first, 0) == "结节。" and text_of(GenerationStore(tmp_path, {"a": 2}), 0) is None
