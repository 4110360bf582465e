"""Cross-Mamba Interaction: against a plain loop, fully trained, and steered by the question and it alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cmi import CMI
from models.vim_mixer import STATE, STEP_SIZES

WIDTH = 32


def cmi(seed: int = 0, **options: object) -> CMI:
    torch.manual_seed(seed)
    return CMI(WIDTH, **options)


def inputs(batch: int = 2, tokens: int = 9, words: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Visual tokens, question, mask; the last question is one word shorter."""
    generator = torch.Generator().manual_seed(1)
    visual = torch.randn(batch, tokens, WIDTH, generator=generator)
    question = torch.randn(batch, words, WIDTH, generator=generator)
    mask = torch.ones(batch, words, dtype=torch.long)
    mask[-1, -1] = 0
    return visual, question, mask


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def plain(model: CMI, visual: Tensor, question: Tensor, mask: Tensor) -> Tensor:
    """The definition, one sample, channel and token after the other: h ← exp(ΔA)·h + Δ·B·x, y = C·h + D·x."""
    weights = {name: value.detach() for name, value in model.named_parameters()}
    rank = weights["dt_proj.weight"].shape[1]
    outputs = []
    for sample in range(len(visual)):
        words = [question[sample, i] for i in range(question.shape[1]) if mask[sample, i]]
        pooled = torch.stack([rms(word, weights["text_norm.weight"]) for word in words]).mean(0)
        projected = weights["text_proj.weight"] @ pooled
        delta = F.softplus(weights["dt_proj.weight"] @ projected[:rank] + weights["dt_proj.bias"])  # (E,)
        B, C = projected[rank : rank + STATE], projected[rank + STATE :]
        A = -weights["A_log"].exp()  # (E, N)
        state = torch.zeros(WIDTH, STATE)
        rows = []
        for token in visual[sample]:
            both = weights["in_proj.weight"] @ rms(token, weights["visual_norm.weight"])
            x, z = F.silu(both[:WIDTH]), both[WIDTH:]
            state = torch.exp(delta[:, None] * A) * state + delta[:, None] * B * x[:, None]
            y = (state @ C + weights["D"] * x) * F.silu(z)
            rows.append(token + weights["out_proj.weight"] @ y)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def loud(model: CMI) -> CMI:
    """Out of its small start, so that a wrong sign would show."""
    with torch.no_grad():
        model.out_proj.weight.mul_(50)
        model.text_proj.weight.mul_(5)
        for norm in (model.visual_norm, model.text_norm):
            norm.weight.uniform_(0.5, 1.5)
        model.D.uniform_(-1, 1)
    return model


def test_equals_the_plain_definition():
    """Token by token and word by word: padding is left out, and a token depends on those before it alone."""
    model = loud(cmi())
    with torch.no_grad():
        output = model(*inputs())
    expected = plain(model, *inputs())
    assert (expected - inputs()[0]).abs().max() > 0.05, "the interaction is more than the residual"
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("compress_to", "tokens"), [(None, 9), (4, 4), (9, 9), (12, 9), (100, 9), (1, 1)])
def test_compresses_only_to_fewer(compress_to, tokens):
    model = loud(cmi(compress_to=compress_to))
    with torch.no_grad():
        output = model(*inputs())
    assert output.shape == (2, tokens, WIDTH)
    expected = plain(model, *inputs())
    if tokens != 4:
        expected = expected if tokens == 9 else expected.mean(1, keepdim=True)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_saved_and_trained():
    model = cmi()
    assert {name for name, _ in model.named_parameters()} == set(model.state_dict())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(*inputs()).pow(3).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert (parameter.grad.flatten(1) if parameter.ndim > 1 else parameter.grad).abs().max() > 0, name
    optimizer.step()
    for name, value in model.state_dict().items():
        assert not torch.equal(value, before[name]), name


def test_gradient_flows_back_to_image_and_question():
    visual, question, mask = inputs()
    visual.requires_grad_(), question.requires_grad_()
    cmi()(visual, question, mask).pow(3).sum().backward()
    assert (visual.grad.abs().amax(-1) > 0).all()
    assert torch.equal(question.grad.abs().amax(-1) > 0, mask.bool()), "words, not padding"


def test_the_question_changes_every_token_of_its_own_sample_only():
    model, (visual, question, mask) = loud(cmi()), inputs()
    other = question.clone()
    other[0] += 1
    with torch.no_grad():
        difference = (model(visual, other, mask) - model(visual, question, mask)).abs().amax(-1)
    assert (difference[0] > 0).all() and (difference[1] == 0).all()


def test_starts_near_the_tokens_of_stage_1():
    visual, question, mask = inputs()
    with torch.no_grad():
        difference = cmi()(visual, question, mask) - visual
    assert 0 < difference.std() < 0.05 * visual.std()


def test_step_sizes_start_in_their_range():
    model = CMI(256)
    steps = F.softplus(model.dt_proj.bias.detach())
    assert steps.min() >= STEP_SIZES[0] * 0.999 and steps.max() <= STEP_SIZES[1] * 1.001
    assert math.log(steps.max() / steps.min()) > 2, "spread over the range"


def test_dynamics_are_not_decayed():
    free = {name for name, parameter in cmi().named_parameters() if getattr(parameter, "_no_weight_decay", False)}
    assert free == {"A_log", "D", "dt_proj.bias"}
