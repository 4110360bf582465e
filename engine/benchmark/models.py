"""Sizes, language models with random weights, and the calls on them that the suites time and weigh.

Time and memory do not depend on the values of the weights. Letters as in ARCHITECTURE.md: B batch, L tokens, D width,
E inner width, N state. A candidate's model is :class:`MambaLM` (ours) or a model of transformers (the baselines).
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.mamba.modeling_mamba import MambaMixer, mamba_selective_scan
from transformers.utils.import_utils import is_mambapy_available

from engine.benchmark.measure import Peak, measure_peak
from models.language_model.mamba_lm import IGNORED, LARGE_MODEL, MambaLM
from models.selective_scan import selective_scan
from models.vim_bridge import BridgeSpec, VimBridge

FEATURE_CHANNELS = 512  # of stage 4 of nnU-Net's default 2-D plan
WARM_TOKENS = 8
MIB = 1 << 20
STATE = 16  # N
Model = MambaLM | PreTrainedModel
Kind = Literal["scan", "scan_training", "prefill", "train_step"]


@dataclass(frozen=True)
class Size:
    """What is measured at one ``--size``; counts of tokens are per sample.

    ``part_layers``: layers where all of them would take hours (scaling, memory); all layers cost the same.
    """

    name: str
    width: int
    layers: int
    heads: int  # of the attention decoder
    dtype: torch.dtype
    baseline_layers: int  # of a training step beside the baselines
    vocabulary: int = 50280  # embedding rows, three more than the tokenizer has tokens
    rounds: int = 5
    part_layers: int = 8
    scan_tokens: int = 1024
    visual: int = 784
    text: int = 64
    answer: int = 256  # tokens after the visual ones in a training step
    decode: int = 16
    baseline_step: tuple[int, int] = (196, 64)  # visual and further tokens
    baseline_training_tokens: int = 256  # at most, for transformers, whose backward pass takes the square of L
    scaling: tuple[int, ...] = (49, 196, 784, 3136, 12544)  # the last is 16 times the third
    memory_tokens: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    block: int = 1024 * MIB  # bytes that are read and copied
    work: float = 2e10  # floating-point operations in one timed call of matrix products
    own_process: bool = True  # a fresh process for every peak of memory
    volume: tuple[int, int, int] = (300, 512, 512)  # voxels of the scan that is preprocessed, z y x
    epoch_cases: int = 8
    epoch_volume: tuple[int, int, int] = (120, 512, 512)

    @property
    def inner(self) -> int:
        return 2 * self.width

    @property
    def recomputes(self) -> bool:
        """Whether training keeps only the blocks' inputs (also where fewer layers are measured)."""
        return self.width * (3 * self.layers * self.inner + self.vocabulary) > LARGE_MODEL


SIZES = {
    "2.8b": Size("2.8b", 2560, 64, 32, torch.bfloat16, baseline_layers=2),
    "130m": Size("130m", 768, 24, 12, torch.float32, baseline_layers=4),
    "tiny": Size(
        *("tiny", 32, 2, 4, torch.float32), baseline_layers=2, vocabulary=300, rounds=3, part_layers=2, scan_tokens=48,
        visual=16, text=8, answer=12, decode=3, baseline_step=(9, 4), baseline_training_tokens=16,
        scaling=(4, 9, 16, 64, 256), memory_tokens=(16, 32), block=4 * MIB, work=1e7, own_process=False,
        volume=(12, 48, 56), epoch_cases=4, epoch_volume=(10, 40, 48),
    ),
}  # fmt: skip


# ------------------------------------------------------------------ models


@torch.no_grad()
def random_mamba(size: Size, device: torch.device, layers: int | None = None) -> MambaForCausalLM:
    """A model of transformers, built in its dtype: no float32 copy of it ever exists."""
    config = MambaConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, num_hidden_layers=layers or size.layers,
        state_size=STATE, eos_token_id=0, bos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=size.dtype)
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:  # as MambaLM.load leaves them
        mixer.A_log.data, mixer.D.data = mixer.A_log.data.float(), mixer.D.data.float()
    model.to_empty(device=device)
    model.tie_weights()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            limit = math.sqrt(3) * (0.02 if "embeddings" in name else parameter[0].numel() ** -0.5)
            parameter.uniform_(-limit, limit)
    for mixer in mixers:
        mixer.A_log.copy_(torch.arange(1.0, STATE + 1, device=device).log().expand_as(mixer.A_log))
        step = torch.empty_like(mixer.dt_proj.bias, dtype=torch.float32).uniform_(math.log(1e-3), math.log(0.1)).exp()
        mixer.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus
    return model.eval().requires_grad_(False)


