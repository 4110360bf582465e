"""Preprocessing equals nnU-Net's own, on its reference cases and step by step on synthetic ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from config.errors import InputError
from config.nnunet_plans import PreprocessPlan, Resampling, resolve_configuration
from data.imaging.reader import read_mask, read_volume
from data.imaging.volume import Volume
from data.nnunet_preprocess import normalize, preprocess
from data.resampling import new_shape, resample_image, resample_labels, separate_axis, spline_matrix
from tests.data.imaging.images import PLAN_2D

REFERENCES = ["2d_plain", "3d_plain", "tiny/2d_plain", "tiny/2d_resenc", "tiny/3d_plain"]
PLAN = replace(PLAN_2D, configuration="3d_fullres", dim=3, spacing=(1.0, 1.0, 1.0), patch_size=(8, 8, 8))


def _volume(array: np.ndarray, spacing=(1.0, 1.0, 1.0)) -> Volume:
    return Volume(array.astype(np.float32), spacing, np.eye(4), "LPS", Path("synthetic.nii.gz"), "LPS")


@pytest.fixture
def noise() -> np.ndarray:
    """Smooth random HU, so that cubic interpolation overshoots somewhere."""
    rng = np.random.default_rng(7)
    return ndimage.gaussian_filter(rng.normal(0, 4000, (14, 22, 19)), 1) - 300


def _plans(folder: Path) -> dict:
    return json.loads((folder / "plans.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_nnunet_on_its_reference_cases(shared, name):
    folder = shared / "nnunet" / name
    (reference_file,) = folder.glob("reference_*.npz")
    reference = np.load(reference_file)
    meta = json.loads(str(reference["meta"]))
    plan = PreprocessPlan.from_nnunet(_plans(folder), meta["config"].removeprefix("nnUNetPlans_"))
    volume = read_volume(shared / "nnunet" / "cases" / f"{meta['case']}_0000.nii.gz", plan.orientation)
    mask = read_mask(shared / "nnunet" / "cases" / f"{meta['case']}.nii.gz", volume)
    case = preprocess(volume, plan, mask)
    assert np.abs(case.image - reference["preprocessed"]).max() < 1e-5
    assert case.image.dtype == np.float32 and case.mask.dtype == np.uint8
    # nnU-Net marks voxels outside the body with -1; here they are background.
    assert np.array_equal(case.mask, np.maximum(reference["seg_preprocessed"][0], 0))
    assert [list(side) for side in case.voxel_map.bbox] == meta["bbox"]
    assert volume.spacing == pytest.approx(meta["input_spacing"], rel=1e-12)


def test_reference_slice_padded_to_the_patch_is_the_network_input(shared):
    reference = np.load(shared / "nnunet" / "2d_plain" / "reference_tst_001.npz")
    meta = json.loads(str(reference["meta"]))
    plan = PreprocessPlan.from_nnunet(_plans(shared / "nnunet" / "2d_plain"), "2d")
    case = preprocess(read_volume(shared / "nnunet" / "cases" / "tst_001_0000.nii.gz"), plan)
    rows, columns = (slice(*side) for side in meta["location"]["slicer_revert"])
    padded = np.zeros((1, 1, *plan.patch_size), dtype=np.float32)
    padded[0, :, rows, columns] = case.image[:, meta["location"]["z"]]
    assert np.abs(padded - reference["network_input"]).max() < 1e-5


def test_plan_survives_json(assets):
    plans = _plans(assets / "nnunet_tiny" / "2d_resenc")
    for name in ("2d", "3d_fullres"):
        plan = PreprocessPlan.from_nnunet(plans, name)
        assert PreprocessPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
        assert plan.dim == int(name[0])
    with pytest.raises(InputError, match=r"missing keys \['spacing'\]"):
        PreprocessPlan.from_dict({k: v for k, v in plan.to_dict().items() if k != "spacing"})


def test_inheritance_merges_parents_first_and_refuses_circles():
    a, b = {"spacing": [1], "patch_size": [2]}, {"inherits_from": "a", "spacing": [3]}
    c, d, e = {"inherits_from": "b", "batch_size": 4}, {"inherits_from": "e"}, {"inherits_from": "d"}
    plans = {"configurations": {"a": a, "b": b, "c": c, "d": d, "e": e}}
    assert resolve_configuration(plans, "c") == {"spacing": [3], "patch_size": [2], "batch_size": 4}
    with pytest.raises(InputError, match="circle: d -> e -> d"):
        resolve_configuration(plans, "d")
    with pytest.raises(InputError, match="no configuration '3d'; the plans hold: a, b, c, d, e"):
        resolve_configuration(plans, "3d")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization_schemes": ["RGBTo01Normalization"]}, "'RGBTo01Normalization' of channel 0"),
        ({"preprocessor_name": "MyPreprocessor"}, "'MyPreprocessor' is not supported"),
        ({"resampling_fn_data": "resample_torch_simple"}, "'resample_torch_simple' is not supported"),
        ({"use_mask_for_norm": [False, True]}, "one of each per input channel"),
        ({"resampling_fn_seg_kwargs": {"is_seg": True, "order": 3}}, "order 3"),
    ],
)
def test_plans_that_cannot_be_reproduced_are_refused_by_name(assets, change, message):
    plans = _plans(assets / "nnunet_tiny" / "2d_plain")
    plans["configurations"]["2d"].update(change)
    with pytest.raises(InputError, match=message):
        PreprocessPlan.from_nnunet(plans, "2d")


def test_reader_decides_the_orientation(assets):
    plans = _plans(assets / "nnunet_tiny" / "2d_plain")
    assert PreprocessPlan.from_nnunet(plans, "2d").orientation == "LPS"
    assert PreprocessPlan.from_nnunet(plans, "2d", "file").orientation == "file"
    plans["image_reader_writer"] = "NibabelIOWithReorient"
    assert PreprocessPlan.from_nnunet(plans, "2d").orientation == "RAS"
    plans["image_reader_writer"] = "NaturalImage2DIO"
    with pytest.raises(InputError, match="NaturalImage2DIO"):
        PreprocessPlan.from_nnunet(plans, "2d")


@pytest.mark.parametrize(("source", "target"), [(13, 29), (29, 13), (40, 41), (5, 1), (2, 7), (64, 64)])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_spline_matrix_is_scipys_zoom(source, target, order):
    signal = np.random.default_rng(source).normal(size=source)
    expected = ndimage.zoom(signal, target / source, order=order, mode="nearest", grid_mode=True)
    assert np.allclose(spline_matrix(source, target, order) @ signal, expected, atol=1e-12)


def test_axis_by_axis_equals_one_cubic_zoom_clipped_to_the_input(noise):
    shape = (17, 15, 27)
    zoom = [new / old for new, old in zip(shape, noise.shape, strict=True)]
    expected = ndimage.zoom(noise, zoom, order=3, mode="nearest", grid_mode=True)
    assert expected.max() > noise.max()  # the clip has something to do
    got = resample_image(noise, shape, None, Resampling(order=3))
    assert np.allclose(got, np.clip(expected, noise.min(), noise.max()), atol=1e-8)
    assert np.array_equal(resample_image(noise, noise.shape, None, Resampling(order=3)), noise), "nothing to do"


def test_separate_axis_is_clipped_per_slice_and_nearest_along_the_axis(noise):
    got = resample_image(noise, (20, 30, 30), 0, Resampling(order=3))
    centres = np.clip(14 / 20 * (np.arange(20) + 0.5) - 0.5, 0, 13)
    for out, source in enumerate(np.floor(centres + 0.5).astype(int)):
        plane = ndimage.zoom(noise[source], (30 / 22, 30 / 19), order=3, mode="nearest", grid_mode=True)
        assert np.allclose(got[out], np.clip(plane, noise[source].min(), noise[source].max()), atol=1e-8)


def test_which_axis_stands_alone():
    settings = Resampling(order=3)
    assert separate_axis((5, 0.7, 0.7), (1, 0.7, 0.7), settings) == 0
    assert separate_axis((1, 1, 1), (1, 1, 4), settings) == 2  # judged by the target
    assert separate_axis((3, 1, 1), (3, 1, 1), settings) is None  # the ratio must exceed 3
    assert separate_axis((5, 5, 1), (1, 1, 1), settings) is None  # two coarse axes
    assert separate_axis((5, 1, 1), (5, 1, 1), replace(settings, force_separate_z=False)) is None
    assert separate_axis((2, 1, 1), (1, 1, 1), replace(settings, force_separate_z=True)) == 0


def test_new_shape_rounds_halves_to_even_like_python():
    assert new_shape((5, 7, 3), (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)) == (2, 4, 2)


def _labels_by_argmax(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every label's indicator through scipy; ties to the nearest neighbour if tied, else the smallest."""
    zoom = [new / old for new, old in zip(shape, labels.shape, strict=True)]
    names = np.unique(labels)
    options = {"mode": "nearest", "grid_mode": True}
    covers = np.stack([ndimage.zoom((labels == n).astype(float), zoom, order=1, **options) for n in names])
    covers = covers.round(9)
    nearest = ndimage.zoom(labels, zoom, order=0, **options)
    of_nearest = np.take_along_axis(covers, np.searchsorted(names, nearest)[None], axis=0)[0]
    return np.where(of_nearest == covers.max(axis=0), nearest, names[covers.argmax(axis=0)])


