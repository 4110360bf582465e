"""Plausibility of headers and voxels: what is reported for a wrong image, and nothing for a real chest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.checks.image_checks import check_header, check_volume
from data.imaging.reader import read_header, read_volume
from data.imaging.volume import ImageHeader, Volume
from data.phantom.canvas import Grid
from data.phantom.case import make_case

GRID = Grid((40, 96, 96), (8.0, 3.6, 3.6))


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    """(z, y, x) HU of a healthy phantom."""
    return make_case(3, [], GRID).hu


def reported(volume: Volume) -> str:
    return " | ".join(f"{problem.level}: {problem}" for problem in check_volume(volume))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda hu: hu, ""),
        (lambda hu: np.clip(hu + 1024, 0, None), "error: values run from 0 to"),
        (lambda hu: np.clip(hu + 1024, 0, None), "intercept (-1024) is missing"),
        (lambda hu: np.clip((hu + 1350) / 1500, 0, 1), "scaled to 0 to 1"),
        (lambda hu: np.rint(np.clip((hu + 1350) / 1500, 0, 1) * 255), "8-bit image"),
        (lambda hu: np.clip(hu + 1000, 0, None) / 4, "no CT (MR or PET?)"),
        (lambda hu: 3.0 * (hu > -500), "2 whole numbers, a label map and no CT"),
        (lambda hu: 256.0 * np.digitize(hu, [-900, -500, 0, 100]), "5 whole numbers, a label map"),
        (lambda hu: (hu + 300) / 400, "normalised, not HU"),
        (lambda hu: hu / 5 - 50, "hardly any air"),
        (lambda hu: hu - 1024, "hardly any soft tissue"),
        (lambda hu: np.where(np.indices(hu.shape)[2] < 10, -3024, hu), "note: 10 % of the voxels are padding (lowest"),
        (lambda hu: hu[:, ::-1], "warning: the spine lies in front"),
        (lambda hu: hu[::-1, ::-1], "warning: the spine lies in front"),
        (lambda hu: hu[:, :, ::-1], ""),  # mirrored sides do not show in the voxels, and are not guessed
        (lambda hu: hu[20:], "lungs go on beyond the lower end"),
        (lambda hu: hu[14:20], "beyond the lower and the upper end"),
        (lambda hu: np.where(hu < -500, 0, hu) - 1000 * (np.indices(hu.shape)[1] < 12), "0.00 litres of air inside"),
    ],
)
def test_values(chest, change, expected):
    hu, (z, y, x) = change(chest).astype(np.float32), GRID.spacing
    found = reported(Volume(hu, GRID.spacing, np.diag([-x, -y, z, 1.0]), "LPS", Path("scan"), "LPS"))
    assert expected in found if expected else found == ""


def test_real_scans_pass_and_their_mirror_images_do_not(shared):
    for name in ("CIP_ct-64.nii.gz", "LungDx-A0001.nii.gz"):
        volume = read_volume(shared / "ct" / name)
        assert check_volume(volume) == []
        assert "spine" in reported(replace(volume, array=np.ascontiguousarray(volume.array[:, ::-1])))


@pytest.mark.parametrize(
    ("shape", "zooms", "turn", "expected"),
    [
        ((512, 512, 300), (0.7, 0.7, 1.0), 0, ""),
        ((512, 512, 300), (0.7, 0.7, 1.0), 5, ""),
        ((512, 512, 60), (0.7, 0.7, 1.0), 0, "60 mm long"),
        ((512, 512, 900), (0.7, 0.7, 1.0), 0, "more than a chest"),
        ((512, 512, 300), (0.2, 0.2, 1.0), 0, "pixels are 0.2"),
        ((512, 512, 300), (0.2, 0.2, 1.0), 0, "field of view is 102 x 102"),
        ((512, 512, 20), (0.7, 0.7, 15.0), 0, "15 mm apart"),
        ((512, 512, 300), (0.7, 0.7, 1.0), 25, "oblique by 25 degrees"),
    ],
)
def test_headers(shape, zooms, turn, expected):
    """(i, j, k) in LPS order, turned about x by ``turn`` degrees."""
    angle = np.radians(turn)
    turned = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag([-zooms[0], -zooms[1], zooms[2]])
    header = ImageHeader(Path("scan"), shape, np.dtype(np.int16), affine, np.array(zooms))
    found = " | ".join(map(str, check_header(header)))
    assert expected in found if expected else found == ""


def test_conflicting_directions_of_the_file_are_among_them(shared):
    found = check_header(read_header(shared / "nifti" / "12_q_s_conflict_LRflip.nii.gz"))
    assert any("check left and right" in str(problem) for problem in found)
