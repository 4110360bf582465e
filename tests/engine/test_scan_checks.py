"""Scans that are no chest CT, or unlike the training cases: what each gets. docs/evaluation.md holds the same table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan
from data.cache import VolumeCache
from data.checks.problems import Problem
from data.imaging.nifti import write_volume
from data.phantom.canvas import Grid
from data.phantom.case import make_case
from data.tables.caption_table import CaptionRow
from data.view_selection import ViewSelection
from engine.scan_checks import (
    NOTICES,
    FeatureDistance,
    check_new_scan,
    check_scans,
    chosen_blindly,
    compare_described,
    feature_summary,
    implausible_segmentation,
    judge_features,
    notice,
)
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
GRID = Grid((36, 116, 116), (8.0, 2.9, 2.9))
TRAIN, VAL = 24, 12
Made = dict[str, np.ndarray]


def unusual(chest: np.ndarray) -> Made:
    """Scans (z, y, x) on the chest's grid."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, size) for size in chest.shape), indexing="ij")
    rng = np.random.default_rng(5)
    body = (x / 0.8) ** 2 + (y / 0.6) ** 2 < 1
    skull = (x / 0.5) ** 2 + (y / 0.6) ** 2 + (z / 0.8) ** 2
    abdomen = np.where(body, 50.0, -1000.0)
    abdomen[(x - 0.2) ** 2 + (y + 0.2) ** 2 + (z / 3) ** 2 < 0.01] = -900  # gas of the bowel
    grain = ndimage.gaussian_filter(rng.normal(size=chest.shape), 0.7)
    lungs = ndimage.binary_fill_holes(chest > -400) & (chest < -400)
    lungs |= np.stack([ndimage.binary_fill_holes(plane > -400) & (plane < -300) for plane in chest])
    return {
        "brain CT": np.where(skull < 1, np.where(skull > 0.85, 1100.0, 35.0), -1000.0) + 4 * grain,
        "abdomen": abdomen + 10 * grain,
        "abdominal MR": np.where(body, 400 + 200 * grain, 5 * np.abs(grain)),
        "label map": np.where(body, 1.0, 0.0) + (skull < 0.5),
        "upper half of a chest": chest[len(chest) // 2 :],
        "one lung": np.where((x > 0) & (chest < -300) & body, 40.0, chest),
        "chest upside down": chest[::-1, :, ::-1],
        "chest without lungs": np.where(lungs, 40.0, chest),
        "twice the noise": chest + 30 * grain / grain.std(),
        "a chest as in training": chest,
    }


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory, assets: Path) -> dict[str, tuple[str, str]]:
    """Outcome and lines of each unusual scan, with distances fitted on phantoms."""
    root = tmp_path_factory.mktemp("scans")
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=6, planes=1).eval()
    plan = PreprocessPlan.from_nnunet(source.plans, source.configuration)
    cache, selection = VolumeCache(root / "cache", plan), ViewSelection(plan, encoder.total_stride, 3, "uniform")

    def read(name: str, hu: np.ndarray):  # noqa: ANN202
        path = root / f"{name.replace(' ', '_')}.nii.gz"
        write_volume(path, np.rint(hu).astype(np.int16), GRID.spacing)
        return path

    def summary(path: Path) -> torch.Tensor:
        with torch.no_grad():
            return encoder(torch.as_tensor(selection.select(cache.get(path)).images))[None]

    kinds = [[], [("nodule", "left", "upper")], [("consolidation", "right", "lower")]]
    chests = [make_case([3, k], kinds[k % 3], GRID).hu for k in range(TRAIN + VAL + 1)]
    paths = [read(f"case {k}", hu) for k, hu in enumerate(chests[:-1])]
    summaries = torch.cat([feature_summary(summary(path)) for path in paths])
    state = FeatureDistance.fit(summaries[:TRAIN], summaries[TRAIN:]).state()
    described = [cache.get(path).described for path in paths[:TRAIN]]
    ranges = {key: [min(d[key] for d in described), max(d[key] for d in described)] for key in described[0]}

    rows = {}
    for name, hu in unusual(chests[-1]).items():
        path = read(name, hu)
        try:
            problems = check_new_scan(cache, path, None, force=False)
        except InputError as error:
            rows[name] = ("stops", str(error).removeprefix(f"{path}: ").split("; ")[0])
            continue
        lines = [problem.problem for problem in problems] + compare_described(ranges, cache.get(path))
        lines += ["features unlike those of the training cases"] * judge_features(state, summary(path))[0]
        said = "; ".join(line.removeprefix("warning: ") for line in lines)
        rows[name] = ("warning", said) if lines else ("report", "")
    return rows