@pytest.mark.parametrize("shape", [(12, 20, 16), (9, 11, 13), (3, 5, 4), (6, 15, 8)])
def test_labels_go_to_the_largest_cover(shape):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, (3, 5, 4)).repeat(2, 0).repeat(2, 1).repeat(2, 2).astype(np.uint8)
    got = resample_labels(labels, shape, None, Resampling(order=1))
    assert got.dtype == np.uint8 and np.array_equal(got, _labels_by_argmax(labels, shape))


def test_a_small_lesion_survives_in_place_beside_an_empty_volume():
    labels = np.zeros((10, 40, 40), dtype=np.uint8)
    assert not resample_labels(labels, (20, 50, 50), None, Resampling(order=1)).any()
    labels[4:6, 30:34, 8:12] = 2
    got = resample_labels(labels, (20, 80, 80), 0, Resampling(order=1))
    box = ndimage.find_objects(got)[1]
    assert box == (slice(8, 12), slice(60, 68), slice(16, 24))


def test_ct_normalisation_happens_after_crop_and_before_resampling(noise):
    padded = np.pad(noise, ((2, 1), (3, 0), (0, 4)))
    case = preprocess(_volume(padded, (2.0, 1.0, 1.0)), PLAN)
    expected = (np.clip(noise, -1000, 600) + 300) / 400
    expected = resample_image(expected, (28, 22, 19), None, PLAN.data_resampling)
    assert case.voxel_map.bbox == ((2, 16), (3, 25), (0, 19))
    assert case.voxel_map.shape_before_crop == padded.shape
    assert np.allclose(case.image[0], expected, atol=1e-5)


