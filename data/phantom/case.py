"""Synthetic chest CT with tuberculosis-like findings: HU volumes and lesion masks from a seed.

Arrays have axes [Z, Y, X], +x the patient's left, +y posterior, +z superior.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.imaging.nifti import write_volume
from data.phantom.anatomy import build_chest, finish, sample_grid, sample_patient
from data.phantom.canvas import Grid
from data.phantom.finding import Finding
from data.phantom.lesions import add_finding


@dataclass(frozen=True)
class Phantom:
    """One synthetic patient.

    Findings have the sizes measured on ``mask``; ordered by the slice with most of the lesion, from the lowest.
    """

    hu: np.ndarray  # [Z, Y, X] float32
    mask: np.ndarray  # [Z, Y, X] uint8, index of the type in FINDING_TYPES
    spacing: tuple[float, float, float]  # (z, y, x) mm
    findings: list[Finding]
    lung_z: dict[str, tuple[float, float]]  # lowest and highest z of each lung, mm above the first slice


def make_case(seed: int | Sequence[int], wanted: Sequence[tuple[str, str, str]], grid: Grid | None = None) -> Phantom:
    """Build the patient of a seed with the wanted findings, each a (type, side, zone); without any, a healthy chest.

    Raises:
        InputError: the grid does not hold a chest.
        RuntimeError: the first finding fits nowhere. Further findings that fit nowhere are left out of the image
            and of ``findings``.
    """
    rng = np.random.default_rng(seed)
    grid = grid or sample_grid(rng)
    patient = sample_patient(rng, grid)
    chest = build_chest(grid, patient, rng)
    mask = np.zeros(grid.shape, np.uint8)
    found: list[tuple[int, Finding]] = []
    for index, (kind, side, zone) in enumerate(wanted):
        before = mask > 0
        finding = add_finding(chest, mask, kind, side, zone, rng)
        if finding is None and index == 0:
            raise RuntimeError(f"no place for a {kind} in the {side} {zone} zone (seed {seed}, grid {grid})")
        if finding is not None:
            found.append((int(((mask > 0) & ~before).sum((1, 2)).argmax()), finding))
    # Reports name findings in the order of their slices, not in the order of drawing.
    findings = [finding for _, finding in sorted(found, key=lambda pair: pair[0])]
    return Phantom(finish(chest.hu, patient.noise, rng), mask, grid.spacing, findings, chest.z_range)


def write_case(phantom: Phantom, image_path: Path, mask_path: Path) -> tuple[int, int]:
    """Write image (int16 HU) and mask (uint8); returns the CRC-32 of each file."""
    hu = np.clip(np.rint(phantom.hu), -1024, 3071).astype(np.int16)
    write_volume(image_path, hu, phantom.spacing)
    write_volume(mask_path, phantom.mask, phantom.spacing)
    return zlib.crc32(image_path.read_bytes()), zlib.crc32(mask_path.read_bytes())
