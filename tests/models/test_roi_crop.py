"""The central crop and where it was taken; the square around a lesion."""

from __future__ import annotations

import itertools

import pytest
import torch

from config.errors import InputError
from models.roi_crop import center_crop, sample_roi


@pytest.mark.parametrize(("height", "width", "side"), [(28, 28, 7), (28, 28, 14), (9, 12, 4), (5, 5, 5), (6, 6, 1)])
def test_crop_is_central_and_its_corner_true(height, width, side):
    features = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    cropped, (row, column) = center_crop(features, side)
    assert cropped.shape == (2, 3, side, side)
    assert torch.equal(cropped, features[:, :, row : row + side, column : column + side])
    # As much is cut on one side as on the other, up to one feature.
    assert 0 <= (height - side - row) - row <= 1 and 0 <= (width - side - column) - column <= 1


@pytest.mark.parametrize("side", [0, -1, 8, 100])
def test_sides_that_do_not_fit_are_refused(side):
    with pytest.raises(InputError, match=f"roi_side is {side}, but the feature map is 7 x 9; choose 1 to 7"):
        center_crop(torch.zeros(1, 2, 7, 9), side)


def test_gradient_flows_into_the_crop_alone():
    features = torch.zeros(1, 1, 4, 4, requires_grad=True)
    center_crop(features, 2)[0].sum().backward()
    assert features.grad.sum() == 4 and features.grad[0, 0, 1:3, 1:3].min() == 1


# ---------------------------------------------------------------- around a lesion


def plainly(features: torch.Tensor, square: list[float], side: int) -> torch.Tensor:
    """:func:`sample_roi` of one map (C, H, W), point by point."""
    extents = features.shape[-2:]
    starts, steps = [], []
    for centre, extent in zip(square[:2], extents, strict=True):
        length = min(side / extent, 1)
        middle = min(max(centre, length / 2), 1 - length / 2)
        starts.append(middle - length / 2)
        steps.append(length / side)
    cells = torch.zeros(len(features), side, side)
    for i, j, a, b in itertools.product(range(side), range(side), (0.25, 0.75), (0.25, 0.75)):
        row = (starts[0] + (i + a) * steps[0]) * extents[0] - 0.5
        column = (starts[1] + (j + b) * steps[1]) * extents[1] - 0.5
        cells[:, i, j] += bilinear(features, row, column) / 4
    return cells


def bilinear(features: torch.Tensor, row: float, column: float) -> torch.Tensor:
    height, width = features.shape[-2:]
    row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
    top, left = min(int(row), height - 2), min(int(column), width - 2)
    v, u = row - top, column - left
    upper = (1 - u) * features[:, top, left] + u * features[:, top, left + 1]
    lower = (1 - u) * features[:, top + 1, left] + u * features[:, top + 1, left + 1]
    return (1 - v) * upper + v * lower


@pytest.mark.parametrize("square", [[0.5, 0.5, 0.6, 1], [0.1, 0.9, 0.5, 1], [0.3, 0.4, 0.01, 1], [0.37, 0.61, 0.43, 1]])
@pytest.mark.parametrize("side", [1, 3, 4])
def test_sampled_square_equals_the_plain_way(square, side):
    features = torch.randn(2, 5, 8, 11, generator=torch.Generator().manual_seed(side))
    squares = torch.tensor([square, [0.5, 0.5, 1, 1]])
    got = sample_roi(features, squares, side)
    assert got.shape == (2, 5, side, side)
    for case in range(2):
        expected = plainly(features[case], squares[case].tolist(), side)
        torch.testing.assert_close(got[case], expected, atol=1e-5, rtol=1e-5)


def test_squares_of_one_map_are_those_of_copies_of_it():
    features = torch.randn(1, 3, 8, 11, requires_grad=True)
    squares = torch.rand(5, 4)
    squares[:, 3] = 1
    shared, copied = sample_roi(features, squares, 3), sample_roi(features.expand(5, -1, -1, -1), squares, 3)
    torch.testing.assert_close(shared, copied, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(shared)
    gradients = [torch.autograd.grad((cells * weight).sum(), features)[0] for cells in (shared, copied)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_what_is_seen_has_one_scale_and_without_a_lesion_lies_in_the_middle():
    features = torch.randn(1, 3, 8, 8)
    tiny, huge, nowhere = (
        sample_roi(features, torch.tensor([square]), 4)
        for square in ([0.5, 0.5, 0.0, 1.0], [0.5, 0.5, 0.9, 1.0], [0.1, 0.9, 0.7, 0.0])
    )
    assert torch.equal(tiny, huge) and torch.equal(tiny, nowhere)


def test_gradient_reaches_the_features_of_the_square_alone():
    features = torch.zeros(1, 1, 16, 16, requires_grad=True)
    sample_roi(features, torch.tensor([[0.25, 0.75, 0.25, 1.0]]), 4).sum().backward()
    rows, columns = torch.nonzero(features.grad[0, 0], as_tuple=True)
    assert 1 <= rows.min() <= 2 and 5 <= rows.max() <= 6 and 9 <= columns.min() <= 10 and 13 <= columns.max() <= 14
    assert features.grad.sum().item() == pytest.approx(16)
