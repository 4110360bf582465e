"""The bridge: token budget, positions, scale at the start, and what each token may depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from config.errors import InputError
from models.vim_bridge import BridgeSpec, VimBridge, grid_side

CHANNELS, WIDTH, OUT = 12, 32, 48


def bridge(seed: int = 0, **options: object) -> VimBridge:
    torch.manual_seed(seed)
    values = {"width": WIDTH, "depth": 2, "grid": 8, "max_visual_tokens": 16, **options}
    return VimBridge(BridgeSpec(CHANNELS, OUT, **values))


def features(batch: int = 2, planes: int = 1, side: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(batch, planes, CHANNELS, side, side, generator=torch.Generator().manual_seed(seed))


def position(batch: int = 2, planes: int = 1) -> Tensor:
    return ((torch.arange(planes) + 0.5) / planes).expand(batch, planes)


# ---------------------------------------------------------------- the token budget


@pytest.mark.parametrize(
    ("budget", "planes", "available", "side"),
    [
        (64, 1, 28, 8),
        (96, 1, 28, 9),
        (32, 1, 28, 5),
        (1024, 1, 28, 28),
        (64, 1, 7, 7),
        (64, 4, 28, 4),
        (96, 4, 28, 4),
        (4, 4, 28, 1),
        (1, 1, 28, 1),
    ],
)
def test_grid_side(budget, planes, available, side):
    assert grid_side(budget, planes, available) == side


@pytest.mark.parametrize(
    ("planes", "budget", "tokens"), [(1, 16, 16), (1, 10, 9), (3, 16, 12), (3, 3, 3), (1, 999, 64)]
)
def test_shape_of_the_tokens(planes, budget, tokens):
    output = bridge(max_visual_tokens=budget)(features(planes=planes), position(planes=planes))
    assert output.shape == (2, tokens, OUT)


def test_tokens_keep_the_order_of_slices_and_rows():
    """Without blocks there is no mixing: token (plane, row, column) is its own features, projected."""
    model = bridge(depth=1, max_visual_tokens=48)
    torch.nn.init.zeros_(model.blocks[0].mixer.out_proj.weight)
    before = model(features(planes=3, side=4), position(planes=3))
    changed = features(planes=3, side=4)
    changed[:, 2, 0, 1, 3] += 1
    differs = (model(changed, position(planes=3)) - before).abs().amax(-1) > 1e-6
    assert differs.nonzero().tolist() == [[0, 2 * 16 + 1 * 4 + 3], [1, 2 * 16 + 1 * 4 + 3]]


# ---------------------------------------------------------------- positions


@pytest.mark.parametrize("corner", [(0, 0), (2, 3), (4, 4)])
def test_roi_crop_keeps_the_positions_it_was_cut_from(corner):
    """A bridge for the crop alone, with the crop's own positions, gives the same tokens."""
    whole, small = bridge(grid=8), bridge(grid=4)
    with torch.no_grad():
        for own, other in zip(small.parameters(), whole.parameters(), strict=True):
            if own.shape == other.shape:
                own.copy_(other)
        row, column = corner
        small.position.copy_(whole.position[..., row : row + 4, column : column + 4])
        cropped = features(side=4)
        tokens = whole(cropped, position(), corner)
        assert torch.equal(tokens, small(cropped, position()))
        if corner != (0, 0):
            assert not torch.allclose(tokens, whole(cropped, position()), atol=1e-4)


def test_place_of_the_slice_changes_the_tokens():
    model = bridge()
    low, high = model(features(), position() * 0.2), model(features(), position() * 1.8)
    assert (low - high).abs().max() > 1e-3


# ---------------------------------------------------------------- scale and dependence


@pytest.mark.parametrize("output_std", [0.02, 0.1])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_tokens_start_at_the_scale_of_the_embeddings(output_std, scale):
    """Whatever the scale of the features; one token for each feature, so that no averaging shrinks them."""
    tokens = bridge(output_std=output_std, max_visual_tokens=64)(scale * features(batch=4), position(batch=4))
    assert tokens.std().item() == pytest.approx(output_std, rel=0.1)
    assert tokens.mean().abs() < output_std / 5


def test_pooling_smooth_features_leaves_more_than_half_of_the_scale():
    smooth = torch.nn.functional.interpolate(features(side=4)[:, 0], size=(28, 28), mode="bilinear")[:, None]
    tokens = bridge(grid=28, max_visual_tokens=64)(smooth, position())
    assert 0.05 < tokens.std().item() < 0.11


