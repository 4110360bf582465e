"""The file's own axis order: what nnU-Net's SimpleITKIO reads, with sides that follow from the affine."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK

from config.nnunet_plans import PreprocessPlan
from data.cache import VolumeCache
from data.imaging.reader import read_mask, read_volume
from data.nnunet_preprocess import preprocess
from data.view_selection import ViewSelection
from engine.evaluation.heat_maps import ViewGrid
from tests.data.imaging.images import ORIENTATIONS, PLAN_2D, marked, store_as

FILE_ORDER = replace(PLAN_2D, orientation="file", patch_size=(8, 8))


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_the_file_order_is_that_of_simpleitk_and_a_mask_follows_its_image(tmp_path, axcodes):
    array = np.random.default_rng(0).integers(-1000, 400, (4, 5, 6)).astype(np.int16)
    store_as(tmp_path / "scan.nii.gz", array, axcodes)
    store_as(tmp_path / "mask.nii.gz", (array > 0).astype(np.uint8), "RAS")
    volume = read_volume(tmp_path / "scan.nii.gz", "file")
    stored = SimpleITK.ReadImage(tmp_path / "scan.nii.gz")
    assert np.array_equal(volume.array, SimpleITK.GetArrayFromImage(stored)) and volume.axcodes == axcodes
    assert volume.spacing == pytest.approx(stored.GetSpacing()[::-1])
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", volume), volume.array > 0)


@pytest.mark.parametrize("axcodes", ["LPS", "LPI", "RAI", "PIR", "ILA"])
def test_what_the_model_sees_in_file_order_lies_where_the_lesion_is(tmp_path, axcodes):
    store_as(tmp_path / "scan.nii.gz", marked(), axcodes)
    store_as(tmp_path / "mask.nii.gz", (marked() > 0).astype(np.uint8), axcodes)
    cached = VolumeCache(tmp_path / "cache", FILE_ORDER).get(tmp_path / "scan.nii.gz", tmp_path / "mask.nii.gz")
    expected = preprocess(read_volume(tmp_path / "scan.nii.gz", "file"), FILE_ORDER)
    assert np.array_equal(np.asarray(cached.image), expected.image) and cached.axcodes == axcodes
    framing = ViewSelection(FILE_ORDER, (1, 1), 1, "mask")
    position = float(framing.select(cached).slice_position)
    assert position > 0.5 if axcodes[2] in "SI" else position != 0.5, "0 is the lowest slice, whatever the order"
    grid = ViewGrid.of(framing, cached, (1, 8, 8))
    heat = grid.lay_over(grid.cells_of(marked() > 0).astype(np.float32))
    assert heat.shape == marked().shape and np.unravel_index(heat.argmax(), heat.shape) == (3, 4, 5)


def test_the_plan_and_so_the_cache_entry_changes_only_with_the_key(tmp_path, assets):
    plans = json.loads((assets / "nnunet_tiny" / "2d_plain" / "plans.json").read_text(encoding="utf-8"))
    store_as(tmp_path / "scan.nii.gz", marked(), "RAS")
    made = [PreprocessPlan.from_nnunet(plans, "2d", *key) for key in ((), ("canonical",), ("file",))]
    entries = [VolumeCache(tmp_path, plan).entry(tmp_path / "scan.nii.gz") for plan in made]
    assert entries[0] == entries[1] != entries[2]
    plans["image_reader_writer"] = "SimpleITKIOWithReorient"
    assert PreprocessPlan.from_nnunet(plans, "2d", "file").orientation == "RAS", "nnU-Net itself reorients"
