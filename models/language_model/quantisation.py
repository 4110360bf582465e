"""The language model's large matrices in int8, and what that does to its logits.

    W [O, I] ≈ q [O, I] int8 · scale [O] float32        scale[o] = max_i |W[o, i]| / 127

Half the bytes of bfloat16: decoding is bound by memory bandwidth. Each output row has its own scale, symmetric around
zero, as the vector-wise scheme of LLM.int8() has it for weights (Dettmers et al., arXiv 2208.07339); activations stay
as they are (a CPU with AVX2 rounds them to 16 bits of their row's largest value: ``cpu_decode``). What our
compiled products do not take meets the weights widened, a block at a time. The reference is
``F.linear(x, layer.weight * layer.scale[:, None], layer.bias)``. Ours (``--llm_int8``) works on
every device; bitsandbytes (``--llm_8bit``) needs a GPU and its own installation. ``--save_int8`` keeps a quantised
model as one safetensors file, which is mapped into memory: nothing is converted, or read before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

from config.errors import InputError, first_line
from config.files import atomic_path
from models.language_model import gpu_decode
from models.language_model.cpu_decode import FrozenLinear, WidenedProduct, spans

FORMAT = "mamba-ct-report-int8"
LEVELS = 127
CHUNK = 256  # positions whose logits exist at a time
CONTRADICTION = "--llm_8bit and --llm_int8 are two ways to the same thing: give one of them"


class Quality(NamedTuple):
    """Absolute differences of a quantised model's logits from the original's, and what they cost."""

    max_difference: float
    mean_difference: float
    perplexity_ratio: float  # quantised over original, 1 where nothing is lost
    standard_deviation: float  # of the original's logits over the vocabulary, the scale of the differences


@torch.no_grad()
def quantise_int8(model: MambaForCausalLM) -> int:
    """Replace the large matrices of a frozen model by int8 ones, in place, each freed as its copy exists.

    The mixers' ``in_proj`` and ``out_proj`` and the head; the embedding table keeps its dtype. Returns how many.
    """
    return _replace_layers(model, Int8Linear.of)


def _replace_layers(model: MambaForCausalLM, make: Callable[[nn.Linear], Int8Linear]) -> int:
    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    for mixer in mixers:
        mixer.in_proj, mixer.out_proj = make(mixer.in_proj), make(mixer.out_proj)
    model.lm_head = Int8Head(model.lm_head, make(model.lm_head))
    return 2 * len(mixers) + 1


def save_int8(model: MambaForCausalLM, path: Path) -> None:
    """Write the weights of a quantised model, atomically; a head that is the embedding table is written once.

    Raises InputError: the disk is full, or the folder cannot be written to.
    """
    tensors = model.state_dict()
    if model.lm_head.weight is model.get_input_embeddings().weight:
        del tensors["lm_head.weight"]
    try:
        with atomic_path(path) as part:
            save_file(tensors, part, metadata={"format": FORMAT})
    except (OSError, SafetensorError) as error:
        raise InputError(f"--save_int8: {path} cannot be written: {first_line(error)}") from error


def load_int8(model: MambaForCausalLM, path: Path) -> bool:
    """Give a model that was built on the meta device the weights of :func:`save_int8`, mapped into memory.

    Returns whether the head is the embedding table. Raises InputError: the file is damaged, or of another model.
    """
    _replace_layers(model, Int8Linear.like)
    try:
        tensors = load_file(path)
        tied = "lm_head.weight" not in tensors
        table = tensors["backbone.embeddings.weight"]
        model.load_state_dict({"lm_head.weight": table, **tensors}, assign=True)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"--save_int8: {path} is damaged, delete it ({first_line(error)})") from error
    return tied


@torch.no_grad()
def quantisation_quality(original: nn.Module, quantised: nn.Module, ids: Tensor) -> Quality:
    """Compare two language models (``MambaLM``) at all positions and embedding rows of (B, L ≥ 2) token ids."""

    def logits_of(model: MambaForCausalLM, hidden: Tensor) -> Tensor:
        return model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()  # as the model's own forward

    states = [one.model.backbone(input_ids=ids, use_cache=False).last_hidden_state for one in (original, quantised)]
    hidden, other = (state[:, :-1].flatten(0, 1) for state in states)
    largest, total, lost, squares = 0.0, 0.0, 0.0, 0.0
    pairs = zip(hidden.split(CHUNK), other.split(CHUNK), ids[:, 1:].flatten().split(CHUNK), strict=True)
    for one, two, target in pairs:
        logits, changed = logits_of(original.model, one), logits_of(quantised.model, two)
        difference = (logits - changed).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.double().sum())
        squares += float(logits.double().var(dim=1, correction=0).sum())
        losses = [F.cross_entropy(values, target, reduction="sum") for values in (changed, logits)]
        lost += float(losses[0] - losses[1])
    positions = len(hidden)
    mean = total / (positions * logits.shape[1])
    return Quality(largest, mean, math.exp(lost / positions), math.sqrt(squares / positions))


def bitsandbytes_options(device: torch.device, *, int8: bool, adapters: bool) -> dict[str, object]:
    """What ``from_pretrained`` takes for ``--llm_8bit``.

    Raises InputError: bitsandbytes does not import, there is no GPU, or our int8 or adapters are asked for as well.
    """
    if int8:
        raise InputError(CONTRADICTION)
    if adapters:
        raise InputError(
            "--llm_8bit: this checkpoint has adapters (language_model_adapters or --lora_rank), which bitsandbytes' "
            "weights cannot be merged with; use --llm_int8"
        )
    try:
        import bitsandbytes  # noqa: F401  (a CUDA build; present on few machines)
        from transformers import BitsAndBytesConfig
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"--llm_8bit needs bitsandbytes, which does not import here ({first_line(error)}): "
            "pip install -r requirements-cuda.txt, or use --llm_int8, which needs nothing"
        ) from error
    if device.type == "cpu":
        raise InputError(
            "--llm_8bit needs a CUDA device: add --llm_device auto, or use --llm_int8, which works on every device"
        )
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) → int8 (O, I) and scale (O,) float32; a row of zeros stays zeros. No float copy of the whole is made.

    Raises:
        ValueError: a weight is not finite.
    """
    whole = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in spans(*weight.shape, weight.device):
        part = weight.detach()[rows].float()
        largest = part.abs().amax(dim=1)
        if not bool(largest.isfinite().all()):
            raise ValueError("weights that are not finite cannot be quantised")
        scale[rows] = largest / LEVELS
        whole[rows] = (part / scale[rows].clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return whole, scale


class Int8Linear(FrozenLinear):
    """A frozen linear layer whose ``weight`` (O, I) is int8, with ``scale`` (O,) float32 and a float bias.

    All three are parameters without gradients, so that they are counted, moved and left out of distributed
    gradients as other frozen weights are.
    """

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a float matrix first
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @classmethod
    def of(cls, layer: nn.Linear) -> Int8Linear:
        """The int8 copy of a linear layer; its bias is shared."""
        return cls(*quantise_rows(layer.weight), layer.bias)

    @classmethod
    def like(cls, layer: nn.Linear) -> Int8Linear:
        """One of the shape and on the device of ``layer``, whose weights are still to be loaded."""
        weight, scale = torch.empty_like(layer.weight, dtype=torch.int8), torch.empty_like(layer.weight[:, 0])
        return cls(weight, scale, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        if (compiled := self.compiled(x)) is not None:
            return compiled
        if (product := gpu_decode.int8_product(x, self.weight, self.scale, self.bias)) is not None:
            return product
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        rows = x.reshape(-1, x.shape[-1])
        return WidenedProduct.apply(rows, self.weight, self.scale, self.bias).reshape(*x.shape[:-1], self.out_features)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # The scale stays float32 when the model's dtype changes: its rounding error would affect whole rows.
        scale = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype is not torch.float32:
            self.scale.data = scale.to(self.scale.device)
        return self


class Int8Head(nn.Linear):
    """A head that multiplies with an int8 copy of its ``weight``, which may be the embedding table.

    ``weight`` stays as it was: a token reads one row of the table, and transformers looks up its dtype.
    """

    def __init__(self, head: nn.Linear, narrow: Int8Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = head.weight.shape
        self.weight, self.bias = head.weight, head.bias
        self.narrow = narrow

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x)
