"""How Hugging Face's Mamba backbone runs its blocks: long prompts in chunks, training with recomputation.

    inputs_embeds [B, L, D] → block → … → block → norm → hidden [B, L, D]

Without gradients, a sequence longer than a chunk is read chunk by chunk, the state carried in the cache: what the
layers need in between does not grow with L. With gradients and checkpointing, each block keeps its input alone and
is computed again in the backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaModel, MambaOutput

from models.language_model.cpu_decode.frozen_linear import freeze_linear_layers

try:
    from models.language_model.cpu_decode.mamba_step import step
except ImportError:  # numba is missing, which frozen_linear has said
    step = None

PREFILL_CHUNK = 512  # tokens; from a few hundred on, matrix products are as fast as they get


def run_in_blocks(model: MambaForCausalLM) -> None:
    """Replace the forward of the backbone and of its blocks in place, and the kind of the linear layers."""
    freeze_linear_layers(model)
    for module in model.modules():
        if isinstance(module, MambaBlock):
            module.recompute, module.step_plan = False, None
            module.forward = MethodType(_block_forward, module)
        elif isinstance(module, MambaModel):
            module.forward = MethodType(_backbone_forward, module)


def recompute_blocks(model: nn.Module, wanted: bool) -> None:
    """Whether blocks keep only their input for the backward pass; they cost a second forward pass then."""
    for module in model.modules():
        if isinstance(module, MambaBlock):
            module.recompute = wanted


def _block_forward(
    self: MambaBlock,
    hidden_states: Tensor,
    cache_params: Cache | None = None,
    attention_mask: Tensor | None = None,
    **_: object,
) -> Tensor:
    if step is not None and (stepped := step(self, hidden_states, cache_params, attention_mask)) is not None:
        return stepped
    if self.recompute and torch.is_grad_enabled() and cache_params is None:
        return checkpoint(MambaBlock.forward, self, hidden_states, None, attention_mask, use_reentrant=False)
    return MambaBlock.forward(self, hidden_states, cache_params, attention_mask)


def read_in_chunks(
    backbone: MambaModel, inputs_embeds: Tensor, mask: Tensor | None, cache: Cache, chunk: int
) -> Iterator[Tensor]:
    """Chunk by chunk, the hidden states (B, ≤chunk, D) after all blocks and the norm; ``cache`` goes along."""
    for first in range(0, inputs_embeds.shape[1], chunk):
        span = slice(first, first + chunk)
        part = None if mask is None else mask[:, span]
        hidden = inputs_embeds[:, span]
        for block in backbone.layers:
            hidden = block(hidden, cache_params=cache, attention_mask=part)
        yield backbone.norm_f(hidden)


def _backbone_forward(
    self: MambaModel,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    cache_params: Cache | None = None,
    use_cache: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    attention_mask: Tensor | None = None,
    **rest: object,
) -> tuple | MambaOutput:
    """Same contract as ``MambaModel.forward``."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if attention_mask is not None and given is not None and bool(attention_mask.all()):
        attention_mask = None  # two products per layer less
    keeps_all = output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states)
    if given is None or torch.is_grad_enabled() or keeps_all or given.shape[1] <= PREFILL_CHUNK:
        return MambaModel.forward(
            self,
            input_ids,
            inputs_embeds,
            cache_params,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            attention_mask=attention_mask,
            **rest,
        )
    embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
    cache = DynamicCache(config=self.config) if cache_params is None else cache_params
    hidden = torch.cat(list(read_in_chunks(self, embeds, attention_mask, cache, PREFILL_CHUNK)), dim=1)
    output = MambaOutput(last_hidden_state=hidden, cache_params=cache if use_cache else None)
    return output if return_dict or (return_dict is None and self.config.return_dict) else output.to_tuple()
