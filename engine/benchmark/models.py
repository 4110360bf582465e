"""Limits of the machine, language models whose random weights change neither speed nor memory, the calls to measure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit, prange
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MambaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan
from transformers.utils.import_utils import is_mambapy_available

from engine.benchmark.measure import Limit, Report, Size, measure_peak
from models.language_model.mamba_lm import IGNORED, MambaLM
from models.selective_scan import selective_scan
from models.vim_bridge import BridgeSpec, VimBridge

STATE = 16  # N
Model = MambaLM | PreTrainedModel


IN_THE_MODEL = "ours in the model"  # channels last, bfloat16


def scans(report: Report) -> list[str]:
    """The candidates of the scan that are installed; mambapy is reported if missing."""
    if is_mambapy_available():
        return ["ours", "transformers", "mambapy"]
    report.missing.append("mambapy: mambapy is not installed: pip install --no-deps mambapy (or put it on PYTHONPATH)")
    return ["ours", "transformers"]


def read_limits(nbytes: int, device: torch.device) -> dict[str, Limit]:
    """Reading a block far larger than the caches in two ways with all threads; the faster one is the limit."""
    block = torch.rand(nbytes // 4, device=device)
    calls = {"read: torch.sum": block.sum}
    if device.type == "cpu":
        calls["read: compiled loop"] = partial(_sum, block.numpy())
    return {name: (call, nbytes, "B/s") for name, call in calls.items()}


@njit(parallel=True, fastmath=True, cache=True)
def _sum(values: np.ndarray) -> float:
    total = np.float32(0)
    for i in prange(values.size):
        total += values[i]
    return total


def product_limits(size: Size, tokens: int, device: torch.device) -> dict[str, Limit]:
    """The products into and out of the inner width, nearly all of a Mamba's, as a linear layer does them.

    On a CPU in float32 too: where the size's own dtype is emulated, that is the faster one.
    """
    limits = {}
    for dtype in dict.fromkeys([size.dtype] + [torch.float32] * (device.type == "cpu")):
        for inputs, outputs in ((size.width, 4 * size.width), (2 * size.width, size.width)):
            x, weight = (torch.rand(n, inputs, dtype=dtype, device=device) for n in (tokens, outputs))
            name = f"matrix product {str(dtype).removeprefix('torch.')} {tokens}×{inputs}×{outputs}"
            limits[name] = partial(F.linear, x, weight), 2 * tokens * inputs * outputs, "FLOP/s"
    return limits


def product_operations(model: PreTrainedModel, tokens: int) -> int:
    """Floating-point operations of all matrix products of a forward pass over ``tokens``, without the head."""
    return 2 * tokens * sum(m.weight.numel() for m in model.backbone.modules() if isinstance(m, nn.Linear))


@torch.no_grad()
def random_mamba(size: Size, device: torch.device, layers: int) -> PreTrainedModel:
    """A model of transformers, built in its dtype: no float32 copy of it ever exists."""
    shape = {"vocab_size": size.vocabulary, "hidden_size": size.width, "num_hidden_layers": layers, "state_size": STATE}
    config = MambaConfig(**shape, initializer_range=0.02)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=size.dtype)
    for mixer in model.modules():
        if isinstance(mixer, MambaMixer):  # as MambaLM.load leaves them
            mixer.A_log.data, mixer.D.data = mixer.A_log.data.float(), mixer.D.data.float()
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    model.apply(model._init_weights)
    return model.eval().requires_grad_(False)


def build_model(who: str, size: Size, device: torch.device, layers: int) -> Model:
    """The language model of ``who`` with random weights; attention has as many in half the layers, as Pythia-2.8B."""
    if who != "attention":
        weights = random_mamba(size, device, layers)
        return our_model(size, weights) if who == "ours" else weights
    shape = {"hidden_size": size.width, "intermediate_size": 4 * size.width, "num_attention_heads": size.heads}
    config = GPTNeoXConfig(**shape, vocab_size=size.vocabulary, num_hidden_layers=layers // 2)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=size.dtype).eval().requires_grad_(False)


def our_model(size: Size, weights: PreTrainedModel) -> MambaLM:
    """Ours over the memory of ``weights``, with modules of its own: transformers' model stays as it is."""
    model = copy.deepcopy(weights, {id(parameter): parameter for parameter in weights.parameters()})
    words = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, size.vocabulary - 3)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
    special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    return MambaLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), f"random {size.name}")


