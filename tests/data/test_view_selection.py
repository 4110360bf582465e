"""What the encoder sees: which slices, which patch, and where the lesion lies in them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augmentation import Augmentation
from data.cache import CachedVolume
from data.lesions import Lesion, core_of, covering_slices, find_lesions, lesion_of_each
from data.view_selection import ROI_MARGIN, ViewSelection, centred, choose_slices
from tests.data.imaging.images import PLAN_2D

PLAN_3D = replace(PLAN_2D, configuration="3d_fullres", dim=3, spacing=(2.0, 1.0, 1.0), patch_size=(8, 16, 16))


class InMemory:
    """Has what a stored array has."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape = array, array.shape

    def planes(self, first: int, last: int) -> np.ndarray:
        return self.array[..., first:last, :, :]

    def plane(self, index: int) -> np.ndarray:
        return self.array[..., index, :, :]

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        return self.array


def cached(shape: tuple[int, int, int], lesion: tuple[slice, slice, slice] | None = None) -> CachedVolume:
    """Voxels that tell where they were: z·10⁴ + y·10² + x, and 1 more, so that padding's zero is none of them."""
    z, y, x = np.indices(shape)
    image = (1 + z * 10_000 + y * 100 + x).astype(np.float32)[None]
    if lesion is None:
        return CachedVolume(InMemory(image), None, (1.0, 1.0, 1.0), None)
    mask = np.zeros(shape, np.uint8)
    mask[lesion] = 1
    voxels, lesions = np.count_nonzero(mask, axis=(1, 2)), tuple(find_lesions(mask))
    return CachedVolume(InMemory(image), InMemory(mask), (1.0, 1.0, 1.0), None, voxels, lesions)


