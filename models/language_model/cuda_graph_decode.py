"""Decoding steps as one replayed CUDA graph: a step of a small batch is hundreds of tiny kernels, and starting
them one by one from Python takes longer than running them.

    ids [B, 1], states of all layers → one step on buffers that never move → logits [B, 1, V], states updated

``generate`` stays Hugging Face's: while it runs, the model's ``forward`` sends single-token steps here and the prompt
to the original forward. A graph is used only if its first replay equals eager execution.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import MambaForCausalLM
from transformers.cache_utils import Cache
from transformers.models.mamba.modeling_mamba import MambaCausalLMOutput

from config.errors import first_line

logger = logging.getLogger(__name__)

_KINDS = ("conv_states", "recurrent_states")  # of a layer of transformers' cache
SWITCH = "MAMBA_CUDA_GRAPH"  # environment variable; 0 decodes without graphs
MIN_STEPS = 16  # capturing costs about five eager steps
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest value; weights' dtype


class GraphUnusable(Exception):
    """Why a step cannot be captured here; the message goes to the log."""


class DecodeStep:
    """One step on buffers of its own, computed without a graph: the reference of the graph."""

    def __init__(self, forward: Callable[..., Any], cache: Cache) -> None:
        """``forward``: the model's own; ``cache``: the states of B rows after a prompt, which are copied."""
        self.forward = forward
        self.cache = copy.deepcopy(cache)
        layers = self.cache.layers
        # All layers' states in two tensors: beams are put in order by two launches, not two for each layer.
        self.stacked = tuple(torch.stack([getattr(layer, kind)[0] for layer in layers]) for kind in _KINDS)
        for number, layer in enumerate(layers):
            for kind, tensor in zip(_KINDS, self.stacked, strict=True):
                getattr(layer, kind)[0] = tensor[number]
        self.cache.reorder_cache = self.reorder
        self.ids = torch.zeros(len(self.states[0]), 1, dtype=torch.long, device=self.states[0].device)

    def load(self, states: list[Tensor]) -> None:
        """Begin with these states, as after another prompt."""
        for own, other in zip(self.states, states, strict=True):
            own.copy_(other)

    def reorder(self, rows: Tensor) -> None:
        """As a cache's ``reorder_cache``: row b goes on from the state of ``rows[b]``; in place."""
        for tensor in self.stacked:
            tensor.copy_(tensor.index_select(1, rows.to(tensor.device)))

    def __call__(self, ids: Tensor) -> Tensor:
        """(B, 1) ids → (B, 1, V) logits; overwritten by the next call."""
        self.ids.copy_(ids)
        return self.run()

    def compute(self) -> Tensor:
        return self.forward(input_ids=self.ids, cache_params=self.cache, use_cache=True, logits_to_keep=1).logits

    run = compute

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights: the convolution's inputs are what a projection gave. Logits are always float32."""
        return self.states[0].dtype

    @property
    def states(self) -> list[Tensor]:
        return _states(self.cache)


class CudaGraphStep(DecodeStep):
    """The same step, captured once and replayed.

    Raises:
        GraphUnusable: it cannot be captured, or its replay gives something else.
    """

    def __init__(self, forward: Callable[..., Any], cache: Cache) -> None:
        super().__init__(forward, cache)
        before = [state.clone() for state in self.states]
        expected = [self.compute().clone(), *(state.clone() for state in self.states)]
        try:
            self._capture()
        except RuntimeError as error:
            raise GraphUnusable(f"the step cannot be captured ({first_line(error)})") from error
        self.load(before)
        found = [self.run(), *self.states]
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            if not _close(one, other, self.dtype):
                what = "logits" if number == 0 else f"states of layer {(number - 1) // 2}"
                raise GraphUnusable(f"its replay gives other {what} than eager execution")
        self.load(before)

    def run(self) -> Tensor:
        self.graph.replay()
        return self.logits

    def _capture(self) -> None:
        device = self.ids.device
        aside = torch.cuda.Stream(device)
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):  # libraries allocate their workspaces and Triton compiles, once
            for _ in range(2):
                self.compute()
        torch.cuda.current_stream(device).wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        # "thread_local": what a data loader's or logger's thread does meanwhile does not break the capture.
        graph = torch.cuda.graph(self.graph, capture_error_mode="thread_local")
        with torch.cuda.device(device), _restored(device), graph:
            self.logits = self.compute()