def test_gradients_reach_every_parameter():
    model = bridge()
    model(features(planes=2), position(planes=2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    model = bridge()
    with torch.no_grad():
        together = model(features(batch=3, planes=2), position(batch=3, planes=2))
        for case in range(3):
            alone = model(features(batch=3, planes=2)[case : case + 1], position(batch=1, planes=2))
            torch.testing.assert_close(together[case : case + 1], alone, rtol=1e-4, atol=1e-6)


def test_every_token_may_depend_on_every_feature():
    """Bidirectional: the last feature reaches the first token, the first feature the last token."""
    model = bridge(grid=4)
    with torch.no_grad():
        tokens = model(features(side=4), position())
        for y, x in ((0, 0), (3, 3)):
            changed = features(side=4)
            changed[:, :, 0, y, x] += 5
            assert ((model(changed, position()) - tokens).abs().amax(-1) > 0).all()


def test_positions_norms_and_dynamics_are_not_decayed():
    model = bridge()
    free = {name for name, parameter in model.named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert "position" in free and all(f"blocks.{i}.mixer.A_log" in free for i in range(2))
    assert "out_proj.weight" not in free and "in_proj.weight" not in free
    assert not [name for name in model.state_dict() if name.startswith("local")], "no weights for absent lesion tokens"


# ---------------------------------------------------------------- tokens around lesions


def test_lesion_tokens_follow_the_overview_and_share_the_budget():
    model = bridge(max_visual_tokens=40, lesion_side=3)
    assert grid_side(40, 2, 8, 9) == 3
    tokens = model(features(planes=2), position(planes=2), roi=torch.tensor([0.2, 0.8, 0.1, 1.0]).expand(2, 2, 4))
    assert tokens.shape == (2, 2 * (9 + 9), OUT)
    with pytest.raises(InputError, match=r"slices 2 need: .* 9 around its lesion \(roi_side.*\); raise it to 20"):
        grid_side(19, 2, 8, 9)
    with pytest.raises(ValueError, match="roi"):
        model(features(planes=2), position(planes=2))


def without_mixing(**options: object) -> VimBridge:
    """A bridge whose blocks do nothing: every token is its own features, projected."""
    model = bridge(depth=1, **options)
    torch.nn.init.zeros_(model.blocks[0].mixer.out_proj.weight)
    return model


def test_another_place_changes_the_lesion_tokens_and_through_the_scans_the_overview():
    where = [torch.tensor([[[0.3, at, 0.4, 1.0]]]) for at in (0.3, 0.7)] + [torch.zeros(1, 1, 4)]
    model = without_mixing(max_visual_tokens=13, lesion_side=3)
    here, there, unknown = (model(features(1), position(1), roi=roi).detach() for roi in where)
    assert torch.equal(here[:, :4], there[:, :4]) and torch.equal(here[:, :4], unknown[:, :4])
    assert (here[:, 4:] - there[:, 4:]).abs().amax(-1).min() > 0
    assert (here[:, 4:] - unknown[:, 4:]).abs().amax(-1).min() > 0
    mixing = bridge(max_visual_tokens=13, lesion_side=3)
    here, there = (mixing(features(1), position(1), roi=roi).detach() for roi in where[:2])
    assert not torch.equal(here[:, :4], there[:, :4])


def test_the_region_around_a_lesion_has_the_same_extent_whatever_its_size():
    """3 × 3 features: one four rows from the core changes no lesion token."""
    model = without_mixing(max_visual_tokens=13, lesion_side=3, grid=16)
    torch.nn.init.zeros_(model.local.project.weight)
    roi = torch.tensor([[[8.5 / 16, 8.5 / 16, 0.1, 1.0]]])
    view, where = features(1, side=16), position(1)
    before = model(view, where, roi=roi)
    for row, changed in ((8, set(range(4, 13))), (12, set())):
        other = view.clone()
        other[0, 0, :, row, 8] += 1 + torch.arange(CHANNELS)
        differs = ((model(other, where, roi=roi) - before).abs().amax(-1)[0] > 1e-5).nonzero().flatten().tolist()
        assert {token for token in differs if token >= 4} == changed, row
    assert torch.equal(model(view, where, roi=roi * torch.tensor([1, 1, 6, 1])), before)


def test_cells_around_a_lesion_differ():
    """Also where the features are the same everywhere."""
    model = without_mixing(max_visual_tokens=13, lesion_side=3)
    torch.nn.init.zeros_(model.position)
    same = torch.ones(1, 1, CHANNELS, 8, 8) * torch.randn(CHANNELS, 1, 1)
    tokens = model(same, position(1), roi=torch.tensor([[[0.3, 0.5, 0.4, 1.0]]]))[0, 4:]
    assert torch.pdist(tokens).min() > 0.1 * tokens.norm(dim=-1).mean()


def test_every_case_and_slice_has_its_own_lesion():
    seen, where = features(2, planes=2), position(2, planes=2)
    roi = torch.rand(2, 2, 4, generator=torch.Generator().manual_seed(0))
    roi[..., 3] = 1
    other = roi.clone()
    other[0, 1, :2] = 1 - other[0, 1, :2]
    model = without_mixing(max_visual_tokens=26, lesion_side=3)
    changed = (model(seen, where, roi=other) - model(seen, where, roi=roi)).abs().sum(-1) > 0
    assert changed.nonzero().tolist() == [[0, token] for token in range(8 + 9, 8 + 18)]