def depths(planes: torch.Tensor) -> list[int]:
    """z of every plane (K, 1, H, W), read from its largest voxel."""
    return [int((plane.max() - 1) // 10_000) for plane in planes]


# ---------------------------------------------------------------- which slices


@settings(deadline=None, max_examples=200)
@given(
    lesion=st.one_of(st.none(), st.lists(st.integers(0, 5), min_size=1, max_size=30)),
    depth=st.integers(1, 30),
    count=st.integers(1, 12),
)
def test_choose_slices_always(lesion, depth, count):
    voxels = np.zeros(depth) if lesion is None else np.array(lesion)
    depth = len(voxels)
    chosen = choose_slices(voxels, depth, count)
    assert len(chosen) == count
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] < depth
    assert len(set(chosen)) == min(count, depth), "no slice twice while there are others"
    if voxels.any():
        assert int(voxels.argmax()) in chosen
        # No slice is preferred to one with more lesion.
        assert sum(voxels[sorted(set(chosen))]) == sum(np.sort(voxels)[::-1][: min(count, depth)])


@pytest.mark.parametrize(
    ("lesion", "depth", "count", "expected"),
    [
        (None, 9, 1, [4]),
        (None, 9, 3, [3, 4, 5]),
        (None, 10, 2, [4, 5]),
        ([0] * 9, 9, 3, [3, 4, 5]),
        ([0, 0, 0, 0, 0, 0, 0, 7, 9], 9, 1, [8]),
        ([0, 0, 0, 0, 0, 0, 0, 7, 9], 9, 2, [7, 8]),
        ([0, 9, 0, 0, 0, 0, 0, 7, 0], 9, 3, [0, 1, 7]),
        ([0, 9, 0, 0, 0, 0, 0, 7, 0], 9, 2, [1, 7]),
        ([3, 3, 3], 3, 2, [0, 1]),
        (None, 2, 4, [0, 1, 1, 1]),
        (None, 1, 1, [0]),
    ],
)
def test_choose_slices_cases(lesion, depth, count, expected):
    assert choose_slices(np.zeros(depth) if lesion is None else np.array(lesion), depth, count) == expected


# ---------------------------------------------------------------- slices and patches

OFFSETS = (None, (3.0, 0.0, 0.0))


@settings(deadline=None, max_examples=50)
@given(extent=st.tuples(st.integers(1, 9), st.integers(1, 9)), size=st.tuples(st.integers(1, 9), st.integers(1, 9)))
def test_centred_pads_both_sides_alike_and_cuts_nothing(extent, size):
    plane = np.arange(1, 1 + 2 * extent[0] * extent[1]).reshape(2, *extent)
    padded = centred(plane, size)
    assert padded.shape == (2, *(max(pair) for pair in zip(extent, size, strict=True)))
    assert padded.dtype == np.float32
    before = [max(s - e, 0) // 2 for e, s in zip(extent, size, strict=True)]
    inner = padded[:, before[0] : before[0] + extent[0], before[1] : before[1] + extent[1]]
    assert np.array_equal(inner, plane)
    assert padded.sum() == plane.sum(), "the rest is zero"


@pytest.mark.parametrize(
    ("extent", "expected"),
    [((10, 11), (16, 24)), ((16, 24), (16, 24)), ((17, 20), (24, 24)), ((33, 25), (40, 32)), ((40, 32), (40, 32))],
)
def test_slice_has_the_patch_size_or_the_next_multiple_of_the_stride(extent, expected):
    images, *_ = ViewSelection(PLAN_2D, (8, 8), slices=2, policy="middle")(cached((5, *extent)))
    assert images.shape == (2, 1, *expected) and images.dtype == torch.float32
    assert int((images[0] != 0).sum()) == extent[0] * extent[1], "the whole slice is seen"


def test_policies_mask_and_nnunet_take_the_volumes_labels_and_middle_does_not():
    volume = cached((20, 8, 8), lesion=(slice(15, 17), slice(0, 3), slice(0, 3)))
    for policy, expected in {"mask": [15, 16], "nnunet": [15, 16], "middle": [9, 10]}.items():
        assert depths(ViewSelection(PLAN_2D, (8, 8), 2, policy)(volume)[0]) == expected
    assert depths(ViewSelection(PLAN_2D, (8, 8), 2, "mask")(cached((20, 8, 8)))[0]) == [9, 10]


@settings(deadline=None, max_examples=50)
@given(
    depth=st.integers(1, 20), slices=st.integers(1, 8), plan=st.sampled_from([PLAN_2D, PLAN_3D]), z=st.integers(0, 19)
)
def test_slice_position_lies_in_0_to_1_and_rises_with_z(depth, slices, plan, z):
    at = min(z, depth - 1)
    volume = cached((depth, 8, 8), lesion=(slice(at, at + 1), slice(0, 2), slice(0, 2)))
    images, position, _ = ViewSelection(plan, (4,) * plan.dim, slices, "mask")(volume)
    assert position.shape == (slices,) and position.dtype == torch.float32
    assert position.min() >= 0 and position.max() <= 1
    assert (position.diff() >= 0).all()
    if plan is PLAN_2D:
        assert torch.allclose(position, (torch.tensor(depths(images)) + 0.5) / depth)


def test_writing_to_a_sample_does_not_reach_the_cache():
    volume = cached((8, 16, 16))
    volume.image.array.flags.writeable = False
    for plan in (PLAN_2D, PLAN_3D):
        images, *_ = ViewSelection(plan, (8,) * plan.dim, 1, "middle")(volume)
        images += 1


@pytest.mark.parametrize("policy", ["mask", "nnunet"])
def test_patch_is_centred_on_the_lesion(policy):
    volume = cached((30, 40, 50), lesion=(slice(10, 14), slice(20, 24), slice(30, 34)))
    images, position, _ = ViewSelection(PLAN_3D, (4, 8, 8), slices=2, policy=policy)(volume)
    assert images.shape == (1, 8, 16, 16)
    assert np.array_equal(images[0], volume.image.array[0, 8:16, 14:30, 24:40])
    # Two planes stand for the patch's lower and upper half.
    assert torch.allclose(position, torch.tensor([10.0, 14.0]) / 30)


def test_patch_without_a_lesion_or_by_policy_is_the_middle():
    lesion = (slice(0, 2), slice(0, 2), slice(0, 2))
    for volume, policy in ((cached((30, 40, 50)), "mask"), (cached((30, 40, 50), lesion), "middle")):
        images, position, _ = ViewSelection(PLAN_3D, (4, 8, 8), slices=1, policy=policy)(volume)
        assert np.array_equal(images[0], volume.image.array[0, 11:19, 12:28, 17:33])
        assert position.item() == pytest.approx(0.5)


@pytest.mark.parametrize(("corner", "expected"), [((0, 0, 0), (0, 0, 0)), ((29, 39, 49), (22, 24, 34))])
def test_patch_is_clamped_to_the_volume(corner, expected):
    volume = cached((30, 40, 50), lesion=tuple(slice(c, c + 1) for c in corner))
    images, *_ = ViewSelection(PLAN_3D, (4, 8, 8), slices=1, policy="mask")(volume)
    window = tuple(slice(start, start + size) for start, size in zip(expected, PLAN_3D.patch_size, strict=True))
    assert np.array_equal(images[0], volume.image.array[0][window])


def test_volume_smaller_than_the_patch_is_padded_and_its_planes_keep_their_place():
    volume = cached((4, 10, 40))
    images, position, _ = ViewSelection(PLAN_3D, (4, 8, 8), slices=4, policy="middle")(volume)
    assert images.shape == (1, 8, 16, 16)
    assert np.array_equal(images[0, 2:6, 3:13], volume.image.array[0, :, :, 12:28])
    assert (images[0, :2] == 0).all() and (images[0, :, :3] == 0).all()
    # Patch planes 0-2, 2-4, 4-6, 6-8; the volume fills planes 2 to 6.
    assert torch.allclose(position, torch.tensor([0.0, 0.25, 0.75, 1.0]))


# ---------------------------------------------------------------- lesions


def two_lesions() -> np.ndarray:
    """A large one in slices 2 to 7, a small one in 9 and 10, and a single voxel that touches it at a corner."""
    mask = np.zeros((12, 20, 20), np.uint8)
    mask[2:8, 2:10, 2:9] = 1
    mask[4, 2:12, 2:9] = 1
    mask[9:11, 15:18, 14:18] = 2
    mask[11, 18, 18] = 3
    return mask


def test_lesions_are_what_touches_and_remember_their_slices():
    large, small = find_lesions(two_lesions())
    assert large.box == ((2, 8), (2, 12), (2, 9)) and large.areas == (56, 56, 70, 56, 56, 56)
    assert [large.core(2), large.core(4)] == [(5, 5), (6, 5)]
    assert [small.core(10), small.core(11)] == [(16, 15), (18, 18)]
    assert max(range(12), key=large.area) == 4 and large.voxels == 350 and large.area(1) == 0 and large.area(8) == 0
    assert small.box == ((9, 12), (15, 19), (14, 19)) and small.areas == (12, 12, 1)
    assert Lesion.from_list(small.to_list()) == small
    assert find_lesions(np.zeros((3, 4, 5), np.uint8)) == []
    assert find_lesions(two_lesions(), most=1) == [large]


def test_the_core_is_the_middle_or_the_nearest_to_it_inside():
    y, x = np.mgrid[:41, :41]
    distance = np.hypot(y - 20, x - 20)
    disc, ring = distance < 12, (distance < 12) & (distance > 8)
    assert core_of(disc) == core_of(ring) == (20, 20)
    sickle = (distance < 16) & (np.hypot(y - 20, x - 26) > 14)  # open towards larger x, thickest at the left
    row, column = core_of(sickle)
    assert sickle[row, column] and row == 20 and column < 12, "its middle of mass is none of it"
    assert core_of(np.zeros((4, 4), bool)) == (-1, -1)
    bow = np.zeros((9, 9), bool)
    bow[:, 0] = bow[0] = True
    assert bow[core_of(bow)]


@pytest.mark.parametrize(("axis", "gap", "count"), [(2, 2, 1), (2, 3, 2), (1, 2, 1), (1, 3, 2), (0, 1, 1), (0, 2, 2)])
def test_parts_with_a_small_gap_are_one_lesion(axis, gap, count):
    mask = np.zeros((12, 12, 12), np.uint8)
    for start in (2, 4 + gap):
        part = [slice(5, 7)] * 3
        part[axis] = slice(start, start + 2)
        mask[tuple(part)] = 1
    lesions = find_lesions(mask)
    assert len(lesions) == count and sum(lesion.voxels for lesion in lesions) == 16
    if (axis, count) == (0, 1):
        assert lesions[0].areas == (4, 4, 0, 4, 4) and lesions[0].cores[2] == (-1, -1), "the slice between has none"
        assert Lesion.from_list(lesions[0].to_list()) == lesions[0]
    assert lesions[0].box[axis] == ((2, 6 + gap) if count == 1 else (2, 4))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), density=st.sampled_from([0.002, 0.02, 0.2]))