WANTED = {
    "brain CT": ("stops", "no chest CT"),
    "abdomen": ("stops", "no chest CT"),
    "abdominal MR": ("stops", "no soft tissue in HU"),
    "label map": ("stops", "a label map"),
    "upper half of a chest": ("warning", "the lungs go on beyond the lower end"),
    "one lung": ("warning", "hardly any air on the left side"),
    "chest upside down": ("warning", "the scan is upside down"),
    "chest without lungs": ("stops", "expected lungs"),
    "twice the noise": ("warning", "noise (HU)"),
    "a chest as in training": ("report", ""),
}


@pytest.mark.parametrize("name", WANTED)
def test_an_unusual_scan_is_stopped_or_reported(table: dict[str, tuple[str, str]], name: str) -> None:
    outcome, words = WANTED[name]
    assert table[name][0] == outcome and words in table[name][1], table[name]


def test_the_documentation_shows_these_outcomes(table: dict[str, tuple[str, str]]) -> None:
    rows = [f"| {name} | {outcome} | {line} |" for name, (outcome, line) in table.items()]
    assert "\n".join(rows) in DOCUMENT.read_text(encoding="utf-8"), "\n".join(rows)


def test_distances_are_one_for_training_cases_and_grow_outside() -> None:
    rng = torch.Generator().manual_seed(0)
    train, val = torch.randn(400, 6, generator=rng), torch.randn(150, 6, generator=rng)
    fitted = FeatureDistance.fit(train, val)
    assert float(fitted.of(train).square().mean().sqrt()) == pytest.approx(1, abs=0.06)
    inside = fitted.judge(train[:1])
    assert not inside[0] and "within the limit" in inside[1]
    outside = FeatureDistance(**fitted.state()).judge(train[:1] + 10)
    assert outside[0] and "outside the limit" in outside[1]
    with pytest.raises(InputError, match="not finite"):
        judge_features(fitted.state(), torch.full((1, 1, 3, 2, 2), math.nan))
    known, line = judge_features(None, torch.zeros(1, 1, 3, 2, 2))
    assert not known and "unknown" in line


def test_a_segmentation_of_everything_leaves_the_choice_of_slices_blind(
    make_volume: Callable[..., object],
) -> None:
    everything = make_volume(0.9)
    assert "90 % of the scan as lesion" in implausible_segmentation(everything)
    for policy, volume, blind in (
        ("auto", everything, True),
        ("auto", make_volume(0.01), False),
        ("auto", replace(make_volume(0.01), lesions_from=None), True),
        ("mask", replace(everything, lesions_from="mask"), False),
        ("uniform", make_volume(0.01), True),
    ):
        selection = ViewSelection.__new__(ViewSelection)
        selection.policy = policy
        assert chosen_blindly(volume, selection) is blind, policy
    assert notice(["forced", "blind"], "en") == f"{NOTICES['forced']['en']} {NOTICES['blind']['en']}"
    assert notice([], "zh") == ""


@pytest.fixture
def make_volume(tmp_path: Path, assets: Path) -> Callable[..., object]:
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    cache = VolumeCache(tmp_path / "cache", PreprocessPlan.from_nnunet(source.plans, source.configuration))
    write_volume(
        tmp_path / "a.nii.gz", np.full((10, 40, 40), -500, np.int16) + np.arange(40, dtype=np.int16), (2, 2, 2)
    )
    volume = cache.get(tmp_path / "a.nii.gz")
    voxels = math.prod(volume.image.shape[2:])

    def make(fraction: float):  # noqa: ANN202
        lesion = np.full(volume.image.shape[1], round(fraction * voxels))
        return replace(volume, lesions_from="segmentation", lesion_voxels=lesion)

    return make


def test_warnings_are_counted_and_errors_stop_unless_forced(tmp_path: Path, make_volume, capsys) -> None:  # noqa: ANN001
    rows = [CaptionRow(2, tmp_path / "a.nii.gz", "q", "a", None)]
    case = make_volume(0)

    class Cache:
        def get(self, *_: object):  # noqa: ANN202
            return replace(case, problems=problems)

    problems = (Problem(0, "odd", "look", level="warning"),)
    assert len(check_scans(Cache(), {"train": rows, "val": rows}, force=False)) == 3
    printed = capsys.readouterr().out
    assert "warning: 3 warnings in 2 rows, most often (2 times): odd; the first: train, row 2: odd; look" in printed
    problems = (Problem(0, "no CT", "name one"),)
    with pytest.raises(InputError, match="a.nii.gz: no CT; name one, or --force"):
        check_scans(Cache(), {"train": rows}, force=False)
    assert check_scans(Cache(), {"train": rows}, force=True)
