"""The verdict "collapsed": on tokens that say something about the image, and on all the ways to say nothing."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch import Tensor

from engine.training.diagnostics import MAX_TOKENS, TokenStatistics, token_statistics

IMAGES, TOKENS, WIDTH, STD = 8, 9, 32, 0.1


def healthy(images: int = IMAGES, seed: int = 0, scale: float = STD) -> Tensor:
    return scale * torch.randn(images, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def judged(tokens: Tensor) -> TokenStatistics:
    statistics = token_statistics(tokens, STD)
    assert statistics.to_dict()["collapsed"] is statistics.collapsed
    assert ("COLLAPSED" in statistics.line()) is statistics.collapsed
    return statistics


def test_healthy_tokens():
    statistics = judged(healthy())
    assert not statistics.collapsed
    assert statistics.token_std == pytest.approx(STD, rel=0.1)
    assert statistics.image_std == pytest.approx(STD, rel=0.1)
    assert statistics.effective_rank > 20


def test_the_tokens_of_a_validation_are_judged_in_a_second():
    """4096 tokens of Mamba-2.8B's width, in CPU time: two cores share it."""
    tokens = torch.randn(64, 64, 2560, generator=torch.Generator().manual_seed(3))
    started = time.process_time()
    assert token_statistics(tokens, 1.0).effective_rank > 500
    assert time.process_time() - started < 8  # singular values take more than a minute


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_healthy_tokens_may_grow_and_shrink(scale):
    assert not judged(healthy(scale=scale * STD)).collapsed


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_constant_tokens(value):
    statistics = judged(torch.full((IMAGES, TOKENS, WIDTH), value))
    assert statistics.collapsed
    assert statistics.token_std == statistics.image_std == pytest.approx(0, abs=1e-12)


def test_near_zero_tokens_though_they_point_everywhere():
    statistics = judged(healthy(scale=STD / 100))
    assert statistics.collapsed and statistics.effective_rank > 20


def test_tokens_along_one_direction():
    strength = torch.randn(IMAGES, TOKENS, 1, generator=torch.Generator().manual_seed(1))
    statistics = judged(strength * torch.ones(WIDTH) * STD)
    assert statistics.collapsed and statistics.token_std > STD / 2
    assert statistics.effective_rank == pytest.approx(1, abs=0.01)


def test_tokens_that_are_the_same_for_every_image():
    """Positions alone: they differ from each other, in many directions, and tell nothing about the patient."""
    statistics = judged(healthy(images=1).expand(IMAGES, -1, -1))
    assert statistics.collapsed
    assert statistics.image_std == pytest.approx(0, abs=1e-12)
    assert statistics.token_std > STD / 2 and statistics.effective_rank > 5


def test_positions_on_top_of_content_are_fine():
    assert not judged(healthy(images=1, seed=1) + healthy(scale=STD / 3)).collapsed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_non_finite_tokens_are_collapsed_and_raise_nothing(value, everywhere):
    tokens = healthy()
    tokens[(...) if everywhere else (0, 0, 0)] = value
    statistics = judged(tokens)
    assert statistics.collapsed
    json.dumps(statistics.to_dict())


def test_one_image_is_judged_by_its_tokens_alone():
    assert not judged(healthy(images=1)).collapsed
    assert judged(torch.zeros(1, TOKENS, WIDTH)).collapsed


def test_a_single_token_says_nothing():
    assert judged(healthy()[:1, :1]).collapsed


def test_effective_rank_counts_equal_directions():
    """k orthogonal directions of equal strength, centred: k."""
    directions = torch.linalg.qr(torch.randn(WIDTH, 6, generator=torch.Generator().manual_seed(2))).Q.T
    tokens = torch.cat([directions, -directions])[None]
    assert token_statistics(tokens, STD).effective_rank == pytest.approx(6, rel=1e-6)


def test_effective_rank_is_that_of_the_singular_values():
    for tokens in (healthy(), healthy(images=1), healthy().flatten(0, 1)[None, :, :5]):
        flat = tokens.double().flatten(0, 1)
        singular = torch.linalg.svdvals(flat - flat.mean(0))
        expected = float(torch.special.entr(singular / singular.sum()).sum().exp())
        assert token_statistics(tokens, STD).effective_rank == pytest.approx(expected, rel=1e-6)


def test_many_tokens_are_sampled_evenly():
    images = MAX_TOKENS // TOKENS + 50
    tokens = torch.cat([torch.zeros(images // 2, TOKENS, WIDTH), healthy(images - images // 2)])
    statistics = judged(tokens)
    # Half zero, half STD: a sample of the first half alone would be all zero.
    assert statistics.token_std == pytest.approx(STD / math.sqrt(2), rel=0.05)


def test_half_precision_and_gradients_are_no_hindrance():
    assert not judged(healthy().bfloat16().requires_grad_()).collapsed