def test_lesions_hold_every_voxel_and_covering_slices_show_the_most(seed, count, density):
    mask = (np.random.default_rng(seed).random((9, 12, 12)) < density).astype(np.uint8)
    lesions = find_lesions(mask, most=10_000)
    voxels = np.count_nonzero(mask, axis=(1, 2))
    assert [sum(lesion.area(z) for lesion in lesions) for z in range(9)] == voxels.tolist()
    assert [lesion.voxels for lesion in lesions] == sorted((lesion.voxels for lesion in lesions), reverse=True)
    for lesion in lesions:
        inner = mask[tuple(slice(*span) for span in lesion.box)]
        assert all(inner.take(end, axis).any() for axis in range(3) for end in (0, -1)), "the box is tight"
    chosen = covering_slices(lesions, voxels, count)
    assert len(set(chosen)) <= len(chosen) <= count and len(chosen) >= min(count, int((voxels > 0).sum()))
    assert all(voxels[z] > 0 for z in chosen)
    if count == 1 and lesions:
        assert chosen == [int(voxels.argmax())]
    if count > 1:
        assigned = lesion_of_each(lesions, [(z, z + 1) for z in chosen])
        assert sorted(map(id, filter(None, assigned))) == sorted(map(id, lesions[:count]))


def test_a_small_lesion_is_shown_before_a_large_one_a_second_time():
    mask = two_lesions()
    voxels = np.count_nonzero(mask, axis=(1, 2))
    assert choose_slices(voxels, 12, 2, find_lesions(mask)) == [4, 9]
    assert choose_slices(voxels, 12, 2) == [2, 4], "by area alone"
    assert choose_slices(voxels, 12, 1, find_lesions(mask)) == [4]
    assert choose_slices(voxels, 12, 4, find_lesions(mask)) == [2, 3, 4, 9]


