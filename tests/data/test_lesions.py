"""Lesions of masks in mm: boxes of known size by hand, and phantoms whose side, zone and size are known."""

from __future__ import annotations

import numpy as np
import pytest

from config.errors import InputError
from data.findings import DESCRIPTORS, LABELS, LESION, Measurement
from data.lesions import LungBox, find_lungs, longest_axial_diameter, measure_lesions
from data.phantom.case import Phantom, make_case
from data.phantom.finding import FINDING_TYPES

NAMES = {value: name for value, name in enumerate(FINDING_TYPES) if value}
LUNGS = LungBox(middle_x=20.0, left=(0, 29), right=(0, 29), y=(0.0, 39.0), x=(0.0, 39.0))


def test_two_boxes_by_hand() -> None:
    mask = np.zeros((30, 40, 40), np.uint8)
    mask[2:4, 10:14, 30:33] = 1  # low, left
    mask[25, 5, 3:9] = 2  # high, right
    first, second = measure_lesions(mask, (5.0, 1.0, 2.0), LUNGS, {1: "nodule"})
    assert (first.finding, first.side, first.zone, second.finding) == ("nodule", "left", "lower", LESION)
    assert (second.side, second.zone) == ("right", "upper")
    known = {"thick_mm": pytest.approx(2 * 2 - np.sqrt(2)), "height_mm": 10.0}
    known |= {"level": pytest.approx(2.5 / 29), "across": pytest.approx(31 / 39), "depth": pytest.approx(11.5 / 39)}
    assert first.measured == Measurement(1, 24 * 10, None, 2.5, 11.5, 31.0, **known)
    # Corner to corner, centre to centre: 3 mm by 4 mm; plus one pixel, of which the sides are 1 and 2 mm.
    assert first.size_mm == pytest.approx(5 + np.sqrt(2))
    assert second.size_mm == pytest.approx(10 + np.sqrt(2))


def test_components_touch_at_corners_and_small_ones_can_be_left_out() -> None:
    mask = np.zeros((30, 40, 40), np.uint8)
    mask[10, 10, 10] = mask[11, 11, 11] = 1
    mask[10, 30, 30] = 1
    lesions = measure_lesions(mask, (1, 1, 1), LUNGS)
    assert [lesion.measured.volume_mm3 for lesion in lesions] == [2, 1]
    assert len(measure_lesions(mask, (1, 1, 1), LUNGS, min_volume_mm3=1.5)) == 1
    assert measure_lesions(np.zeros((3, 3, 3), np.int16), (1, 1, 1), LUNGS) == []


@pytest.mark.parametrize(
    "part", [(0, "lower"), (9, "lower"), (10, "middle"), (19, "middle"), (20, "upper"), (29, "upper")]
)
def test_zones_are_thirds_of_the_lung(part: tuple[int, str]) -> None:
    mask = np.zeros((30, 4, 40), np.uint8)
    mask[part[0], 2, 30] = 1
    assert measure_lesions(mask, (1, 1, 1), LUNGS)[0].zone == part[1]


def test_diameter_of_a_disc_and_of_a_line() -> None:
    y, x = np.mgrid[-40:41, -40:41]
    assert longest_axial_diameter((y**2 + x**2 <= 30**2)[None], (0.5, 0.5)) == pytest.approx(30.5, abs=0.01)
    line = np.zeros((1, 5, 200), bool)
    line[0, 2] = True
    assert longest_axial_diameter(line, (1.0, 1.0)) == pytest.approx(200)
    assert longest_axial_diameter(np.eye(100, dtype=bool)[None], (1.0, 1.0)) == pytest.approx(99 * np.sqrt(2) + 1)
    assert longest_axial_diameter(np.zeros((2, 3, 3), bool), (1.0, 1.0)) == 0


def ball(radius: float, spacing: tuple[float, float, float], centre: tuple[int, int, int]) -> np.ndarray:
    """(30, 60, 60) voxels within ``radius`` mm of ``centre``."""
    grid = np.meshgrid(*(np.arange(n, dtype=float) for n in (30, 60, 60)), indexing="ij")
    away = sum(((axis - at) * step) ** 2 for axis, at, step in zip(grid, centre, spacing, strict=True))
    return away <= radius**2


def test_a_ball_is_as_thick_as_wide_and_a_crust_is_not() -> None:
    spacing = (2.0, 1.0, 1.0)
    solid = ball(12, spacing, (15, 30, 30))
    [lesion] = measure_lesions(solid.astype(np.uint8), spacing, None)
    assert lesion.size_mm == pytest.approx(25) and lesion.measured.thick_mm == pytest.approx(25, abs=2)
    assert lesion.measured.height_mm == 26  # slices 9 to 21
    crust = solid & ~ball(8, spacing, (15, 30, 30))
    wall = measure_lesions(crust.astype(np.uint8), spacing, None)[0]
    assert wall.size_mm == pytest.approx(25) and wall.measured.thick_mm == pytest.approx(4, abs=1.2)
    one = np.zeros((3, 5, 5), np.uint8)
    one[1, 2, 2] = 1
    assert measure_lesions(one, (1.0, 1.0, 1.0), None)[0].measured.thick_mm == pytest.approx(1)


