"""Stage 1's objectives: what their minima are, and that the contrastive one sees what it should."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.medical_vlm import VisionBridge
from models.objectives import Align, ProxyL2, Stage1

WIDTH, STD = 16, 0.1


def unit_reports(count: int = 4) -> Tensor:
    return torch.linalg.qr(torch.randn(WIDTH, count, generator=torch.Generator().manual_seed(0))).Q.T.contiguous()


def tokens_at(directions: Tensor, tokens: int = 6, noise: float = STD, seed: int = 1) -> Tensor:
    """(B, L, D) whose means point at ``directions``, with a healthy deviation between them."""
    spread = torch.randn(len(directions), tokens, WIDTH, generator=torch.Generator().manual_seed(seed)) * noise
    return directions[:, None] + spread - spread.mean(1, keepdim=True)


def align(reports: Tensor, group: list[int] | None = None, **options: float) -> Align:
    return Align(reports, torch.tensor(group or list(range(len(reports)))), STD, **options)


# ---------------------------------------------------------------- proxy_l2


def test_proxy_loss_is_least_at_zero_output():
    """What the manual's proxy rewards: the reason for the warning that goes with it."""
    row, tokens = torch.arange(4), torch.randn(4, 6, WIDTH, requires_grad=True)
    losses = [ProxyL2()(tokens * scale, row).item() for scale in (0.0, 1e-3, 0.1, 1.0)]
    assert losses[0] == 0 and losses == sorted(losses)
    ProxyL2()(tokens, row).backward()
    assert torch.allclose(tokens.grad, 2 * tokens.detach() / tokens.numel()), "straight towards zero"


# ---------------------------------------------------------------- align


def test_loss_is_low_for_tokens_at_their_own_report_and_high_for_anothers():
    reports, row = unit_reports(), torch.arange(4)
    objective = align(reports)
    own = objective(tokens_at(reports), row)
    none = objective(tokens_at(unit_reports(8)[4:]), row)
    other = objective(tokens_at(reports[[1, 2, 3, 0]]), row)
    assert own < 0.05 < none < other
    row = torch.tensor([2, 0])  # says which report belongs to an image
    assert objective(tokens_at(reports[row]), row) < 0.05
    assert objective(tokens_at(reports[row]), row.flip(0)) > 5


def test_in_evaluation_the_loss_of_an_image_does_not_depend_on_its_batch():
    reports, row = unit_reports(), torch.arange(4)
    objective, tokens = align(reports), tokens_at(unit_reports(8)[4:, :] + unit_reports(8)[:4])
    together = objective(tokens, row)
    objective.eval()
    alone = [objective(tokens[k : k + 1], row[k : k + 1]) for k in range(4)]
    torch.testing.assert_close(objective(tokens, row), torch.stack(alone).mean())
    assert not torch.isclose(objective(tokens, row), together)


def test_training_the_tokens_lowers_the_loss():
    reports, row = unit_reports(), torch.arange(4)
    objective = align(reports)
    tokens = nn.Parameter(0.01 * torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(2)))
    optimizer = torch.optim.Adam([tokens], lr=0.02)
    losses = []
    for _ in range(60):
        losses.append(objective(tokens, row))
        optimizer.zero_grad()
        losses[-1].backward()
        assert tokens.grad.isfinite().all()
        optimizer.step()
    assert losses[-1] < 0.1 < 1 < losses[0]
    nearest = (F.normalize(tokens.mean(1), dim=-1) @ reports.T).argmax(1)
    assert torch.equal(nearest, row)
    assert tokens.std() > STD / 2, "no collapse on the way"