def test_two_lesions_of_one_slice_have_a_slice_each():
    mask = np.zeros((9, 20, 20), np.uint8)
    mask[3:6, 1:9, 1:9] = 1
    mask[4, 1:10, 1:9] = 1
    mask[4:6, 12:15, 12:15] = 1
    lesions = find_lesions(mask)
    voxels = np.count_nonzero(mask, axis=(1, 2))
    assert choose_slices(voxels, 9, 1, lesions) == [4] and choose_slices(voxels, 9, 2, lesions) == [4, 5]
    assert lesion_of_each(lesions, [(4, 5), (5, 6)]) == lesions
    assert lesion_of_each(lesions, [(4, 5)]) == lesions[:1]
    assert lesion_of_each(lesions, [(2, 3), (3, 4), (4, 5), (5, 6)]) == [None, None, *lesions]
    assert lesion_of_each([], [(0, 3)]) == [None]


@pytest.mark.parametrize(
    ("large", "count", "expected"), [(slice(3, 6), 2, [3, 4]), (slice(4, 5), 3, [3, 4, 4])], ids=["two slices", "one"]
)
def test_a_small_lesion_in_the_best_slice_of_a_large_one_is_shown(large, count, expected):
    """The large one is shown a little smaller, or the slice is there twice."""
    mask = np.zeros((9, 30, 30), np.uint8)
    mask[large, 1:9, 1:9] = 1
    mask[4, 1:10, 1:9] = mask[4, 15:18, 15:18] = 1
    lesions = find_lesions(mask)
    chosen = choose_slices(np.count_nonzero(mask, axis=(1, 2)), 9, count, lesions)
    assigned = [lesion for lesion in lesion_of_each(lesions, [(z, z + 1) for z in chosen]) if lesion]
    assert chosen == expected and sorted(map(id, assigned)) == sorted(map(id, lesions))


# ---------------------------------------------------------------- policies and the region of interest


@pytest.mark.parametrize(
    ("depth", "slices", "expected"), [(12, 3, [2, 6, 10]), (5, 5, [0, 1, 2, 3, 4]), (2, 4, [0, 0, 1, 1])]
)
def test_uniform_slices_are_spread_over_the_scan(depth, slices, expected):
    lesion = (slice(0, 1), slice(0, 2), slice(0, 2))
    volume = cached((depth, 8, 8), lesion)
    assert depths(ViewSelection(PLAN_2D, (8, 8), slices, "uniform")(volume)[0]) == expected


def test_uniform_patch_reaches_from_the_lowest_to_the_highest_plane():
    images, position, _ = ViewSelection(PLAN_3D, (4, 8, 8), slices=4, policy="uniform")(cached((80, 16, 16)))
    assert depths(images.transpose(0, 1)) == [5, 15, 25, 35, 45, 55, 65, 75]
    assert torch.allclose(position, torch.tensor([0.125, 0.375, 0.625, 0.875]))
    flat, _, _ = ViewSelection(PLAN_3D, (4, 8, 8), slices=4, policy="uniform")(cached((8, 16, 16)))
    assert depths(flat.transpose(0, 1)) == list(range(8)), "not deeper than the patch: as it is"


