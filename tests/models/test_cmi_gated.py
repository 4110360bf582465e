"""Gated Cross-Mamba Interaction: against a plain loop, fully trained and saved, opened by the question alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cmi_gated import GatedCMI

WIDTH, STATE = 32, 4


def gated(seed: int = 0, **options: object) -> GatedCMI:
    """Out of its small start, so that a wrong sign would show."""
    torch.manual_seed(seed)
    model = GatedCMI(WIDTH, d_state=STATE, **options)
    with torch.no_grad():
        model.mixer.out_proj.weight.mul_(200)
        for norm in (model.visual_norm, model.text_norm):
            norm.weight.uniform_(0.5, 1.5)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens, question, mask; the last question is one word shorter."""
    generator = torch.Generator().manual_seed(1)
    visual, question = (torch.randn(2, n, WIDTH, generator=generator) for n in (9, 5))
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[-1, -1] = 0
    return visual, question, mask


def plain(model: GatedCMI, visual: Tensor, question: Tensor, mask: Tensor) -> Tensor:
    """The definition, one sample and token after the other."""
    w = {name: value.detach() for name, value in model.named_parameters()}
    rank = w["mixer.dt_proj.weight"].shape[1]

    def project(token: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        normed = token / (token.square().mean() + 1e-5).sqrt() * w[norm]
        return (w["mixer.in_proj.weight"] @ normed).chunk(2)

    outputs = []
    for sample in range(len(visual)):
        words = [question[sample, i] for i in range(question.shape[1]) if mask[sample, i]]
        opening = torch.stack([project(word, "text_norm.weight")[1] for word in words]).mean(0)
        xs, zs = zip(*(project(token, "visual_norm.weight") for token in visual[sample]), strict=True)
        state, rows = torch.zeros(WIDTH, STATE), []
        for t, token in enumerate(visual[sample]):
            taps = [xs[t - k] if t >= k else torch.zeros(WIDTH) for k in (3, 2, 1, 0)]
            conv = (torch.stack(taps, 1) * w["mixer.conv1d.weight"][:, 0]).sum(1) + w["mixer.conv1d.bias"]
            x = F.silu(conv)
            projected = w["mixer.x_proj.weight"] @ x
            delta = F.softplus(w["mixer.dt_proj.weight"] @ projected[:rank] + w["mixer.dt_proj.bias"])
            B, C = projected[rank : rank + STATE], projected[rank + STATE :]
            state = torch.exp(-delta[:, None] * w["mixer.A_log"].exp()) * state + delta[:, None] * B * x[:, None]
            y = (state @ C + w["mixer.D"] * x) * F.silu(zs[t] * opening)
            rows.append(token + w["mixer.out_proj.weight"] @ y)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def test_equals_the_plain_definition():
    model = gated()
    with torch.no_grad():
        output = model(*inputs())
    expected = plain(model, *inputs())
    assert (expected - inputs()[0]).abs().max() > 0.05, "the interaction is more than the residual"
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("compress_to", "tokens"), [(None, 9), (4, 4), (12, 9)])
def test_compresses_only_to_fewer(compress_to, tokens):
    assert gated(compress_to=compress_to)(*inputs()).shape == (2, tokens, WIDTH)


def test_every_parameter_is_saved_and_trained():
    model = gated()
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(*inputs()).pow(3).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_the_question_changes_its_own_sample_only_and_padding_nothing():
    model, (visual, question, mask) = gated(), inputs()
    other = question.clone()
    other[0] += torch.linspace(0, 1, WIDTH)
    longer = torch.cat([question, torch.full((2, 7, WIDTH), 3.0)], dim=1)
    with torch.no_grad():
        tokens = model(visual, question, mask)
        difference = (model(visual, other, mask) - tokens).abs().amax(-1)
        padded = model(visual, longer, F.pad(mask, (0, 7)))
    assert (difference[0] > 0).all() and (difference[1] == 0).all()
    torch.testing.assert_close(padded, tokens, rtol=1e-5, atol=1e-6)


def test_starts_near_the_tokens_of_stage_1():
    torch.manual_seed(0)
    visual = inputs()[0]
    with torch.no_grad():
        difference = GatedCMI(WIDTH)(*inputs()) - visual
    assert 0 < difference.std() < 0.05 * visual.std()
