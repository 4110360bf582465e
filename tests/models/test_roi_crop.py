"""The central crop and where it was taken."""

from __future__ import annotations

import pytest
import torch

from config.errors import InputError
from models.roi_crop import center_crop


@pytest.mark.parametrize(("height", "width", "side"), [(28, 28, 7), (28, 28, 14), (9, 12, 4), (5, 5, 5), (6, 6, 1)])
def test_crop_is_central_and_its_corner_true(height, width, side):
    features = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    cropped, (row, column) = center_crop(features, side)
    assert cropped.shape == (2, 3, side, side)
    assert torch.equal(cropped, features[:, :, row : row + side, column : column + side])
    # As much is cut on one side as on the other, up to one feature.
    assert 0 <= (height - side - row) - row <= 1 and 0 <= (width - side - column) - column <= 1


def test_manual_default_takes_seven_of_twenty_eight():
    _, corner = center_crop(torch.zeros(1, 1, 28, 28), 7)
    assert corner == (10, 10)


@pytest.mark.parametrize("side", [0, -1, 8, 100])
def test_sides_that_do_not_fit_are_refused(side):
    with pytest.raises(InputError, match=f"roi_side is {side}, but the feature map is 7 x 9; choose 1 to 7"):
        center_crop(torch.zeros(1, 2, 7, 9), side)


def test_gradient_flows_into_the_crop_alone():
    features = torch.zeros(1, 1, 4, 4, requires_grad=True)
    center_crop(features, 2)[0].sum().backward()
    assert features.grad.sum() == 4 and features.grad[0, 0, 1:3, 1:3].min() == 1
