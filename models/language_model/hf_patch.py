"""Our scan inside Hugging Face's Mamba: the same mixer, without the (B, E, L, N) tensors.

    hidden [B, L, D] → in_proj → x, z [B, L, E] → causal conv, SiLU → Δ, B, C → scan · SiLU(z) → out_proj

``transformers`` 5.23 falls back to a Python loop over L that materialises every state where no CUDA
kernels are installed. Everything around the mixer (hub, weights, cache, ``generate``) stays theirs.
The channels are the last axis throughout: as the projections read and write them, so nothing is transposed.

Without gradients, a sequence longer than a chunk is read chunk by chunk, the state carried in the cache: the memory
of the layers does not grow with L. With gradients and checkpointing, each block keeps its input alone and is computed
again in the backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.mamba.modeling_mamba import MambaBlock, MambaMixer, MambaModel, MambaOutput, MambaRMSNorm

from models.language_model import cpu_decode, gpu_decode
from models.selective_scan import BackendUnavailable, selective_scan, selective_state_update, triton_serves
from models.selective_scan.selftest import attempt

logger = logging.getLogger(__name__)

# Tokens read at a time. On a CPU matrix products of a few hundred are as fast as they get; a GPU wants more, and the
# fewer launches the better.
PREFILL_CHUNK = {"cpu": 512, "cuda": 4096}
PROBE = 512  # tokens on which a block's memory is measured
TRANSIENT = 3  # times what a block keeps: what its backward pass needs for a moment, with its second forward pass
MARGIN = 0.06  # of a card's memory, which fragments


def use_our_scan(model: MambaForCausalLM) -> None:
    """Replace in place the forward of the backbone, of its blocks and of their mixers; freeze the linear layers."""
    cpu_decode.freeze_linear_layers(model)
    for module in model.modules():
        if isinstance(module, MambaMixer):
            module.forward = MethodType(_mixer_forward, module)
        elif isinstance(module, MambaBlock):
            module.recompute, module.step_plan = False, None
            module.forward = MethodType(_block_forward, module)
        elif isinstance(module, MambaModel):
            module.step_plan = None
            module.forward = MethodType(_backbone_forward, module)
            module.norm_f.forward = MethodType(_norm_forward, module.norm_f)


def recompute_blocks(model: nn.Module, count: int) -> None:
    """The first ``count`` blocks keep only their input for the backward pass, and cost a second forward pass there.

    The backward pass frees what the last blocks keep before it computes the first ones again.
    """
    for number, block in enumerate(module for module in model.modules() if isinstance(module, MambaBlock)):
        block.recompute = number < count


def kept_bytes(block: MambaBlock, like: Tensor) -> int:
    """Bytes that a block keeps for its backward pass, for each token; measured on a few with the dtype and device of
    ``like``."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = torch.float32 if block.residual_in_fp32 else like.dtype
    hidden = torch.zeros(1, PROBE, like.shape[-1], dtype=dtype, device=like.device, requires_grad=True)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        _whole_block(block, hidden, None, None)
    return sum(kept.values()) // PROBE


