"""A place that is marked in the encoder's input is marked at the same place in the file, and the reverse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from config.nnunet_plans import PreprocessPlan
from data.cache import CachedVolume, VolumeCache
from data.imaging.reader import read_mask, read_volume, write_on_grid
from data.imaging.volume import Volume
from data.view_selection import ViewSelection
from engine.evaluation.heat_maps import ViewGrid, draw_heat
from models.nnunet.checkpoint import load_nnunet_checkpoint

SHAPE = (60, 66, 24)  # x, y, z where the file stores them in that order


def plan_of(assets: Path, kind: str, **changes: object) -> PreprocessPlan:
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / kind / "fold_0" / "checkpoint_best.pth")
    return replace(PreprocessPlan.from_nnunet(source.plans, source.configuration), **changes)


def write_marked(
    folder: Path, order: str, oblique: bool, marked: tuple[int, int, int]
) -> tuple[Path, Path, np.ndarray]:
    """A scan of noise with zeros around, and a bright 3 x 3 x 1 block; returns image, mask, the block in world mm."""
    rng = np.random.default_rng(0)
    array = rng.normal(-700, 30, SHAPE)
    array[:7] = array[:, :4] = array[:, :, :2] = 0  # what nnU-Net crops away
    mask = np.zeros(SHAPE, np.uint8)
    x, y, z = marked
    mask[x - 1 : x + 2, y - 1 : y + 2, z] = 1
    array[mask > 0] = 3000
    affine = np.diag([1.5, 1.2, 5.0, 1.0])
    affine[:3, 3] = (-40, 25, -300)
    if oblique:
        angle = 0.15
        turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        affine[:3, :3] = turn @ affine[:3, :3]
    world = apply_affine(affine, marked)
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(order))
    stored = affine @ inv_ornt_aff(turn, SHAPE)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "image.nii.gz", folder / "mask.nii.gz"
    for path, values in zip(paths, (array.astype(np.int16), mask), strict=True):
        nib.save(nib.Nifti1Image(nib.orientations.apply_orientation(values, turn), stored), path)
    return *paths, world


def centre_of_peak(path: Path) -> np.ndarray:
    """World mm of the centre of all voxels within a thousandth of the largest value."""
    image = nib.load(path)
    values = image.get_fdata()
    top = np.argwhere(values > 0.999 * values.max())
    return apply_affine(image.affine, top.mean(0))


@pytest.mark.parametrize("order", ["RAS", "LPS", "SAL", "PIR"])
@pytest.mark.parametrize("orientation", ["LPS", "RAS"])
@pytest.mark.parametrize("kind", ["2d_plain", "3d_plain", "3d_padded"])
def test_a_marked_voxel_lands_where_it_was(
    assets: Path, tmp_path: Path, kind: str, orientation: str, order: str
) -> None:
    """With as many cells as voxels the encoder's own input, taken as the map, must peak at the marked place."""
    marked = (41, 22, 15)
    image, mask, world = write_marked(tmp_path, order, order == "SAL", marked)
    spacing = (5.0, 1.0, 1.0)[-2 if kind == "2d_plain" else -3 :]
    patch = {"2d_plain": (96, 64), "3d_plain": (16, 48, 64), "3d_padded": (48, 96, 128)}[kind]
    plan = plan_of(assets, kind.replace("padded", "plain"), orientation=orientation, spacing=spacing, patch_size=patch)
    cached = VolumeCache(tmp_path / "cache", plan).get(image, mask)
    selection = ViewSelection(plan, (16, 16), 3 if kind == "2d_plain" else patch[0], "mask")
    images, *_ = selection(cached)
    shown = images[:, 0] if kind == "2d_plain" else images[0]
    grid = ViewGrid.of(selection, cached, tuple(shown.shape))
    heat = np.where(shown.numpy() > 0.5 * float(shown.max()), 1.0, 0.0)
    heat[np.unravel_index(int(shown.argmax()), shown.shape)] += 1e-6
    volume = read_volume(image)
    write_on_grid(tmp_path / "heat.nii.gz", grid.lay_over(heat).astype(np.float32), volume.path, volume.orientation)
    source, written = nib.load(image), nib.load(tmp_path / "heat.nii.gz")
    assert written.shape == source.shape
    np.testing.assert_allclose(written.affine, source.affine, atol=1e-4)
    assert written.header.get_sform(coded=True)[1] == 1
    distance = np.abs(apply_affine(np.linalg.inv(source.affine), centre_of_peak(tmp_path / "heat.nii.gz"))
                      - apply_affine(np.linalg.inv(source.affine), world))  # fmt: skip
    assert distance.max() <= 0.6, distance
    labels = read_mask(mask, volume)
    cells = grid.cells_of(labels > 0)
    assert 6 <= cells.sum() <= 20
    assert shown.numpy()[cells].mean() > 0.4 * float(shown.max())  # at its rim the block is blurred by resampling


@pytest.fixture
def scan(tmp_path: Path) -> tuple[Volume, np.ndarray]:
    """A marked scan and its labels."""
    image, mask, _ = write_marked(tmp_path, "LPS", False, (30, 40, 12))
    volume = read_volume(image)
    return volume, read_mask(mask, volume)


