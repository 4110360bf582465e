"""The data check as a user runs it: what it prints, writes and returns; training runs its quick form first."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from config.errors import InputError
from config.schema import build_config, write_config
from data.checks.data_check import check_image
from data.phantom.canvas import Grid
from data.phantom.case import make_case, write_case
from data.tables.caption_table import read_caption_table
from engine.chain import SHIPPED_NNUNET
from engine.loaders import check_tables

REPOSITORY = Path(__file__).resolve().parents[2]
GRID = Grid((36, 96, 96), (8.0, 3.6, 3.6))
REPORT = "所见：左肺上野见实变。结论：左肺上野实变。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three cases with masks, two tables and a configuration; the second image is damaged."""
    folder = tmp_path_factory.mktemp("data")
    for seed in range(3):
        case = make_case(seed, [("consolidation", "left", "upper")], GRID)
        write_case(case, folder / f"{seed}.nii.gz", folder / f"{seed}_mask.nii.gz")
    (folder / "1.nii.gz").write_bytes((folder / "1.nii.gz").read_bytes()[:5000])
    lines = [f"{seed}.nii.gz,{seed}_mask.nii.gz,P{seed},Q?,{REPORT}" for seed in range(2)]
    (folder / "train.csv").write_text("\n".join(["影像,掩膜,患者,问题,报告", *lines, ""]), encoding="gbk")
    (folder / "good.csv").write_text(f"影像,掩膜,患者,问题,报告\n{lines[0]}\n", encoding="utf-8")
    val = f"影像,掩膜,患者,问题,报告\n2.nii.gz,,P0,Q?,{REPORT}\n2.nii.gz,,P0,Nodules?,结论：未见结节。\n"
    (folder / "val.csv").write_text(val, encoding="utf-8")
    write_config(configuration(folder, folder / "train.csv"), folder / "paths.yaml")
    return folder


def configuration(folder: Path, train: Path):  # noqa: ANN201
    values = {"caption_csv_train": train, "caption_csv_val": folder / "val.csv", "cache_dir": folder / "cache"}
    values["nnunet_encoder_checkpoint"] = REPOSITORY / "tests/assets/nnunet_tiny/2d_plain/fold_0/checkpoint_best.pth"
    return build_config({**{key: str(value) for key, value in values.items()}, "slice_policy": "mask"}, "test")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/check_data.py", "--config", str(folder / "paths.yaml"), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False, timeout=120)


def listed(out: Path) -> list[dict[str, str]]:
    with (out / "problems.csv").open(encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream))


def test_one_pass_reports_everything_and_shows_what_the_model_sees(folder):
    out = folder / "out"
    done = run(folder, "--out", str(out))
    assert done.returncode == 1, done.stderr
    problems = listed(out)
    assert list(problems[0])[:4] == ["row", "image", "problem", "remedy"]
    [error] = [p for p in problems if p["level"] == "error"]
    assert error["row"] == "3" and error["image"].endswith("1.nii.gz") and "copy it again" in error["remedy"]
    assert any("patient 'P0' is in the training table too (row 2)" in p["problem"] for p in problems)
    assert "error: train, row 3" in done.stdout and "read as GBK" in done.stdout
    page = (out / "contact_sheet.html").read_text(encoding="utf-8")
    assert REPORT in page and "cases/train_0002.png" in page and "copy it again" in page
    figure = image.imread(out / "cases" / "train_0002.png")[..., :3]
    red = (figure[..., 0] > 0.8) & (figure[..., 1] < 0.3)
    assert red.any(), "the lesion is outlined"
    columns = np.nonzero(red[:, : figure.shape[1] // 5])[1]
    assert columns.mean() > figure.shape[1] / 10, "the patient's left is on the right of the first panel"
    assert (out / "contact_sheet.png").is_file() and not (out / "cases" / "train_0003.png").exists()
    assert any((folder / "cache").iterdir()), "the encoder's input was made by the code of training"


def test_quick_reads_headers_only_and_a_good_table_returns_zero(folder, tmp_path):
    tables = ("--csv", str(folder / "train.csv"), "--val_csv", str(folder / "good.csv"))
    bad = run(folder, *tables, "--quick", "--out", str(tmp_path))
    assert bad.returncode == 1 and "error: train, row 3" in bad.stdout
    assert "error: val, the validation table has a single case" in bad.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["findings.csv", "problems.csv"]
    good = run(folder, "--csv", str(folder / "good.csv"), "--quick", "--out", str(tmp_path))
    assert good.returncode == 0 and "0 errors" in good.stdout


def test_tables_that_cannot_be_read_are_reported_together(folder, tmp_path):
    (tmp_path / "empty.csv").touch()
    tables = ("--csv", str(tmp_path / "empty.csv"), "--val_csv", str(tmp_path / "no.csv"))
    done = run(folder, *tables, "--out", str(tmp_path))
    assert done.returncode == 1 and "is empty" in done.stdout and "no.csv; set --val_csv to an" in done.stdout
    wrong = run(folder, "--image_root", str(tmp_path / "no"), "--out", str(tmp_path))
    assert wrong.returncode == 2 and "image_root is no folder" in wrong.stderr and "Traceback" not in wrong.stderr


REPORTS = [(REPORT, False), (REPORT.replace("左", "右"), True), ("双肺实变。", False), ("右肺实变，左肺结节。", False)]


@pytest.mark.parametrize(("report", "found"), REPORTS)
def test_a_mask_on_the_other_side_than_the_report_is_a_warning(folder, report, found):
    [row] = read_caption_table(folder / "good.csv")
    problems = [problem for problem in check_image(replace(row, answer=report)).problems if "mask on" in str(problem)]
    assert len(problems) == found
    assert all("row 2: mask on the left, report says right; find" in str(problem) for problem in problems)


# ---------------------------------------------------------------- training asks first


def test_check_tables_passes_good_ones_and_names_a_bad_image(folder):
    check_tables(configuration(folder, folder / "good.csv"))
    with pytest.raises(InputError, match=r"row 3: .*1\.nii\.gz: .*truncated.*check_data\.py"):
        check_tables(configuration(folder, folder / "train.csv"))


def test_own_images_under_the_quick_starts_table_are_refused_for_its_models(folder, tmp_path):
    """Its table may have been overwritten with own rows, which name images elsewhere."""
    (tmp_path / "cases.json").write_text('{"lung_z_mm": 1}', encoding="utf-8")
    good = (folder / "good.csv").read_text(encoding="utf-8").replace("0.nii.gz", f"{folder}/0.nii.gz")
    for name in ("train.csv", "val.csv"):
        (tmp_path / name).write_text(good.replace("0_mask.nii.gz", f"{folder}/0_mask.nii.gz"), encoding="utf-8")
    config = configuration(tmp_path, tmp_path / "train.csv").replace(nnunet_encoder_checkpoint=str(SHIPPED_NNUNET))
    with pytest.raises(InputError, match="made for the quick start's synthetic data, reports of .*nii.gz would be"):
        check_tables(config)
    check_tables(config, toys=True)


@pytest.mark.parametrize("name", ["train", "train_vlm"])
def test_both_stages_refuse_a_bad_image_before_any_model_is_loaded(folder, tmp_path, monkeypatch, name):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--config", str(folder / "paths.yaml"), "--output_dir", str(tmp_path)])
    monkeypatch.setattr(module, "start_run", lambda *_: (None, tmp_path))  # no devices are set up for a refusal
    with pytest.raises(InputError, match=r"row 3: .*1\.nii\.gz"):
        module.main()
