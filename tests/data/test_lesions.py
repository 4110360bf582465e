"""Lesions of masks in mm: boxes of known size by hand, and phantoms whose side, zone and size are known."""

from __future__ import annotations

import numpy as np
import pytest

from config.errors import InputError
from data.findings import LESION, Measurement
from data.lesions import LungBox, find_lungs, longest_axial_diameter, measure_lesions
from data.phantom.case import Phantom, make_case
from data.phantom.finding import FINDING_TYPES

NAMES = {value: name for value, name in enumerate(FINDING_TYPES) if value}
LUNGS = LungBox(middle_x=20.0, left=(0, 29), right=(0, 29))


def test_two_boxes_by_hand() -> None:
    mask = np.zeros((30, 40, 40), np.uint8)
    mask[2:4, 10:14, 30:33] = 1  # low, left
    mask[25, 5, 3:9] = 2  # high, right
    first, second = measure_lesions(mask, (5.0, 1.0, 2.0), LUNGS, {1: "nodule"})
    assert (first.finding, first.side, first.zone, second.finding) == ("nodule", "left", "lower", LESION)
    assert (second.side, second.zone) == ("right", "upper")
    known = {"thick_mm": pytest.approx(2 * 2 - np.sqrt(2)), "height_mm": 10.0}
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