def cached_and_selection(
    volume: Volume, plan: PreprocessPlan, cells: int, policy: str, offset: tuple[float, ...] | None = None
) -> tuple[CachedVolume, ViewSelection]:
    """With the mask beside the scan; ``cells``: of the first axis, the slices in 2D."""
    folder, stride = volume.path.parent, (16,) * len(plan.patch_size)
    cached = VolumeCache(folder / "cache", plan).get(volume.path, folder / "mask.nii.gz")
    return cached, ViewSelection(plan, stride, cells, policy, receptive_field_offset=offset)


@pytest.mark.parametrize("kind", ["2d_plain", "3d_plain"])
def test_cells_of_a_coarse_grid_hold_their_voxels(assets: Path, scan: tuple[Volume, np.ndarray], kind: str) -> None:
    volume, labels = scan
    cached, selection = cached_and_selection(volume, plan_of(assets, kind), 2, "mask")
    grid = ViewGrid.of(selection, cached, (2, 4, 4))
    held = grid.cells_of(labels > 0)
    assert 1 <= held.sum() <= 4
    assert grid.lay_over(held.astype(float))[labels > 0].mean() > 0.5
    # What the model did not see has no value: a map of ones is one where it looked and zero elsewhere.
    seen = grid.lay_over(np.ones((2, 4, 4)))
    assert set(np.unique(np.round(seen, 5))) == {0.0, 1.0}
    if kind == "2d_plain":
        assert (seen.any((1, 2))).sum() == 2
    assert not grid.cells_of(np.zeros(labels.shape, bool)).any()


@pytest.mark.parametrize("offset", [(0.0, 0.0), (1.5, 0.5), (7.5, 7.5)])
def test_a_voxel_lies_in_the_cell_whose_receptive_field_is_nearest(
    assets: Path, scan: tuple[Volume, np.ndarray], offset: tuple[float, float]
) -> None:
    """With the scan's own voxels as the encoder's input, by distance to the centre of each receptive field."""
    volume, _ = scan
    plan = plan_of(assets, "2d_plain", spacing=volume.spacing[1:], patch_size=(96, 96))
    cached, selection = cached_and_selection(volume, plan, 1, "middle", offset)
    grid = ViewGrid.of(selection, cached, (1, 6, 6))
    (middle,) = np.flatnonzero(grid.lay_over(np.ones((1, 6, 6))).any((1, 2)))
    kept = np.array(cached.voxel_map.bbox)[1:].T  # without what nnU-Net crops away
    first = kept[0] + np.array(selection.box(cached)[0][1:])  # voxel of the scan at the input's corner
    for y, x in np.random.default_rng(0).integers(*kept, (40, 2)):
        one = np.zeros(volume.array.shape, bool)
        one[middle, y, x] = True
        (cell,) = np.argwhere(grid.cells_of(one))
        for at, origin, ahead, found in zip((y, x), first, offset, cell[1:], strict=True):
            centres = origin + 16 * np.arange(6) + 7.5 - ahead
            assert abs(centres[found] - at) == np.abs(centres - at).min()
    # Laid over the scan, the map of one feature is highest there.
    heat = np.zeros((1, 6, 6))
    heat[0, 2, 3] = 1
    peak = np.argwhere((over := grid.lay_over(heat)) == over.max()).mean(0)
    np.testing.assert_allclose(peak[1:], first + 16 * np.array([2, 3]) + 7.5 - offset, atol=0.5)


def test_of_a_thinned_volume_the_offset_is_in_planes_that_were_kept(
    assets: Path, scan: tuple[Volume, np.ndarray]
) -> None:
    """16 planes of a volume twice as deep in 4 cells: an offset of one plane is a quarter of a cell, two slices."""
    plan = plan_of(assets, "3d_plain", spacing=(3.5, 1.2, 1.5), patch_size=(16, 96, 96))
    counts = []
    for offset in (0.0, 1.0):
        cached, selection = cached_and_selection(scan[0], plan, 4, "uniform", (offset, 0.0, 0.0))
        cells = ViewGrid.of(selection, cached, (4, 4, 4)).cells[0]
        counts.append(np.bincount(cells[cells >= 0], minlength=4))
    assert cached.image.shape[1] > 2 * 14
    moved, (first, *_, last) = round(counts[1].sum() / 16), counts[0] - counts[1]
    assert moved >= 1 and abs(first - moved) <= 1 and abs(last + moved) <= 1


def test_padding_has_cells_but_no_voxels(assets: Path, scan: tuple[Volume, np.ndarray]) -> None:
    plan = plan_of(assets, "2d_plain", spacing=(2.0, 2.0), patch_size=(128, 128))
    cached, selection = cached_and_selection(scan[0], plan, 1, "mask")
    everything = ViewGrid.of(selection, cached, (1, 8, 8)).cells_of(np.ones(scan[0].array.shape, bool))
    assert everything[0, 3:5, 3:5].all() and not everything[0, 0].any() and not everything[0, :, 7].any()


def test_figure(scan: tuple[Volume, np.ndarray], tmp_path: Path) -> None:
    volume, labels = scan
    heat = np.zeros(volume.array.shape, np.float32)
    heat[3, 10:20, 10:20] = 1
    draw_heat(tmp_path / "a" / "b.png", volume, [heat, -heat], ["结节", "effusion"], labels)
    assert (tmp_path / "a" / "b.png").read_bytes()[:4] == b"\x89PNG"