def attention_decoder(size: Size, mamba_layers: int, device: torch.device) -> PreTrainedModel:
    """A decoder of the same width with as many weights: one attention layer has those of two Mamba layers.

    At width 2560, 32 heads and 64 Mamba layers it would be Pythia-2.8B (Biderman et al., arXiv 2304.01373), to which
    the Mamba paper compares Mamba-2.8B. Attention is torch's fused one.
    """
    config = GPTNeoXConfig(
        vocab_size=size.vocabulary, hidden_size=size.width, num_hidden_layers=max(1, mamba_layers // 2),
        num_attention_heads=size.heads, intermediate_size=4 * size.width, max_position_embeddings=max(size.scaling),
    )  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=size.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def candidate_model(who: str, size: Size, weights: MambaForCausalLM) -> Model:
    """The model of ours, transformers or mambapy over the memory of ``weights``, with modules of its own."""
    model = copy.deepcopy(weights, {id(parameter): parameter for parameter in weights.parameters()})
    if who == "ours":
        words = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, size.vocabulary - 3)}
        tokenizer = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
        special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
        return MambaLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), f"random {size.name}")
    for mixer in model.modules():
        if isinstance(mixer, MambaMixer):  # as MambaConfig(use_mambapy=True) builds it
            mixer.use_mambapy = who == "mambapy"
    return model


