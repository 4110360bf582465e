"""Phantoms: what the report will say must be so in the image; files and reruns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from config.errors import InputError
from data.phantom.canvas import Grid
from data.phantom.case import Phantom, make_case, write_case
from data.phantom.dataset import DatasetPaths, make_dataset
from data.phantom.finding import LESION_TYPES, SIDES, ZONES, Finding
from data.phantom.lesions import SIZE_RANGE, ZONE_MARGIN, zone_margin
from data.report_language.labeller import label_report

DECK = [(k, s, z) for k in LESION_TYPES for s in SIDES for z in ZONES if k != "effusion" or z == "lower"]


@pytest.fixture(scope="module")
def cases() -> list[Phantom]:
    """One phantom of every (type, side, zone)."""
    return [make_case([11, i], [wanted]) for i, wanted in enumerate(DECK)]


@pytest.fixture(scope="module")
def healthy() -> Phantom:
    return make_case(3, [])


def _best_slice(case: Phantom) -> int:
    return int((case.mask > 0).sum((1, 2)).argmax())


def test_every_finding_is_drawn_where_it_was_asked_for(cases: list[Phantom]) -> None:
    for case, (kind, side, zone) in zip(cases, DECK, strict=True):
        (found,) = case.findings
        assert (found.type, found.side, found.zone) == (kind, side, zone)
        assert set(np.unique(case.mask)) == {0, found.mask_value}
        z, _, x = (axis.mean() for axis in np.nonzero(case.mask))
        assert (x > case.mask.shape[2] / 2) == (side == "left")
        margin = min(zone_margin(v * case.spacing[0], case.lung_z[side], zone) for v in (z, _best_slice(case)))
        assert margin >= ZONE_MARGIN - 1e-6


def test_stated_size_is_that_of_the_largest_axial_slice(cases: list[Phantom]) -> None:
    """The diameter found by brute force over all pairs of pixels."""
    for case in cases:
        (found,) = case.findings
        assert SIZE_RANGE[found.type][0] <= found.size_mm <= SIZE_RANGE[found.type][1]
        points = np.argwhere(case.mask[_best_slice(case)] > 0) * case.spacing[1:]
        if found.type != "effusion":
            gap = np.linalg.norm(points[:, None] - points[None], axis=-1).max() + case.spacing[1]
            assert found.size_mm == pytest.approx(gap, abs=1.0)
        else:
            # A crescent is as deep as the largest disc inside it.
            outside = np.argwhere(case.mask[_best_slice(case)] == 0) * case.spacing[1:]
            radius = np.linalg.norm(points[:, None] - outside[None], axis=-1).min(1).max()
            assert found.size_mm == pytest.approx(2 * radius, abs=case.spacing[1] + 1)


# Percentile of the HU inside the mask of the slice with most of the lesion, and its bounds.
DENSITIES = {
    "nodule": (75, -150, 130),
    "calcification": (75, 300, 3000),
    "cavity": (90, -250, 200),  # a thin wall fills its voxels in part only; still it is far denser than lung
    "consolidation": (50, -300, 200),
    "effusion": (50, -60, 60),
    "tree_in_bud": (95, -450, 200),
    "fibrosis": (50, -600, 200),
}


def test_types_have_their_densities(cases: list[Phantom]) -> None:
    for case in cases:
        plane, inside = case.hu[_best_slice(case)], case.mask[_best_slice(case)] > 0
        kind = case.findings[0].type
        percent, low, high = DENSITIES[kind]
        assert low < np.percentile(plane[inside], percent) < high, kind
        y, x = (round(v.mean()) for v in np.nonzero(inside))
        assert kind != "cavity" or plane[y, x] < -500, "air in the middle"
        assert kind != "tree_in_bud" or np.median(plane[inside]) < -500, "lung between the dots"


def test_healthy_chest_has_the_densities_and_the_sides_of_a_chest(healthy: Phantom) -> None:
    assert healthy.findings == [] and not healthy.mask.any()
    hu = healthy.hu
    middle = hu.shape[2] // 2
    assert np.median(hu[:, :4]) < -950  # air
    assert 2.0 < ((hu > -950) & (hu < -700)).sum() * np.prod(healthy.spacing) / 1e6 < 7.0  # litres of lung
    assert (hu > 250).mean() > 0.002  # bone
    low, high = healthy.lung_z["right"]
    base = hu[int((low + 0.12 * (high - low)) / healthy.spacing[0])]
    soft = (base > 20) & (base < 130)
    assert soft[:, :middle].sum() > soft[:, middle:].sum()  # the liver is on the right
    heart = hu[int((low + 0.38 * (high - low)) / healthy.spacing[0])]
    front = (heart > 0)[: hu.shape[1] // 2]
    columns = np.arange(hu.shape[2])
    assert (front * columns).sum() / front.sum() > middle  # the heart leans to the left
    assert high - low > 180


def test_files_are_lps_and_depend_on_the_content_alone(tmp_path: Path, cases: list[Phantom]) -> None:
    case = cases[0]
    for name in ("a", "b"):
        write_case(case, tmp_path / f"{name}.nii.gz", tmp_path / f"{name}_mask.nii.gz")
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    image, mask = nib.load(tmp_path / "a.nii.gz"), nib.load(tmp_path / "a_mask.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.get_data_dtype() == np.int16 and mask.get_data_dtype() == np.uint8
    assert image.header.get_zooms() == pytest.approx(case.spacing[::-1])
    assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0) - np.clip(case.hu, -1024, 3071)).max() <= 0.5
    assert np.array_equal(np.asarray(mask.dataobj).transpose(2, 1, 0), case.mask)


def test_other_grids_and_a_grid_too_small() -> None:
    case = make_case(1, [("cavity", "left", "upper")], Grid((60, 96, 112), (5.0, 3.4, 3.4)))
    assert case.hu.shape == (60, 96, 112) and case.findings[0].type == "cavity"
    with pytest.raises(InputError, match="a chest needs"):
        make_case(1, [], Grid((20, 64, 64), (5.0, 2.0, 2.0)))


def test_several_findings_do_not_touch_and_are_named_from_the_lowest_to_the_highest() -> None:
    wanted = [("effusion", "right", "lower"), ("cavity", "right", "upper"), ("nodule", "left", "middle")]
    case = make_case(5, wanted)
    assert [(f.type, f.side, f.zone) for f in case.findings] == [wanted[0], wanted[2], wanted[1]]
    best = [int((case.mask == f.mask_value).sum((1, 2)).argmax()) for f in case.findings]
    assert best == sorted(best)
    assert set(np.unique(case.mask)) == {0, *(f.mask_value for f in case.findings)}


def test_an_effusion_has_no_zone_but_the_lower() -> None:
    with pytest.raises(ValueError, match="lower"):
        Finding("effusion", "left", "upper", 20)


# ---------------------------------------------------------------------------- data set


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _bytes(paths: DatasetPaths) -> dict[str, bytes]:
    return {p.relative_to(paths.root).as_posix(): p.read_bytes() for p in paths.root.rglob("*") if p.is_file()}


def test_dataset_tables_agree_with_the_images(tmp_path: Path) -> None:
    seen = []
    options = {"max_findings": 3, "normal_share": 0.25, "workers": 1, "progress": lambda *a: seen.append(a)}
    paths = make_dataset(tmp_path, 12, 3, 2, seed=1, **options)
    assert seen[-1] == (17, 17)
    cases = json.loads(paths.cases_json.read_text(encoding="utf-8"))
    truth = {case["id"]: [Finding(**f) for f in case["findings"]] for case in cases}
    for path, count in ((paths.train_csv, 12), (paths.val_csv, 3), (paths.test_csv, 2)):
        rows = _rows(path)
        assert len(rows) == count
        for row in rows:
            assert list(row) == ["image_path", "question", "answer", "mask_path"]
            found = truth[Path(row["image_path"]).name.removesuffix(".nii.gz")]
            stated = [m for m in label_report(row["answer"]) if m.section == "findings" and m.polarity == "present"]
            assert [(m.side, m.size_mm) for m in stated] == [(f.side, f.size_mm) for f in found]
            mask = np.asarray(nib.load(tmp_path / row["mask_path"]).dataobj)
            assert set(np.unique(mask)) - {0} == {f.mask_value for f in found}
    whole = [{key: row[key] for key in ("image_path", "question", "answer")} for row in _rows(paths.test_csv)]
    assert _rows(tmp_path / "test_no_masks.csv") == whole
    train = [found for name, found in truth.items() if name.startswith("train")]
    assert sum(not found for found in train) == 3
    assert {len(found) for found in train} == {0, 1, 2, 3}
    questions = {row["question"] for row in _rows(paths.train_csv)}
    prompts = json.loads(paths.prompt_json.read_text(encoding="utf-8"))["caption_prompt"]
    assert len(prompts) == 8 and questions - {""} <= set(prompts)


def test_rerun_keeps_whole_files_and_replaces_broken_ones(tmp_path: Path) -> None:
    first = make_dataset(tmp_path, 3, 1, 1, seed=2, workers=1)
    before = _bytes(first)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("images/*")}
    broken, missing = tmp_path / "images/train_0001.nii.gz", tmp_path / "masks/val_0000.nii.gz"
    broken.write_bytes(broken.read_bytes()[:1000])
    missing.unlink()
    (tmp_path / "cases/test_0000.json").write_text("{", encoding="utf-8")
    assert _bytes(make_dataset(tmp_path, 3, 1, 1, seed=2, workers=1)) == before
    kept = [p for p, t in times.items() if p.stat().st_mtime_ns == t]
    assert sorted(p.name for p in kept) == ["train_0000.nii.gz", "train_0002.nii.gz"]
    other = _bytes(make_dataset(tmp_path, 3, 1, 1, seed=3, workers=1))
    assert other["images/train_0000.nii.gz"] != before["images/train_0000.nii.gz"], "another seed replaces the images"


def test_longer_english_and_parallel_sets_hold_the_same_images(tmp_path: Path) -> None:
    short = _bytes(make_dataset(tmp_path / "a", 2, 0, 1, seed=4, workers=1))
    long = _bytes(make_dataset(tmp_path / "b", 5, 0, 1, seed=4, workers=2, language="en"))
    images = [name for name in short if name.endswith(".nii.gz")]
    assert len(images) == 6 and all(short[name] == long[name] for name in images)
    assert long["train.csv"].count(b"Findings: ") == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_val": -1}, "n_val is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"max_findings": 0}, "max_findings is 0"),
        ({"normal_share": 1.5}, "normal_share is 1.5"),
        ({"language": "fr"}, "language 'fr'"),
    ],
)
def test_bad_arguments_name_themselves(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"n_train": 1, "n_val": 0, "n_test": 0, "seed": 0} | change
    with pytest.raises(InputError, match=message):
        make_dataset(tmp_path, **arguments)
