"""The findings head: padding has no influence, unknown targets count nowhere, it learns, and its probabilities hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data import finding_targets
from data.findings import DESCRIPTORS as DATA_DESCRIPTORS
from models import findings_head
from models.findings_head import DESCRIPTORS, TYPICAL_MM, UNKNOWN, FindingsHead, Found, findings_loss, known_targets

NAMES = ("nodule", "effusion")
B, L, D, M = 3, 5, 12, 4


@pytest.fixture
def head() -> FindingsHead:
    torch.manual_seed(0)
    return FindingsHead(NAMES, D, DESCRIPTORS, width=32)


def visual(cases: int = B) -> Tensor:
    return torch.randn(cases, L, D, generator=torch.Generator().manual_seed(1))


def lesions(real: int = 2, cases: int = B, most: int = M) -> Tensor:
    """(B, M, P), the first ``real`` of each case measured."""
    rows = torch.randn(cases, M, DESCRIPTORS, generator=torch.Generator().manual_seed(2))[:, :most]
    rows[..., -1] = 1
    rows[:, real:] = 0
    return rows


def unknown(cases: int = B) -> Found:
    """Targets that nothing is known of."""
    f, classes = len(NAMES), torch.full((cases, len(NAMES)), UNKNOWN)
    sizes, lesions = torch.full((cases, f), torch.nan), torch.full((cases, M), UNKNOWN)
    return Found(classes.clone(), classes.clone(), classes.clone(), sizes, lesions)


def test_data_and_models_agree_on_what_they_cannot_share() -> None:
    assert (DATA_DESCRIPTORS, finding_targets.UNKNOWN, finding_targets.TYPICAL_MM) == (DESCRIPTORS, UNKNOWN, TYPICAL_MM)
    assert (finding_targets.SIDES, finding_targets.LEVELS) == (findings_head.SIDES, findings_head.ZONES)
    assert finding_targets.Targets._fields == Found._fields[:-1]


def test_shapes_and_probabilities(head: FindingsHead) -> None:
    found = head(visual(), lesions())
    f = len(NAMES)
    assert [tuple(part.shape) for part in found] == [(B, f), (B, f, 3), (B, f, 3), (B, f), (B, M, f + 1), (B, M)]
    said = head.probabilities(found)
    assert ((said.presence > 0) & (said.presence < 1)).all() and (said.size > 0).all() and (said.lesion_size > 0).all()
    for part in (said.side, said.zone, said.lesion):
        torch.testing.assert_close(part.sum(-1), torch.ones(part.shape[:-1]))


def test_rows_without_a_lesion_have_no_influence(head: FindingsHead) -> None:
    short, long = head(visual(), lesions(most=2)), head(visual(), lesions(most=M))
    for a, b in zip(short[:4], long[:4], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(short.lesion, long.lesion[:, :2])
    without = head(visual(), lesions(real=0))
    assert all(part.isfinite().all() for part in without)
    assert not torch.allclose(without.presence, long.presence), "a measured lesion is seen by the findings"


def test_a_lesion_is_named_by_its_own_row_whatever_the_order(head: FindingsHead) -> None:
    rows = lesions(real=3)
    turned = rows[:, [2, 0, 1, 3]]
    torch.testing.assert_close(head(visual(), turned).lesion[:, :3], head(visual(), rows).lesion[:, [2, 0, 1]])


def test_every_parameter_gets_a_gradient(head: FindingsHead) -> None:
    target = unknown()
    target.presence[:], target.side[:], target.zone[:], target.size[:] = 1, 0, 2, 0.3
    target.lesion[:, :2] = 1
    findings_loss(head(visual(), lesions()), target).sum().backward()
    assert not [name for name, p in head.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_unknown_targets_count_nowhere(head: FindingsHead) -> None:
    found = head(visual(), lesions())
    nothing = findings_loss(found, unknown()).sum()
    assert known_targets(unknown()).tolist() == [0] * 5
    assert nothing == 0 and torch.autograd.grad(nothing, head.query, retain_graph=True)[0].abs().sum() == 0
    target = unknown()
    target.presence[0, 1] = 1
    loss = findings_loss(found, target).sum()
    assert known_targets(target).tolist() == [1, 0, 0, 0, 0]
    torch.testing.assert_close(loss, -F.logsigmoid(found.presence[0, 1]))
    gradient = torch.autograd.grad(loss, found.presence)[0]
    assert gradient.nonzero().tolist() == [[0, 1]]
    target.size[2, 0] = 1.0
    assert findings_loss(found, target).sum() > loss and known_targets(target)[3] == 1


def test_losses_equal_those_of_the_known_values_alone(head: FindingsHead) -> None:
    """The reference picks the known values first, which a GPU would have to be waited for."""
    found = head(visual(), lesions())
    target = unknown()
    target.presence[0, :2] = torch.tensor([1, 0])
    target.side[0, 0], target.zone[1, 1] = 2, 1
    target.size[0, 0] = 0.3
    target.lesion[0, :2] = torch.tensor([0, len(head.names)])

    def reference(name: str, loss: Callable[..., Tensor], **options: float) -> Tensor:
        said, truth = getattr(found, name), getattr(target, name)
        known = truth.isfinite() & (truth != UNKNOWN)
        truth = truth[known].float() if name == "presence" else truth[known]
        return loss(said[known], truth, reduction="sum", **options)

    expected = torch.stack(
        [
            reference("presence", F.binary_cross_entropy_with_logits),
            reference("side", F.cross_entropy),
            reference("zone", F.cross_entropy),
            reference("size", F.smooth_l1_loss, beta=0.1),
            reference("lesion", F.cross_entropy),
        ]
    )
    losses, parameters = findings_loss(found, target), list(head.parameters())
    assert (expected > 0).all()
    torch.testing.assert_close(losses, expected)
    gradients = (torch.autograd.grad(part.sum(), parameters, retain_graph=True) for part in (losses, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_planted_task_is_learnt(head: FindingsHead) -> None:
    """Presence stands in one visual token, side in another; a lesion's kind stands in its descriptors."""
    torch.manual_seed(3)
    cases = 64
    tokens, rows, target = 0.1 * torch.randn(cases, L, D), lesions(real=2, cases=cases), unknown(cases)
    present, side = torch.randint(0, 2, (cases, 2)), torch.randint(0, 2, (cases,))
    tokens[:, 0, :2] += 2 * present - 1
    tokens[:, 1, 2] += 2 * side - 1
    target.presence[:], target.side[:, 0] = present, side
    target.lesion[:, :2] = (rows[:, :2, 0] > 0).long() * 2  # a nodule, or false
    optimizer = torch.optim.AdamW(head.parameters(), 3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        (findings_loss(head(tokens, rows), target) / known_targets(target).clamp(min=1)).sum().backward()
        optimizer.step()
    found = head(tokens, rows)
    assert ((found.presence > 0) == present.bool()).float().mean() > 0.95
    assert (found.side[:, 0].argmax(-1) == side).float().mean() > 0.95
    assert (found.lesion[:, :2].argmax(-1) == target.lesion[:, :2]).float().mean() > 0.95


def test_a_lesion_has_the_size_of_its_kind(head: FindingsHead) -> None:
    """Twice as large for a nodule, half as large for an effusion; of a doubtful lesion the mean of both logarithms."""
    assert head(visual(), lesions()).lesion_size.abs().max() == 0, "as measured, before sizes are fitted"
    weights = torch.zeros(2, DESCRIPTORS)
    weights[:, -1] = torch.tensor([math.log(2), -math.log(2)])
    head.set_sizes(weights, head.size_range)
    for logits, factor in (
        ([9.0, -9.0, 0.0], 2.0),
        ([-9.0, 9.0, 0.0], 0.5),
        ([-9.0, 9.0, 40.0], 0.5),
        ([3.0] * 3, 1.0),
    ):
        torch.nn.init.zeros_(head.of_lesion.weight)
        head.of_lesion.bias.data[:-1] = torch.tensor(logits)
        said = head.probabilities(head(visual(), lesions()))
        torch.testing.assert_close(said.lesion_size[:, :2], torch.full((B, 2), factor))


def test_sizes_do_not_go_beyond_the_lesions_that_they_were_fitted_on(head: FindingsHead) -> None:
    """Metal: a density of ten times the densest one's."""
    head.of_lesion.bias.data.zero_()
    weights, span = torch.zeros(2, DESCRIPTORS), head.size_range.clone()
    weights[:, 4], span[:, 4] = 1.0, torch.tensor([-1.0, 0.5])
    head.set_sizes(weights, span)
    rows = torch.zeros(1, 3, DESCRIPTORS)
    rows[..., -1], rows[0, :, 4] = 1.0, torch.tensor([0.25, 5.0, -9.0])
    torch.testing.assert_close(head(visual()[:1], rows).lesion_size[0], torch.tensor([0.25, 0.5, -1.0]))


def test_calibration_lowers_the_loss_and_keeps_the_order(head: FindingsHead) -> None:
    """Logits four times too sure: the temperatures find the factor, and no ranking changes."""
    generator = torch.Generator().manual_seed(4)
    truth = torch.randn(400, len(NAMES), generator=generator)
    kinds = torch.randn(400, M, len(NAMES) + 1, generator=generator)
    target = unknown(400)
    target.presence[:] = torch.bernoulli(truth.sigmoid(), generator=generator)
    target.lesion[:] = torch.multinomial(kinds.softmax(-1).flatten(0, 1), 1, generator=generator).view(400, M)
    sizes = torch.zeros(400, len(NAMES)), torch.zeros(400, M)
    sides = torch.zeros(400, len(NAMES), 3)
    found = Found(4 * truth, sides, sides, sizes[0], 4 * kinds, sizes[1])

    def losses() -> tuple[float, float]:
        said = head.probabilities(found)
        presence = F.binary_cross_entropy(said.presence, target.presence.float()).item()
        return presence, F.nll_loss(said.lesion.log().flatten(0, 1), target.lesion.flatten()).item()

    before, order = losses(), head.probabilities(found).presence.flatten().argsort()
    head.calibrate(found, target)
    assert all(now < 0.9 * earlier for now, earlier in zip(losses(), before, strict=True))
    assert 3 < head.presence_temperature < 5.3 and 3 < head.lesion_temperature < 5.3
    assert torch.equal(head.probabilities(found).presence.flatten().argsort(), order)


def test_findings_that_are_mostly_measured_lesions_count_as_segmented(head: FindingsHead) -> None:
    target = unknown()
    target.presence[:] = torch.tensor([[1, 1], [1, 1], [1, 0]])
    target.lesion[0, 0] = target.lesion[1, 1] = 0
    target.lesion[1, 0] = 1
    head.calibrate(head(visual(), lesions()), target)
    assert head.segmented.tolist() == [True, False], "2 of 3 cases, and 1 of 2"


def test_what_is_not_known_on_validation_is_not_calibrated(head: FindingsHead) -> None:
    target = unknown()
    target.presence[:] = torch.tensor([[0, 1]])
    head.calibrate(head(visual(), lesions()), target)
    assert head.lesion_temperature == 1