def why_missing(who: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a baseline cannot be measured here with a model of this dtype, or nothing."""
    if who == "mambapy" and not is_mambapy_available():
        return "mambapy is not installed: pip install --no-deps mambapy (or put it on PYTHONPATH)"
    if who == "mambapy" and dtype is not torch.float32:
        return f"transformers' path through it multiplies float32 states with {dtype} and raises"
    if who == "mamba_ssm":
        if device.type != "cuda":
            return "mamba-ssm runs on NVIDIA GPUs alone"
        try:
            importlib.import_module("mamba_ssm.ops.selective_scan_interface")
        except (ImportError, RuntimeError) as error:
            return f"mamba-ssm does not import ({str(error).splitlines()[0]}): see requirements-cuda.txt"
    return None


def product_operations(model: MambaForCausalLM, tokens: int) -> int:
    """Floating-point operations of all matrix products of a forward pass over ``tokens``, without the head."""
    linear = (module for module in model.backbone.modules() if isinstance(module, nn.Linear))
    return 2 * tokens * sum(module.weight.numel() for module in linear)


# ------------------------------------------------------------------ calls


def scan_inputs(size: Size, tokens: int, device: torch.device) -> list[Tensor]:
    """u, delta (1, E, L), A (E, N), B, C (1, N, L), D (E,), z (1, E, L), delta_bias (E,), all to be differentiated."""
    torch.manual_seed(0)
    E, N = size.inner, STATE
    shapes = [(1, E, tokens), (1, E, tokens), (E, N), (1, N, tokens), (1, N, tokens), (E,), (1, E, tokens), (E,)]
    values = [torch.randn(shape, device=device) for shape in shapes]
    values[2] = -torch.arange(1.0, N + 1, device=device).expand(E, N).contiguous()
    values[7] -= 4  # steps of about 0.02, as a trained model has them
    return [value.requires_grad_() for value in values]


def scan_call(who: str, inputs: list[Tensor], training: bool) -> Callable[[], Tensor]:
    """The scan of ``who`` (transformers': every state in memory, a loop over L), with its backward pass if training."""
    if who == "mamba_ssm":
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    else:
        scan = selective_scan if who == "ours" else partial(mamba_selective_scan, use_mambapy=who == "mambapy")
    *first, D, z, bias = inputs
    above = torch.ones_like(z)

    def call() -> Tensor:
        for value in inputs:
            value.grad = None
        with torch.set_grad_enabled(training):
            y = scan(*first, D=D, z=z, delta_bias=bias, delta_softplus=True)
        if training:
            y.backward(above)
        return y

    return call


def prompt(size: Size, tokens: int, device: torch.device) -> Tensor:
    """Embeddings (1, L, D) in the model's dtype."""
    generator = torch.Generator().manual_seed(tokens)
    return (0.1 * torch.randn(1, tokens, size.width, generator=generator)).to(device, size.dtype)


@torch.no_grad()
def prefill(model: Model, embeds: Tensor) -> Tensor:
    """The first token's logits (1, V) after ``embeds`` (1, L, D), and the cache from which generation continues."""
    if isinstance(model, MambaLM):
        last, _ = model.prefill(embeds)
        return model.model.lm_head(last.to(embeds.dtype))
    return model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits[:, -1]


def mean_loss(model: Model, embeds: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the labelled tokens; embeddings (1, L, D), labels (1, L)."""
    if isinstance(model, MambaLM):
        total, count = model.answer_loss(embeds, labels)
        return total / count
    return model(inputs_embeds=embeds, labels=labels, use_cache=False).loss


def bridge_and_inputs(size: Size, tokens: int, device: torch.device) -> tuple[VimBridge, tuple[Tensor, Tensor]]:
    """A bridge that gives ``tokens`` tokens; features (1, K, C, T, T) and slice positions (1, K) for it.

    ``tokens`` must be K squares, K counting how often the usual number of tokens of a slice is in it.
    """
    planes = max(1, tokens // size.scaling[2])
    side = math.isqrt(tokens // planes)
    bridge = VimBridge(BridgeSpec(FEATURE_CHANNELS, size.width, grid=side, max_visual_tokens=tokens)).to(device)
    features = torch.randn(1, planes, FEATURE_CHANNELS, side, side, device=device)
    return bridge, (features, torch.linspace(0, 1, planes, device=device)[None])


def stage2_step(model: Model, size: Size, tokens: tuple[int, int], device: torch.device) -> Callable[[], None]:
    """A step of Stage 2 from the encoder's features on: bridge, frozen language model, loss, gradients, AdamW.

    ``tokens``: visual ones, and others, of which all but an eighth have a label. AdamW's averages exist before it.
    """
    torch.manual_seed(0)
    visual, others = tokens
    bridge, inputs = bridge_and_inputs(size, visual, device)
    ids = torch.randint(1, size.vocabulary - 3, (1, others), device=device)
    labels = torch.cat([torch.full((1, visual), IGNORED, device=device), ids], 1)
    labels[:, : visual + others // 8] = IGNORED
    ours = isinstance(model, MambaLM)
    text = (model.model if ours else model).get_input_embeddings()(ids)
    if ours:
        model.checkpointing(size.recomputes)
    for parameter in bridge.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=1e-5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        mean_loss(model, torch.cat([bridge(*inputs).to(size.dtype), text], 1), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def call_maker(
    kind: Kind, who: str, size: Size, device: torch.device, weights: MambaForCausalLM | int = 0
) -> Callable[[Any], Callable[[], Any]]:
    """From a number of tokens (of a training step: visual ones and others) to the call that is timed or weighed.

    Args:
        who: ours, transformers or mambapy; for a prefill attention too, or the bridge alone; for a scan mamba_ssm.
        weights: of the language model, or the number of layers of a random one.
    """
    if kind in ("scan", "scan_training"):
        return lambda tokens: scan_call(who, scan_inputs(size, tokens, device), kind == "scan_training")
    if who == "bridge":

        def make(tokens: int) -> Callable[[], Tensor]:
            bridge, inputs = bridge_and_inputs(size, tokens, device)
            return torch.no_grad()(lambda: bridge(*inputs))

        return make
    if who == "attention":
        model: Model = attention_decoder(size, weights, device)
    else:
        model = candidate_model(who, size, random_mamba(size, device, weights) if isinstance(weights, int) else weights)
    if kind == "train_step":
        return lambda tokens: stage2_step(model, size, tokens, device)
    return lambda tokens: partial(prefill, model, prompt(size, tokens, device))


def call_peak(kind: Kind, who: str, size: Size, tokens: Any, device: torch.device, layers: int = 0) -> Peak:
    """Peak memory of one call after a small one, for a process of its own; arguments as of :func:`call_maker`."""
    make = call_maker(kind, who, size, device, layers)
    least = size.scaling[0]
    make((least, WARM_TOKENS) if kind == "train_step" else least if who == "bridge" else WARM_TOKENS)()
    return measure_peak(make(tokens), device)
