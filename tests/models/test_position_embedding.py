"""Position embeddings tell places apart."""

from __future__ import annotations

import torch

from models.position_embedding import LesionPosition, sincos_2d

WIDTH = 16


def test_sincos_table_tells_every_place_apart():
    table = sincos_2d(28, 64)[0]
    assert table.shape == (64, 28, 28) and table.abs().max() <= 1 and torch.pdist(table.flatten(1).T).min() > 0.1
    assert torch.equal(table[:32], table[32:].transpose(1, 2)), "columns are coded as rows"
    assert torch.equal(table[:32, 2, 0], table[:32, 2, 5]), "the first half depends on the row alone"
    assert sincos_2d(5, 10).shape == (1, 10, 5, 5)  # 4 does not divide 10


def test_lesion_position_resolves_small_differences_and_ignores_absent_lesions():
    torch.manual_seed(0)
    embed = LesionPosition(WIDTH)
    square = torch.tensor([0.4, 0.6, 0.20, 1.0])
    wider = torch.tensor([0.4, 0.6, 0.21, 1.0])
    plain = torch.nn.Linear(4, WIDTH)
    fine = (embed(wider) - embed(square)).norm() / embed(square).norm()
    coarse = (plain(wider) - plain(square)).norm() / plain(square).norm()
    assert fine > 5 * coarse
    assert torch.equal(embed(torch.tensor([0.3, 0.9, 0.5, 0.0])), embed.project.bias)
