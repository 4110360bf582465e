"""The sliding window against the plain way: every tile in turn, and against what it must give where tiles agree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.nnunet.sliding_window import labels_of, sliding_window, tile_starts, tile_weight


@settings(deadline=None, max_examples=200)
@given(extent=st.integers(1, 300), patch=st.integers(1, 64))
def test_tiles_cover_everything_and_overlap_by_half(extent, patch):
    starts = tile_starts(extent, patch)
    assert starts[0] == 0 and (extent <= patch or starts[-1] == extent - patch)
    assert starts == sorted(set(starts)) or patch == 1
    assert all(b - a <= patch / 2 + 1 for a, b in itertools.pairwise(starts))


def test_starts_are_nnunets():
    assert tile_starts(160, 64) == [0, 32, 64, 96]
    assert tile_starts(64, 64) == [0] and tile_starts(65, 64) == [0, 1]
    assert tile_starts(512, 448) == [0, 64] and tile_starts(300, 64) == [0, 30, 59, 88, 118, 148, 177, 206, 236]


@pytest.mark.parametrize("patch", [(8, 12), (4, 8, 6)])
def test_weight_peaks_in_the_middle_and_is_nowhere_zero(patch):
    weight = tile_weight(patch)
    assert weight.shape == patch and weight.max() == 10 and weight.min() > 0
    assert np.unravel_index(int(weight.argmax()), patch) == tuple(size // 2 for size in patch)


def placed(x: Tensor) -> Tensor:
    """A network (B, C, *space) → (B, 2, *space) whose logits depend on where in the tile a voxel lies."""
    ramp = torch.linspace(-1, 1, x.shape[-1])
    return torch.cat([x + ramp, x * ramp], dim=1)


@pytest.mark.parametrize("space", [(8, 12), (21, 30), (5, 40), (3, 4)])
def test_equals_every_tile_in_turn(space):
    patch = (8, 12)
    images = torch.randn(2, 1, *space, generator=torch.Generator().manual_seed(1))
    image = images[1]
    sizes = [max(pair) for pair in zip(space, patch, strict=True)]
    before = [(size - extent) // 2 for size, extent in zip(sizes, space, strict=True)]
    padded = np.zeros((1, *sizes), np.float32)
    padded[:, before[0] : before[0] + space[0], before[1] : before[1] + space[1]] = image.numpy()
    total, sums, weight = np.zeros((2, *sizes)), np.zeros(sizes), tile_weight(patch).numpy()
    for row in tile_starts(sizes[0], 8):
        for column in tile_starts(sizes[1], 12):
            tile = torch.from_numpy(padded[None, :, row : row + 8, column : column + 12])
            total[:, row : row + 8, column : column + 12] += placed(tile)[0].numpy() * weight
            sums[row : row + 8, column : column + 12] += weight
    expected = (total / sums)[:, before[0] : before[0] + space[0], before[1] : before[1] + space[1]]
    got = sliding_window(placed, images, patch)
    assert got.shape == (2, 2, *space)
    np.testing.assert_allclose(got[1].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("space", "patch"), [((17, 40, 23), (8, 16, 12)), ((50, 20), (16, 16)), ((4, 5, 6), (8, 8, 8))]
)
def test_a_network_that_sees_no_context_is_applied_voxel_by_voxel(space, patch):
    images = torch.randn(3, 1, *space)
    got = sliding_window(lambda x: torch.cat([x, -2 * x], dim=1), images, patch)
    torch.testing.assert_close(got, torch.cat([images, -2 * images], dim=1), atol=1e-5, rtol=1e-5)


def test_labels():
    logits = torch.tensor([[[1.0, -1.0, 0.5, -2.0], [0.0, 2.0, 0.7, -1.0]]])
    assert labels_of(logits, regions=False).tolist() == [[0, 1, 1, 1]]
    assert labels_of(logits, regions=True).tolist() == [[1, 2, 2, 0]]
    assert labels_of(logits, regions=True).dtype == torch.uint8
