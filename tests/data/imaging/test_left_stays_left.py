"""A lesion followed from the file to its place on the token grid, in each of the 48 ways to store a volume.

Its report names a side; the visual token that sees the lesion must lie on that side, whatever the file's order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config.nnunet_plans import PreprocessPlan
from data.cache import VolumeCache
from data.phantom.canvas import Grid
from data.phantom.case import Phantom, make_case
from data.phantom.report import write_report
from data.report_language.labeller import label_report
from data.view_selection import ViewSelection
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder
from tests.data.imaging.images import ORIENTATIONS, store_as

GRID = Grid((36, 96, 96), (8.0, 3.6, 3.6))
SIDE = 8  # of the token grid
LUNG_HU = -860
Network = tuple[NnUNetEncoder, PreprocessPlan]


@pytest.fixture(scope="module")
def case() -> Phantom:
    return make_case(5, [("consolidation", "left", "upper")], GRID)


@pytest.fixture(scope="module", params=["2d_plain", "3d_plain"])
def network(request, assets) -> Network:
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / request.param / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, output_stage=1, target_spatial=SIDE, planes=2).eval()
    plan = PreprocessPlan.from_nnunet(source.plans, source.configuration)
    coarse = (4.5, 4.5) if encoder.dim == 2 else (8.0, 4.5, 4.5)  # resampled, but to few voxels: 96 volumes are read
    return encoder, replace(plan, spacing=coarse)


@torch.no_grad()
def features(folder: Path, network: Network, hu: np.ndarray, mask: np.ndarray, axcodes: str) -> tuple:
    """Token grids [K, C, T, T] of a volume stored as ``axcodes``, and where its slices lie, 0 (feet) to 1."""
    encoder, plan = network
    store_as(folder / "image.nii", np.rint(hu).astype(np.int16), axcodes, GRID.spacing)
    store_as(folder / "mask.nii", (mask > 0).astype(np.uint8), axcodes, GRID.spacing)
    volume = VolumeCache(folder / "cache", plan).get(folder / "image.nii", folder / "mask.nii")
    if encoder.dim == 3:  # the whole volume: a patch cut around the lesion has it in the middle, on either side
        pairs = zip(volume.image.shape[1:], encoder.total_stride, strict=True)
        plan = replace(plan, patch_size=tuple(-(-extent // step) * step for extent, step in pairs))
    images, position, _ = ViewSelection(plan, encoder.total_stride, 2, "mask")(volume)
    inputs = torch.as_tensor(images) if encoder.dim == 2 else torch.as_tensor(images)[None]
    return encoder(inputs).reshape(2, -1, SIDE, SIDE).numpy(), position.tolist()


@pytest.fixture(scope="module")
def without_lesion(tmp_path_factory, network, case) -> np.ndarray:
    healthy = np.where(case.mask > 0, LUNG_HU, case.hu)
    return features(tmp_path_factory.mktemp("healthy"), network, healthy, case.mask, "LPS")[0]


@pytest.mark.parametrize("axcodes", ORIENTATIONS)
def test_the_token_of_the_lesion_lies_on_the_side_that_the_report_names(
    tmp_path, network, case, without_lesion, axcodes
):
    seen, position = features(tmp_path, network, case.hu, case.mask, axcodes)
    lit = ((seen - without_lesion) ** 2).sum(axis=(0, 1))
    row, column = np.unravel_index(lit.argmax(), lit.shape)
    # In LPS, columns run to the patient's left and rows to the back.
    z, y, x = (float(axis.mean()) / length for axis, length in zip(np.nonzero(case.mask), GRID.shape, strict=True))
    assert abs((column + 0.5) / SIDE - x) < 1.5 / SIDE and abs((row + 0.5) / SIDE - y) < 1.5 / SIDE
    assert min(abs(place - z) for place in position) < 0.25
    for language in ("zh", "en"):
        report = write_report(case.findings, np.random.default_rng(0), language)
        [finding] = [m for m in label_report(report) if m.section == "findings" and m.polarity == "present"]
        assert finding.side == ("left" if column >= SIDE / 2 else "right")