def test_2d_plan_keeps_the_spacing_between_slices(noise):
    plan = replace(PLAN, dim=2, spacing=(0.5, 0.5), patch_size=(8, 8))
    case = preprocess(_volume(noise, (5.0, 1.0, 1.0)), plan)
    assert case.image.shape == (1, 14, 44, 38) and case.spacing == (5.0, 0.5, 0.5)


def test_zscore_ignores_what_lies_outside_the_body():
    array = np.zeros((6, 8, 8))
    array[1:5, 1:7, 2] = array[1:5, 1:7, 6] = 100.0
    array[1:5, 2:5, 4] = 300.0
    plan = replace(PLAN, normalization_schemes=("ZScoreNormalization",), use_mask_for_norm=(True,))
    image = preprocess(_volume(array), plan).image[0]
    values = array[array != 0]
    assert np.allclose(image.max(), (300 - values.mean()) / values.std(), rtol=1e-5)
    assert image[0, 0, 1] == 0  # outside the body nothing is shifted


def test_simple_schemes():
    image = np.array([[-2.0, 0.0, 6.0]], dtype=np.float32)
    normalize(image, "RescaleTo01Normalization", None)
    normalize(image, "NoNormalization", None)
    assert np.allclose(image, [[0.0, 0.25, 1.0]])


def test_input_is_not_changed_and_several_channels_are_refused(noise):
    volume = _volume(noise)
    before = volume.array.copy()
    preprocess(volume, PLAN)
    assert np.array_equal(volume.array, before)
    schemes = ("NoNormalization",) * 2
    two = replace(PLAN, normalization_schemes=schemes, use_mask_for_norm=(False,) * 2, intensity=(None, None))
    with pytest.raises(InputError, match="expects 2 input channels"):
        preprocess(volume, two)
    with pytest.raises(InputError, match="every voxel is zero"):
        preprocess(_volume(np.zeros((3, 3, 3))), PLAN)
