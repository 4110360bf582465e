"""Copied reports of planted training cases; which training cases there are to copy."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from config.schema import load_config
from data.report_language.labeller import label_report
from data.tables.caption_table import read_caption_table
from engine.evaluation import baselines
from engine.evaluation.baselines import (
    copied_reports,
    frequent_row,
    nearest_rows,
    predicted_findings,
    similar_rows,
    training_cases,
)

NODULE, CAVITY, BOTH, NORMAL = (
    "所见：右肺上野见12mm结节。",
    "所见：左肺下野见30mm空洞。",
    "所见：右肺上野见12mm结节。左肺下野见30mm空洞。",
    "所见：双肺未见异常。",
)


def similar(predicted: str, training: list[str]) -> int:
    stated = predicted_findings(label_report(predicted))
    return similar_rows([stated], [label_report(text) for text in training])[0]


def test_nearest_is_by_angle_about_the_training_mean() -> None:
    # Far from the origin all directions are alike; about the mean the second case points the other way.
    training = np.array([[101.0, 100.0], [99.0, 100.0], [100.0, 101.0], [100.0, 99.0]], np.float32)
    assert nearest_rows(np.array([[105.0, 101.0], [99.9, 100.0], [101.0, 90.0]], np.float32), training) == [0, 1, 3]
    assert nearest_rows(training, training) == [0, 1, 2, 3]
    assert nearest_rows(np.ones((1, 2), np.float32), np.ones((3, 2), np.float32)) == [0], "all alike: the first row"


@pytest.mark.parametrize(
    ("predicted", "training", "row"),
    [
        (NODULE, [CAVITY, NODULE, BOTH, NORMAL], 1),
        (BOTH, [NODULE, CAVITY, NORMAL, BOTH], 3),
        (NORMAL, [BOTH, NODULE, NORMAL], 2),
        (NODULE, ["所见：右肺上野见12mm空洞。", "所见：左肺下野见40mm结节。"], 1),  # the name outweighs the rest
        (NODULE, ["所见：左肺上野见12mm结节。", "所见：右肺上野见15mm结节。"], 1),  # the side outweighs some mm
        (NODULE, ["所见：右肺上野见20mm结节。", "所见：右肺上野见14mm结节。"], 1),
        (NODULE, [CAVITY, NODULE, NODULE], 1),  # of equal ones the first
        ("所见：未见结节。左肺下野见30mm空洞。", [NODULE, CAVITY], 1),  # a denied finding is none
    ],
)
def test_lookup_takes_the_most_similar_findings(predicted: str, training: list[str], row: int) -> None:
    assert similar(predicted, training) == row


def test_frequent_report_and_the_most_frequent_findings_where_all_reports_differ() -> None:
    def row(texts: list[str]) -> int:
        return frequent_row(texts, [label_report(text) for text in texts])

    assert row([CAVITY, NODULE, NORMAL, NODULE.replace("见", " 见 ")]) == 1
    assert row([CAVITY, NODULE, NODULE.replace("12", "14"), NORMAL]) == 1


def test_each_baseline_copies_its_row() -> None:
    training, evaluated = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[2, 0]]
    reports, stated = [NODULE, CAVITY, NODULE], [label_report(CAVITY), label_report(NORMAL)]
    copied = copied_reports(reports, [label_report(text) for text in reports], stated, (evaluated, training), "planted")
    assert copied.reports["nearest"] == [NODULE, NODULE] and copied.reports["frequent"] == [NODULE, NODULE]
    assert copied.reports["lookup"] == [CAVITY, NODULE] and copied.note == "planted"


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    """Four files that differ; nothing here reads them as images."""
    paths = [tmp_path / f"{name}.nii.gz" for name in "abcd"]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


def table(path: Path, rows: list[tuple[Path, str]]) -> Path:
    lines = ["image_path,question,answer", *(f"{image},问题,{report}" for image, report in rows)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def cases_of(train: Path | None, evaluated: Path, monkeypatch: pytest.MonkeyPatch) -> baselines.TrainingCases:
    config = load_config(None, cache_dir=str(evaluated.parent)).replace(
        caption_csv_train=train and str(train), caption_prompt_json=None
    )
    monkeypatch.setattr(baselines, "prepare_cases", lambda *_: None)
    monkeypatch.setattr("data.medical_vlm_dataset.ViewSelection.from_config", lambda *_: None)
    return training_cases(config, SimpleNamespace(plan=None), None, read_caption_table(evaluated))


def test_evaluated_cases_are_counted_and_not_copied(
    scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    renamed = Path(shutil.copy(scans[0], tmp_path / "renamed.nii.gz"))
    train = table(tmp_path / "train.csv", [(scans[2], NODULE), (renamed, CAVITY), (scans[3], NORMAL)])
    evaluated = table(tmp_path / "test.csv", [(scans[0], CAVITY), (scans[1], NODULE)])
    found = cases_of(train, evaluated, monkeypatch)
    assert found.rows == [0, 2] and len(found.data) == 3
    assert found.note == f"2 training cases of {train}, 1 evaluated ones left out"
    assert f"warning: 1 of 2 cases in {train} too" in capsys.readouterr().out


def test_why_there_are_no_baselines(
    scans: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = table(tmp_path / "test.csv", [(scans[0], CAVITY), (scans[1], NODULE)])
    broken = table(tmp_path / "train.csv", [(scans[2], NODULE), (tmp_path / "lost.nii.gz", CAVITY)])
    for train, why in (
        (None, "configuration key 'caption_csv_train' is empty"),
        (tmp_path / "none.csv", "table not found"),
        (broken, "file not found"),
        (evaluated, f"every case of {evaluated} is evaluated"),
    ):
        found = cases_of(train, evaluated, monkeypatch)
        assert found.data is None and found.rows == [] and why in found.note
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(notes) == 1 and why in notes[0]
