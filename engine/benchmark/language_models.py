"""The calls that the suites time and weigh: reading a prompt, a training step of Stage 2, the bridge."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from engine.benchmark.peak_memory import Peak, measure_peak
from engine.benchmark.random_lm import our_lm, random_mamba
from engine.benchmark.rivals import attention_decoder, use_mambapy
from engine.benchmark.sizes import Size
from models.language_model.mamba_lm import IGNORED, LARGE_MODEL, MambaLM
from models.vim_bridge import VimBridge

FEATURE_CHANNELS = 512  # of stage 4 of nnU-Net's default 2-D plan
WARM_TOKENS = 8


def prompt(size: Size, tokens: int, device: torch.device) -> Tensor:
    """Embeddings (1, L, D) in the model's dtype."""
    generator = torch.Generator().manual_seed(tokens)
    return (0.1 * torch.randn(1, tokens, size.width, generator=generator)).to(device, size.dtype)


@torch.no_grad()
def our_prefill(lm: MambaLM, embeds: Tensor) -> Tensor:
    """The first token's logits (1, V); the cache, which generation goes on from, is made as well."""
    last, _ = lm.prefill(embeds)
    return lm.model.lm_head(last.to(embeds.dtype))


@torch.no_grad()
def rival_prefill(model: PreTrainedModel, embeds: Tensor) -> Tensor:
    """The same by transformers' own forward, which makes the last position's logits alone as ``generate`` does."""
    return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits[:, -1]


def product_operations(size: Size, tokens: int, layers: int) -> float:
    """Floating-point operations of all matrix products of a forward pass over ``tokens``, without the head."""
    D, E = size.width, size.inner
    weights = D * 2 * E + E * (size.rank + 2 * size.state) + size.rank * E + E * D
    return 2.0 * tokens * weights * layers


def product_shapes(size: Size, tokens: int) -> list[tuple[int, int, int]]:
    """The two products that are nearly all of it: into and out of the inner width."""
    return [(tokens, size.width, 2 * size.inner), (tokens, size.inner, size.width)]


class Stage2Step:
    """A step of Stage 2 from the encoder's features on: bridge, frozen language model, loss, gradients, AdamW.

    ``language_model`` takes embeddings (1, L, D) and labels (1, L) to the mean loss.
    """

    def __init__(
        self, size: Size, visual: int, others: int, device: torch.device, embed: Callable[[Tensor], Tensor]
    ) -> None:
        torch.manual_seed(0)
        self.bridge, self.features, self.position = bridge_and_features(size, visual, device)
        self.optimizer = torch.optim.AdamW(self.bridge.parameters(), lr=1e-5)
        ids = torch.randint(1, size.tokens, (1, others), device=device)
        self.text = embed(ids)
        question = visual + others // 8
        self.labels = torch.cat([torch.full((1, visual), IGNORED, device=device), ids], 1)
        self.labels[:, :question] = IGNORED
        self.dtype = size.dtype

    def __call__(self, language_model: Callable[[Tensor, Tensor], Tensor]) -> float:
        visual = self.bridge(self.features, self.position)
        loss = language_model(torch.cat([visual.to(self.dtype), self.text], 1), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def our_loss(lm: MambaLM) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(embeds: Tensor, labels: Tensor) -> Tensor:
        total, count = lm.answer_loss(embeds, labels)
        return total / count

    return loss


def rival_loss(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda embeds, labels: model(inputs_embeds=embeds, labels=labels, use_cache=False).loss


def recomputes(size: Size) -> bool:
    """Whether training keeps only the blocks' inputs at this size (also where fewer layers are measured)."""
    return product_operations(size, 1, size.layers) / 2 + size.vocabulary * size.width > LARGE_MODEL


def bridge_and_features(size: Size, tokens: int, device: torch.device) -> tuple[VimBridge, Tensor, Tensor]:
    """A bridge that gives ``tokens`` tokens, features (1, K, C, T, T) and slice positions (1, K) for it.

    ``tokens`` must be K squares, K counting how often the usual number of a slice is in it.
    """
    planes = max(1, tokens // size.scaling[2])
    side = math.isqrt(tokens // planes)
    if planes * side * side != tokens:
        raise ValueError(f"{tokens} tokens are not {planes} squares")
    bridge = VimBridge(FEATURE_CHANNELS, size.width, grid=side, max_visual_tokens=tokens).to(device)
    features = torch.randn(1, planes, FEATURE_CHANNELS, side, side, device=device)
    return bridge, features, torch.linspace(0, 1, planes, device=device)[None]


# ------------------------------------------------------------------ peaks of memory, each for a process of its own


def prefill_peak(who: str, size: Size, layers: int, tokens: int, device: str) -> Peak:
    """Reading a prompt that exists; ``who`` is ours, transformers, mambapy or attention."""
    place = torch.device(device)
    model = attention_decoder(size, layers, place) if who == "attention" else random_mamba(size, place, layers)
    if who == "mambapy":
        use_mambapy(model)
    read: Callable[..., Tensor] = our_prefill if who == "ours" else rival_prefill
    reader: nn.Module = our_lm(model, size) if who == "ours" else model
    read(reader, prompt(size, WARM_TOKENS, place))
    embeds = prompt(size, tokens, place)
    return measure_peak(lambda: read(reader, embeds), place)


def bridge_peak(size: Size, tokens: int, device: str) -> Peak:
    place = torch.device(device)
    call = bridge_call(size, size.scaling[0], place)
    call()
    return measure_peak(bridge_call(size, tokens, place), place)


def bridge_call(size: Size, tokens: int, device: torch.device) -> Callable[[], Tensor]:
    bridge, features, position = bridge_and_features(size, tokens, device)

    @torch.no_grad()
    def call() -> Tensor:
        return bridge(features, position)

    return call


def step_peak(who: str, size: Size, layers: int, tokens: tuple[int, int], device: str) -> Peak:
    """A training step at ``tokens`` = (visual, others); the optimizer's state exists."""
    place = torch.device(device)
    model = random_mamba(size, place, layers)
    if who == "ours":
        lm = our_lm(model, size)
        lm.checkpointing(recomputes(size))
        loss = our_loss(lm)
    else:
        loss = rival_loss(use_mambapy(model) if who == "mambapy" else model)
    embed = model.get_input_embeddings()
    Stage2Step(size, *size.scaling[:1], WARM_TOKENS, place, embed)(loss)
    step = Stage2Step(size, *tokens, place, embed)
    for parameter in step.bridge.parameters():  # so that AdamW's two averages are not counted
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)
    return measure_peak(lambda: step(loss), place)