def test_equal_reports_are_no_negatives_of_each_other():
    """Two patients with one text: tokens at that text are right for both, and nothing pushes them off."""
    reports, row = unit_reports()[[0, 0, 1, 2]], torch.arange(4)
    objective = align(reports, [0, 0, 1, 2], variance_weight=0.0)
    tokens = tokens_at(reports).requires_grad_()
    loss = objective(tokens, row)
    loss.backward()
    assert tokens.grad.abs().max() < 1e-4
    assert loss.item() == pytest.approx(0.0, abs=1e-3)
    # Exchanging the two is no mistake, exchanging two others is.
    assert objective(tokens_at(reports[[1, 0, 2, 3]]), row).item() == pytest.approx(loss.item(), abs=1e-4)
    assert objective(tokens_at(reports[[0, 1, 3, 2]]), row) > 5


def test_a_batch_of_one_works_and_uses_all_reports_as_negatives():
    reports = unit_reports()
    objective = align(reports, variance_weight=0.0)
    right = objective(tokens_at(reports[1:2]), torch.tensor([1]))
    wrong = objective(tokens_at(reports[2:3]), torch.tensor([1]))
    assert right < 0.05 and wrong > 5


@torch.no_grad()
def test_variance_term_acts_on_collapsed_tokens_and_leaves_healthy_ones_alone():
    reports, row = unit_reports(), torch.arange(4)
    with_term, without = align(reports), align(reports, variance_weight=0.0)
    healthy = tokens_at(reports, noise=3 * STD)
    collapsed = tokens_at(1e-6 * reports, noise=1e-6)
    assert (with_term(healthy, row) - without(healthy, row)).abs() < 0.05
    assert with_term(collapsed, row) - without(collapsed, row) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("scale", [0, 1, 1e4])
@pytest.mark.parametrize(("batch", "count"), [(4, 6), (1, 1)])
def test_gradients_stay_finite_at_collapse_and_for_a_single_token(scale, batch, count):
    objective, tokens = align(unit_reports()), torch.full((batch, count, WIDTH), float(scale), requires_grad=True)
    loss = objective(tokens, torch.arange(batch))
    loss.backward()
    assert loss.isfinite() and tokens.grad.isfinite().all() and objective.log_scale.grad.isfinite()


def test_half_precision_tokens_are_scored_in_single_precision():
    reports, row = unit_reports(), torch.arange(4)
    loss = align(reports)(tokens_at(reports).bfloat16(), row)
    assert loss.dtype == torch.float32 and loss < 0.1


def test_scale_is_trained_but_capped_and_reports_are_no_parameters():
    objective = align(unit_reports())
    assert [name for name, _ in objective.named_parameters()] == ["log_scale"]
    assert set(objective.state_dict()) == {"log_scale"}
    row, tokens = torch.arange(4), tokens_at(unit_reports()[[1, 2, 3, 0]])
    with torch.no_grad():
        losses = []
        for value in (100.0, 1000.0):
            objective.log_scale.fill_(math.log(value))
            losses.append(objective(tokens, row))
    assert losses[0] == losses[1]


def test_stage1_passes_images_positions_and_rows():
    class Vision(nn.Module):
        head, read = None, VisionBridge.read

        def features(self, images: Tensor) -> Tensor:
            return images

        def visual_tokens(self, features: Tensor, slice_position: Tensor, roi: Tensor) -> Tensor:
            return features + slice_position[:, :, None] + roi

    batch = {"images": torch.ones(2, 3, 4), "slice_position": torch.ones(2, 3), "roi": torch.ones(2, 3, 4)}
    stage = Stage1(Vision(), ProxyL2())
    tokens, found = stage.vision.read(batch)
    assert torch.equal(tokens, torch.full((2, 3, 4), 3.0)) and found is None
    assert stage({**batch, "row": torch.arange(2)}).tolist() == [2 * 9, *[0] * 5], "a sum over two cases"
    assert stage({**batch, "row": torch.tensor([0, -1])}).tolist() == [9, *[0] * 5], "one of them counts nowhere"
    for objective in (stage.objective, align(unit_reports())):
        stage.objective = objective
        assert stage({**batch, "row": torch.tensor([-1, -1])}).tolist() == [0] * 6, "none of them counts"