def blocks_to_recompute(blocks: int, tokens: int, kept: int, hidden: int, room: int) -> int:
    """How many blocks must be computed again for the rest to fit, 0 to ``blocks``.

    Args:
        tokens: B·L. kept: bytes that a block keeps for each of them; hidden: of its input alone.
        room: bytes for all that.
    """
    left = room - tokens * (blocks * hidden + TRANSIENT * kept)
    return blocks - max(0, min(blocks, left // max(1, tokens * (kept - hidden))))


def free_bytes(device: torch.device, margin: float = 0.0) -> int:
    """Bytes that this process can still allocate on a GPU, less a ``margin`` of the card's memory."""
    index = torch.cuda.current_device() if device.index is None else device.index  # "cuda" alone is not taken
    free, total = torch.cuda.mem_get_info(index)
    reserved, held = torch.cuda.memory_reserved(index), torch.cuda.memory_allocated(index)
    allowed = torch.cuda.get_per_process_memory_fraction(index) * total
    return int(min(free + reserved, allowed) - held - margin * total)


class BlockMemory:
    """Which blocks of a language model are computed again in the backward pass.

    ``logits``: positions whose logits, with their gradients, exist at a time.
    """

    def __init__(self, model: MambaForCausalLM, logits: int) -> None:
        self._model, self._logits = model, logits * model.config.vocab_size
        self._automatic, self._reserve, self._kept = True, 0, 0

    def decide(self, wanted: bool | Literal["auto"] | None, reserve: int = 0, *, large: bool = False) -> bool:
        """``wanted``: all blocks or none; auto: on a GPU as many as do not fit into its memory, chosen for each pass,
        elsewhere all of a large model's.

        ``reserve``: bytes that are not allocated yet and must stay free, as for the optimizer. Returns whether blocks
        may be computed again.
        """
        self._automatic, self._reserve = wanted in ("auto", None), reserve
        recomputed = large if self._automatic else bool(wanted)
        recompute_blocks(self._model, self._blocks if recomputed else 0)
        return recomputed

    @contextmanager
    def least(self) -> Iterator[None]:
        """Inside it as many blocks are computed again as ever may be."""
        automatic, self._automatic = self._automatic, False
        before = [block.recompute for block in self._model.backbone.layers]
        if automatic and self._model.device.type == "cuda":
            recompute_blocks(self._model, self._blocks)
        try:
            yield
        finally:
            self._automatic = automatic
            recompute_blocks(self._model, sum(before))

    def choose(self, inputs_embeds: Tensor) -> None:
        """For a pass over (B, L, D), where that is automatic."""
        if self._automatic and inputs_embeds.is_cuda and torch.is_grad_enabled():
            tokens, hidden = inputs_embeds.shape[0] * inputs_embeds.shape[1], 4 * inputs_embeds.shape[2]
            count = blocks_to_recompute(self._blocks, tokens, self.kept, hidden, self._room())
            recompute_blocks(self._model, count)

    def rows_that_fit(self, length: int, most: int) -> int:
        """How many rows of ``length`` tokens a backward pass can take, 1 to ``most``; all blocks computed again where
        that is automatic."""
        if self._model.device.type != "cuda":
            return most
        again = self._blocks if self._automatic else sum(block.recompute for block in self._model.backbone.layers)
        of_a_token = again * 4 * self._model.config.hidden_size + (self._blocks - again + TRANSIENT) * self.kept
        return max(1, min(most, self._room() // (length * of_a_token)))

    @property
    def kept(self) -> int:
        """Bytes that a block keeps for each token; measured once."""
        table = self._model.get_input_embeddings().weight
        self._kept = self._kept or kept_bytes(self._model.backbone.layers[0], table)
        return self._kept

    @property
    def _blocks(self) -> int:
        return self._model.config.num_hidden_layers

    def _room(self) -> int:
        """Bytes for what the blocks keep: logits in the model's dtype and float32, and the gradients of both, aside."""
        return free_bytes(self._model.device, MARGIN) - self._reserve - 4 * 4 * self._logits


def prefill_chunk(device: torch.device) -> int:
    """Tokens that are read at a time on a device."""
    return PREFILL_CHUNK.get(device.type, PREFILL_CHUNK["cpu"])


def read_in_chunks(backbone: MambaModel, inputs_embeds: Tensor, mask: Tensor | None, cache: Cache) -> Iterator[Tensor]:
    """Chunk by chunk, the hidden states (B, ≤ chunk, D) after all blocks and the norm; updates ``cache``."""
    chunk = prefill_chunk(inputs_embeds.device)
    for first in range(0, inputs_embeds.shape[1], chunk):
        span = slice(first, first + chunk)
        part = None if mask is None else mask[:, span]
        hidden = inputs_embeds[:, span]
        for block in backbone.layers:
            hidden = block(hidden, cache_params=cache, attention_mask=part)
        yield backbone.norm_f(hidden)


def _backbone_forward(
    self: MambaModel, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **options: Any
) -> tuple | MambaOutput:
    """Same contract as ``MambaModel.forward``; all but the first two by keyword."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    mask, cache, use_cache = (options.get(name) for name in ("attention_mask", "cache_params", "use_cache"))
    if mask is not None and bool(mask.all()):
        mask = options["attention_mask"] = None  # two products per layer less
    all_states = options.get("output_hidden_states") or self.config.output_hidden_states
    as_tuple = options.get("return_dict") is False
    single = given is not None and given.shape[1] == 1 and given.device.type == "cpu" and not gpu_decode.INTERPRETED
    if single and cache is not None and not (all_states or as_tuple):
        embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        if (stepped := cpu_decode.step(self, embeds, cache, mask)) is not None:
            return MambaOutput(last_hidden_state=self.norm_f(stepped), cache_params=cache)
    if (
        given is None
        or torch.is_grad_enabled()
        or all_states
        or as_tuple
        or given.shape[1] <= prefill_chunk(given.device)
    ):
        return MambaModel.forward(self, input_ids, inputs_embeds, **options)
    embeds = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
    cache = DynamicCache(config=self.config) if cache is None else cache
    hidden = torch.cat(list(read_in_chunks(self, embeds, mask, cache)), dim=1)
    return_cache = self.config.use_cache if use_cache is None else use_cache
    return MambaOutput(last_hidden_state=hidden, cache_params=cache if return_cache else None)


def _block_forward(
    self: MambaBlock,
    hidden_states: Tensor,
    cache_params: Cache | None = None,
    attention_mask: Tensor | None = None,
    **_: object,
) -> Tensor:
    if (stepped := gpu_decode.step(self, hidden_states, cache_params, attention_mask)) is not None:
        return stepped
    if self.recompute and torch.is_grad_enabled() and cache_params is None:
        return checkpoint(_whole_block, self, hidden_states, None, attention_mask, use_reentrant=False)
    return _whole_block(self, hidden_states, cache_params, attention_mask)


def _whole_block(self: MambaBlock, hidden: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
    """hidden + mixer(norm(hidden)), the sum in float32 if the model says so."""
    residual = torch.float32 if self.residual_in_fp32 else hidden.dtype
    normed, hidden = norm_and_residual(self.norm, hidden, self.norm.weight.dtype, residual)
    return hidden + self.mixer(normed, cache_params=cache, attention_mask=mask)


def norm_and_residual(
    norm: MambaRMSNorm, hidden: Tensor, rounded: torch.dtype, residual: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The norm of ``hidden`` (B, L, D) rounded to ``rounded``, and ``hidden`` in the dtype ``residual``.

    On a GPU one kernel forward and one backward, the sum of both gradients included.
    """
    if _fused(hidden, norm.weight):
        from models.language_model.fused_triton import NormAndResidual

        return NormAndResidual.apply(hidden, norm.weight, norm.variance_epsilon, rounded, residual)
    return MambaRMSNorm.forward(norm, hidden.to(rounded)), hidden.to(residual)


def _norm_forward(self: MambaRMSNorm, hidden_states: Tensor) -> Tensor:
    return norm_and_residual(self, hidden_states, hidden_states.dtype, hidden_states.dtype)[0]


def _fused(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether the Triton kernels serve: they give no gradients of weights."""
    trained = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in weights)
    return not trained and x.numel() > 0 and triton_serves(x.device, x.dtype) and _kernels_agree(x.device.type)


@functools.cache
def _kernels_agree(device_type: str) -> bool:
    """Whether the kernels pass their self-test on this device; tried once, the log says why not."""
    from models.language_model.fused_triton import check

    try:
        attempt(lambda: check(device_type), device_type)
    except BackendUnavailable as reason:
        logger.warning("convolution and norm by PyTorch's operations: %s", reason)
        return False
    return True


def _mixer_forward(
    self: MambaMixer,
    hidden_states: Tensor,
    cache_params: Cache | None = None,
    attention_mask: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Same contract as ``MambaMixer.forward``; a prefill in pieces continues from the cached state."""
    L, dtype = hidden_states.shape[1], hidden_states.dtype
    state = None if cache_params is None else cache_params.get_recurrent_state(self.layer_idx)
    x, z = self.in_proj(_masked(hidden_states, attention_mask)).chunk(2, dim=-1)  # (B, L, E)
    before = _conv_inputs(self, x, cache_params)
    x = _masked(causal_conv_silu(x, self.conv1d.weight[:, 0], self.conv1d.bias, before), attention_mask)

    dt, B, C = self.x_proj(x).split([self.time_step_rank, self.ssm_state_size, self.ssm_state_size], dim=-1)
    delta, bias = _project_delta(self.dt_proj, dt)
    A, fixed = -torch.exp(self.A_log.float()), {"D": self.D.float(), "delta_bias": bias, "delta_softplus": True}

    if state is not None and L == 1:
        y = selective_state_update(state, x[:, 0], delta[:, 0], A, B[:, 0], C[:, 0], z=z[:, 0], **fixed)
        return self.out_proj(y[:, None].to(dtype))

    first = None if state is None else state.float()
    y, last_state = selective_scan(
        x.mT, delta.mT, A, B.mT, C.mT, z=z.mT, initial_state=first, return_last_state=True, **fixed
    )
    if cache_params is not None:
        cache_params.update_recurrent_state(last_state, self.layer_idx)
    return self.out_proj(y.mT.to(dtype))


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden if mask is None else hidden * mask[:, :, None].to(hidden.dtype)


def _project_delta(dt_proj: nn.Module, dt: Tensor) -> tuple[Tensor, Tensor | None]:
    """Δ before its bias, and the bias for the scan to add in float32; an adapter or a quantised layer adds its own."""
    if not isinstance(dt_proj, nn.Linear) or not dt_proj.weight.is_floating_point():
        return dt_proj(dt), None
    bias = None if dt_proj.bias is None else dt_proj.bias.float()
    # As a matrix product: for a strided (B, L, R) torch would repeat the weights for every sample.
    return cpu_decode.many_rows(dt.flatten(0, 1), dt_proj.weight).unflatten(0, dt.shape[:2]), bias


def _conv_inputs(mixer: MambaMixer, x: Tensor, cache_params: Cache | None) -> Tensor | None:
    """The K - 1 inputs of the convolution before ``x`` (B, K-1, E), if any; ``x`` enters the cache."""
    if cache_params is None:
        return None
    kernel = mixer.conv_kernel_size
    kept = cache_params.get_conv_state(mixer.layer_idx)
    before = None if kept is None else kept[..., 1:].transpose(1, 2).clone()  # the update overwrites it in place
    cache_params.update_conv_state(x[:, -kernel:].transpose(1, 2), mixer.layer_idx, conv_kernel_size=kernel)
    return before


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """SiLU of the causal depthwise convolution along L, as a sum of K shifted products in float32.

    Equals ``silu(conv1d(...))`` of the transposed sequence, which on a CPU takes a second per thousand tokens in
    bfloat16 and needs the transposition.

    Args:
        x: (B, L, E). weight: (E, K), its last column meets the present token. bias: (E,).
        before: (B, K-1, E), what precedes ``x``; zeros if absent.

    Returns:
        (B, L, E) in the dtype of ``x``.
    """
    if _fused(x, weight, bias, before):
        from models.language_model.fused_triton import ConvSiLU

        return ConvSiLU.apply(x, weight, bias, before)
    B, L, E = x.shape
    first, *taps = weight.float().unbind(1)
    padding = x.new_zeros(B, len(taps), E) if before is None else before.to(x.dtype)
    # Half precision is widened once, not in each product.
    inputs = torch.cat([padding, x], dim=1).float()
    out = inputs[:, :L] * first
    for k, tap in enumerate(taps, start=1):
        out.addcmul_(inputs[:, k : k + L], tap)
    if bias is not None:
        out += bias
    return F.silu(out, inplace=not out.requires_grad).to(x.dtype)