def test_roi_is_the_square_around_the_lesion_in_fractions_of_the_padded_image():
    volume = cached((20, 12, 20), lesion=(slice(10, 12), slice(2, 6), slice(11, 13)))
    images, _, roi = ViewSelection(PLAN_2D, (8, 8), 3, "mask")(volume)
    assert images.shape[-2:] == (16, 24)  # 2 voxels of padding on each side
    core = (3 + 0.5 + 2) / 16, (11 + 0.5 + 2) / 24
    square = torch.tensor([*core, 4 / 16 * (1 + 2 * ROI_MARGIN), 1])
    assert roi.shape == (3, 4) and torch.allclose(roi[1], square), roi
    assert (roi[0] == 0).all(), "the slice beside the lesion shows none"
    assert (roi[2] == 0).all(), "another slice shows this lesion as well"
    assert (ViewSelection(PLAN_2D, (8, 8), 3, "mask")(cached((20, 12, 20))).roi == 0).all()


def test_roi_of_a_patch_is_that_of_its_planes():
    volume = cached((30, 40, 50), lesion=(slice(10, 12), slice(20, 24), slice(30, 34)))
    _, _, roi = ViewSelection(PLAN_3D, (4, 8, 8), slices=4, policy="mask")(volume)  # z 7 to 15, y 14 to 30, x 24 to 40
    assert roi[:, 3].tolist() == [0, 1, 0, 0]
    core = (21 + 0.5 - 14) / 16, (31 + 0.5 - 24) / 16
    assert torch.allclose(roi[1], torch.tensor([*core, 4 / 16 * (1 + 2 * ROI_MARGIN), 1]))


@pytest.mark.parametrize("seed", range(5))
def test_roi_moves_with_the_image(seed):
    volume = cached((5, 32, 32), lesion=(slice(2, 3), slice(10, 13), slice(12, 19)))
    volume.image.array[:] = 0
    volume.image.array[0, 2, 10:13, 12:19] = 1
    torch.manual_seed(seed)
    images, _, roi = ViewSelection(PLAN_2D, (8, 8), 1, "mask", Augmentation(shift=5))(volume)
    rows, columns = np.nonzero(images[0, 0].numpy())
    centre = [(rows.min() + rows.max() + 1) / 2 / 32, (columns.min() + columns.max() + 1) / 2 / 32]
    assert roi[0, :2].tolist() == pytest.approx(centre)


def test_lesions_are_placed_at_the_features_that_see_them_best():
    """With a receptive-field offset the first feature sees the border before its cell better than the middle."""
    volume = cached((20, 12, 20), lesion=(slice(10, 12), slice(2, 6), slice(11, 13)))
    plain, ahead = (ViewSelection(PLAN_2D, (8, 8), 3, "mask", None, offset) for offset in (None, (3.5, 1.5)))
    assert torch.equal(plain.select(volume).roi, ahead.select(volume).roi), "of the image"
    by = ahead(volume).roi - plain(volume).roi
    assert torch.allclose(by[1], torch.tensor([3.5 / 16, 1.5 / 24, 0, 0])) and (by[[0, 2]] == 0).all()


def test_a_plane_shows_what_its_features_see_best():
    """Features that look three planes before the middle of theirs show a lesion that begins before it."""
    volume = cached((8, 16, 16), lesion=(slice(0, 1), slice(4, 8), slice(4, 8)))
    plain, ahead = (ViewSelection(PLAN_3D, (4, 8, 8), 2, "mask", None, offset)(volume) for offset in OFFSETS)
    assert plain.roi[:, 3].tolist() == [1, 0] == ahead.roi[:, 3].tolist()
    volume = cached((8, 16, 16), lesion=(slice(2, 4), slice(4, 8), slice(4, 8)))
    plain, ahead = (ViewSelection(PLAN_3D, (4, 8, 8), 2, "mask", None, offset)(volume) for offset in OFFSETS)
    assert plain.roi[:, 3].tolist() == [1, 0] and ahead.roi[:, 3].tolist() == [0, 1]
    assert torch.equal(plain.slice_position, ahead.slice_position)
