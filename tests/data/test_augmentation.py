"""Augmentation: RoIs move with the image, and a seed repeats it."""

from __future__ import annotations

import math

import pytest
import torch

from data.augmentation import Augmentation, rotated, shifted


def spot(row: int, column: int, shape: tuple[int, int] = (48, 64)) -> torch.Tensor:
    """(2, 1, H, W) with a bright square of 4 x 4 around a corner of voxels."""
    image = torch.zeros(2, 1, *shape)
    image[..., row - 2 : row + 2, column - 2 : column + 2] = 1
    return image


def centre_of(image: torch.Tensor) -> list[float]:
    """Centre of mass in fractions of the image."""
    mass = image / image.sum()
    return [float((mass.sum(1 - axis) * (torch.arange(n) + 0.5)).sum() / n) for axis, n in enumerate(image.shape)]


def test_shifted_moves_and_fills_with_zero():
    plane = torch.arange(12.0).reshape(1, 3, 4) + 1
    moved = shifted(plane, (1, -2))
    assert torch.equal(moved[0, 1:, :2], plane[0, :2, 2:])
    assert not moved[0, 0].any() and not moved[0, :, 2:].any()
    assert shifted(plane, (0, 0)) is plane
    assert not shifted(plane, (3, 0)).any()


def test_a_right_angle_is_torchs_own_rotation():
    image = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    # From the rows' axis (down) towards the columns' (right): what was below is now on the right.
    torch.testing.assert_close(rotated(image, math.pi / 2), torch.rot90(image, 1, (2, 3)), rtol=0, atol=1e-5)
    torch.testing.assert_close(rotated(image, 0.0), image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("change", [Augmentation(shift=6), Augmentation(rotate=15), Augmentation(shift=4, rotate=10)])
def test_rois_move_with_the_image(change, seed):
    roi = torch.tensor([[20 / 48, 40 / 64, 0.2, 1.0], [0.0, 0.0, 0.0, 0.0]])
    torch.manual_seed(seed)
    images, moved = change(spot(20, 40), roi)
    assert images.shape == (2, 1, 48, 64)
    assert moved[0, :2].tolist() == pytest.approx(centre_of(images[0, 0]), abs=0.01)
    assert moved[0, 2:].tolist() == roi[0, 2:].tolist(), "a RoI keeps its side"
    assert torch.equal(moved[1], roi[1]), "and where none is known none appears"


def test_all_slices_move_alike_and_a_seed_repeats_it():
    change = Augmentation(shift=5, rotate=10, noise=0.2)
    images, roi = torch.rand(3, 1, 20, 20), torch.rand(3, 4)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(change(images, roi))
    assert torch.equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])
    torch.manual_seed(0)
    same, _ = Augmentation(shift=5, rotate=10)(images[:1].expand(3, 1, 20, 20), roi)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])


def test_noise_has_at_most_its_deviation_and_none_is_none():
    images, roi = torch.zeros(1, 1, 64, 64), torch.zeros(1, 4)
    torch.manual_seed(0)
    deviations = [Augmentation(noise=0.3)(images, roi)[0].std().item() for _ in range(40)]
    assert max(deviations) < 0.31 and min(deviations) < 0.1 < max(deviations)
    assert Augmentation()(images, roi)[0] is images