@contextmanager
def _restored(device: torch.device) -> Iterator[None]:
    """After a capture that fails, the stream is as before, and so is the generator of random numbers.

    The end of such a capture raises before torch switches the stream back, and leaves the generator in capture mode,
    where the next sampled token would be refused.
    """
    stream = torch.cuda.current_stream(device)
    generator = torch.cuda.default_generators[stream.device_index]
    state = generator.clone_state()
    try:
        yield
    except RuntimeError:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(state)
        raise


@contextmanager
def static_steps(model: MambaForCausalLM, new_tokens: int, make: type[DecodeStep] | None = None) -> Iterator[None]:
    """Inside it ``model.generate`` decodes by captured steps where that is possible; the log says why not.

    A cache that enters a generation is read after the prompt and not advanced any more.

    Args:
        make: the kind of step; default: captured ones on a CUDA device, none elsewhere.
    """
    if make is None and model.device.type == "cuda":
        make = CudaGraphStep
    reason = make and _why_not(model, new_tokens)
    if reason:
        logger.info("decoding without a CUDA graph: %s", reason)
    if reason or make is None:
        yield
        return
    own_forward = model.forward
    model.forward = functools.wraps(own_forward)(_Router(model, own_forward, make))
    try:
        yield
    finally:
        del model.forward  # the instance's; the class's is visible again


def _why_not(model: MambaForCausalLM, new_tokens: int) -> str | None:
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    if new_tokens < MIN_STEPS:
        return f"for {new_tokens} tokens the capture would take longer than it saves"
    if getattr(model, "is_quantized", False):
        return "quantised weights"
    if "forward" in vars(model):
        return "the model's forward was replaced already"
    return None


class _Router:
    """Replaces the model's ``forward`` during one generation."""

    def __init__(self, model: MambaForCausalLM, forward: Callable[..., Any], make: type[DecodeStep]) -> None:
        self.model, self.forward, self.make = model, forward, make
        self.step: DecodeStep | None = None
        self.usable = True

    def __call__(self, input_ids: Tensor | None = None, cache_params: Cache | None = None, **rest: Any) -> Any:
        is_step = input_ids is not None and input_ids.shape[1] == 1 and rest.get("attention_mask") is None
        if self.usable and is_step and cache_params is not None and cache_params.has_previous_state():
            try:
                self.step = self.step or self._step_for(cache_params)
                # The step's own cache: between the steps beams are put in order in it.
                return MambaCausalLMOutput(logits=self.step(input_ids), cache_params=self.step.cache)
            except GraphUnusable as reason:
                logger.warning("decoding without a CUDA graph: %s", reason)
                self.usable = False
        return self.forward(input_ids=input_ids, cache_params=cache_params, **rest)

    def _step_for(self, cache: Cache) -> DecodeStep:
        """The step captured by an earlier generation of the same batch size, if the weights have not moved."""
        key = (self.make, _states(cache)[0].shape[0], *(weight.data_ptr() for weight in self.model.parameters()))
        kept, step = vars(self.model).get("_decode_step", (None, None))
        if kept == key:
            step.load(_states(cache))
            return step
        self.model._decode_step = key, self.make(self.forward, cache)
        return self.model._decode_step[1]


def _states(cache: Cache) -> list[Tensor]:
    return [state for layer in cache.layers for state in (layer.conv_states[0], layer.recurrent_states[0])]


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    scale = other.float().abs().max().clamp(min=1e-6)
    return bool(((one.float() - other.float()).abs().max() / scale) <= _TOLERANCE.get(dtype, 1e-3))