def scan_call(who: str, size: Size, tokens: int, device: torch.device, training: bool) -> Callable[[], Any]:
    """The scan of ``who`` (transformers': every state in memory, a loop over L), with its backward pass if training.
    :data:`IN_THE_MODEL` is ours as the language model calls it."""
    own = who in ("ours", IN_THE_MODEL)
    scan = selective_scan if own else partial(mamba_selective_scan, use_mambapy=who == "mambapy")
    torch.manual_seed(0)
    E = 2 * size.width
    u, delta, z, above = torch.randn(4, 1, E, tokens, device=device)
    B, C = torch.randn(2, 1, STATE, tokens, device=device)
    A = -torch.arange(1.0, STATE + 1, device=device).repeat(E, 1)
    D, bias = torch.randn(2, E, device=device)
    bias -= 4  # steps of about 0.02, as a trained model has them
    if who == IN_THE_MODEL:
        u, delta, z, above = (x.bfloat16().mT.contiguous().mT for x in (u, delta, z, above))
    u, delta, A, B, C, D, z, bias = inputs = [x.detach().requires_grad_() for x in (u, delta, A, B, C, D, z, bias)]

    def call() -> Any:
        with torch.set_grad_enabled(training):
            y = scan(u, delta, A, B, C, D=D, z=z, delta_bias=bias, delta_softplus=True)
        return torch.autograd.grad(y, inputs, above) if training else y

    return call


def prompt(size: Size, tokens: int, device: torch.device) -> Tensor:
    """Embeddings (1, L, D) in the model's dtype."""
    torch.manual_seed(tokens)
    return 0.1 * torch.randn(1, tokens, size.width, dtype=size.dtype, device=device)


def prefill_call(model: Model, size: Size, tokens: int, device: torch.device) -> Callable[[], Tensor]:
    """Reads L tokens; returns the first token's logits (1, V)."""
    embeds = prompt(size, tokens, device)

    @torch.no_grad()
    def call() -> Tensor:
        if isinstance(model, MambaLM):
            return model.model.lm_head(model.prefill(embeds)[0].to(embeds.dtype))
        return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits[:, -1]

    return call


def bridge_and_call(size: Size, tokens: int, device: torch.device) -> tuple[VimBridge, Callable[[], Tensor]]:
    """A bridge, and its call on features (1, K, C, T, T) and slice positions (1, K); ``tokens`` must be K squares."""
    planes = max(1, tokens // size.visual)
    side = math.isqrt(tokens // planes)
    bridge = VimBridge(BridgeSpec(512, size.width, grid=side, max_visual_tokens=tokens)).to(device)
    features = torch.randn(1, planes, 512, side, side, device=device)  # as stage 4 of nnU-Net's default 2-D plan
    return bridge, partial(bridge, features, torch.linspace(0, 1, planes, device=device)[None])


def step_call(model: Model, size: Size, tokens: tuple[int, int], device: torch.device) -> Callable[[], None]:
    """A step of Stage 2 from the encoder's features on: bridge, frozen language model, loss, gradients, AdamW.

    ``tokens``: visual ones, and others, of which all but an eighth have a label. AdamW's averages exist before it.
    """
    visual, others = tokens
    bridge, visual_tokens = bridge_and_call(size, visual, device)
    ids = torch.randint(1, size.vocabulary - 3, (1, others), device=device)
    labels = F.pad(ids, (visual, 0), value=IGNORED)
    labels[:, : visual + others // 8] = IGNORED
    ours = isinstance(model, MambaLM)
    if ours:
        model.checkpointing(size.recomputes)
    text = (model.model if ours else model).get_input_embeddings()(ids)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-5)

    def step() -> None:
        embeds = torch.cat([visual_tokens().to(size.dtype), text], 1)
        if ours:
            torch.div(*model.answer_loss(embeds, labels)).backward()
        else:
            model(inputs_embeds=embeds, labels=labels, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    sum(0 * parameter.sum() for parameter in bridge.parameters()).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return step


# Each makes the call to measure from a model (of a scan: the candidate's name), the size, the tokens and the device.
CALLS: dict[str, Callable[..., Callable[[], Any]]] = {
    "scan": partial(scan_call, training=False),
    "scan_training": partial(scan_call, training=True),
    "prefill": prefill_call,
    "bridge": lambda _, *arguments: torch.no_grad()(bridge_and_call(*arguments)[1]),
    "train_step": step_call,
}


def call_peak(kind: str, who: str, size: Size, tokens: Any, device: torch.device, layers: int) -> tuple[int, int]:
    """Peak memory of one call of :data:`CALLS` after a small one, for a process of its own."""
    model = build_model(who, size, device, layers) if kind in ("prefill", "train_step") else who
    least = size.scaling[0]
    CALLS[kind](model, size, (least, 8) if kind == "train_step" else least, device)()
    return measure_peak(CALLS[kind](model, size, tokens, device), device)