def test_densities_inside_and_around_a_lesion() -> None:
    """Percentiles of the lesion alone; the rim is two voxels in plane, without another lesion."""
    mask, hu = np.zeros((5, 40, 40), np.uint8), np.full((5, 40, 40), -800.0, np.float32)
    mask[2, 10:20, 10:20] = 1
    hu[2, 8:22, 8:22] = -500.0  # the rim, corners included
    hu[2, 10:20, 10:20] = np.linspace(-99, 0, 100).reshape(10, 10)
    hu[[1, 3]] = 1000.0
    lesion = measure_lesions(mask, (1.0, 1.0, 1.0), None, hu=hu)[0].measured
    assert lesion.mean_hu == pytest.approx(-49.5) and lesion.rim_hu == pytest.approx(-500)
    assert lesion.hu == pytest.approx((-99 + 4.95, -49.5, -4.95), abs=0.01)
    mask[2, 10:20, 20:25], hu[2, 10:20, 20:25] = 2, 300.0
    beside = measure_lesions(mask, (1.0, 1.0, 1.0), None, hu=hu)[0].measured
    assert beside.rim_hu == pytest.approx(-500) and beside.mean_hu == lesion.mean_hu
    edge = np.zeros((2, 6, 6), np.uint8)
    edge[0, :2] = 1
    assert np.isfinite(measure_lesions(edge, (1.0, 1.0, 1.0), None, hu=np.zeros((2, 6, 6)))[0].measured.rim_hu)


def test_place_is_a_fraction_of_the_lungs_box() -> None:
    lungs = LungBox(middle_x=20.0, left=(4, 24), right=(0, 30), y=(10, 30), x=(5, 35))
    mask = np.zeros((32, 40, 40), np.uint8)
    mask[14, 30, 35] = 1  # middle of the left lung, hindmost, leftmost
    mask[30, 10, 5] = 2  # top of the right lung, foremost, rightmost
    left, right = (lesion.measured for lesion in measure_lesions(mask, (1, 1, 1), lungs))
    assert (left.level, left.depth, left.across) == (0.5, 1.0, 1.0)
    assert (right.level, right.depth, right.across) == (1.0, 0.0, 0.0)
    nowhere = measure_lesions(mask, (1, 1, 1), None)[0]
    assert (nowhere.side, nowhere.zone, nowhere.measured.level, nowhere.measured.across) == (None,) * 4
    numbers = nowhere.descriptors()
    assert numbers[LABELS : LABELS + 3] == [0.0, 0.0, 0.0]
    assert len(numbers) == DESCRIPTORS and np.isfinite(numbers).all()


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    wanted = [
        [("nodule", "right", "upper")],
        [("calcification", "left", "lower")],
        [("consolidation", "left", "middle")],
        [("nodule", "left", "upper"), ("consolidation", "right", "lower")],
        [("cavity", "right", "middle"), ("nodule", "left", "lower")],
        [("consolidation", "right", "upper")],
    ]
    return [make_case([11, index], findings) for index, findings in enumerate(wanted)]


def test_lungs_of_phantoms_are_found(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        lungs = find_lungs(phantom.hu, phantom.spacing)
        assert abs(lungs.middle_x - phantom.hu.shape[2] / 2) * phantom.spacing[2] < 12
        for side in ("left", "right"):
            found = [z * phantom.spacing[0] for z in getattr(lungs, side)]
            assert found == pytest.approx(list(phantom.lung_z[side]), abs=2.1 * phantom.spacing[0])


def test_side_zone_and_size_of_phantoms(phantoms: list[Phantom]) -> None:
    for phantom in phantoms:
        lesions = measure_lesions(phantom.mask, phantom.spacing, find_lungs(phantom.hu, phantom.spacing), NAMES, 100)
        for finding in phantom.findings:
            largest = next(lesion for lesion in lesions if lesion.finding == finding.type)
            assert (largest.side, largest.zone) == (finding.side, finding.zone), finding
            # The report's size is that of the slice of largest area, the measure's the longest of all.
            assert -1 <= largest.size_mm - finding.size_mm <= 4, finding


def test_what_is_no_chest_and_no_mask_is_refused() -> None:
    with pytest.raises(InputError, match="no air inside the body"):
        find_lungs(np.zeros((5, 20, 20), np.float32), (5, 1, 1))
    small = np.full((5, 40, 40), 40.0)
    small[:, 10:14, 10:14] = -800
    with pytest.raises(InputError, match="ml of air in the"):
        find_lungs(small, (5, 1, 1))
    for mask in (np.zeros((3, 3), np.uint8), np.zeros((3, 3, 3))):
        with pytest.raises(InputError, match="3-D array of integers"):
            measure_lesions(mask, (1, 1, 1), LUNGS)
