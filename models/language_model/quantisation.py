"""Which layers of the language model become int8, and what that does to its logits.

Ours (``--llm_int8``) works on every device; bitsandbytes (``--llm_8bit``) needs a GPU and its own installation.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaForCausalLM
from transformers.models.mamba.modeling_mamba import MambaMixer

from config.errors import InputError
from models.language_model.int8_linear import Int8Head, Int8Linear

QUANTISED = ("in_proj", "out_proj")
CHUNK = 256  # positions whose logits exist at a time
CONTRADICTION = "--llm_8bit and --llm_int8 are two ways to the same thing: give one of them"


class HasModel(Protocol):
    model: MambaForCausalLM


class Quality(NamedTuple):
    """Logits of the quantised model against the plain one's, and its perplexity over the plain one's."""

    max_difference: float
    mean_difference: float
    perplexity_ratio: float
    deviation: float  # of the plain model's logits: what the differences are small or large against


@torch.no_grad()
def quantise_int8(model: MambaForCausalLM) -> int:
    """Replace the large matrices of a frozen model by int8 ones, in place, each freed as its copy exists.

    The mixers' ``in_proj`` and ``out_proj`` and the head; the embedding table keeps its dtype. Returns how many.
    """
    places: list[tuple[nn.Module, str]] = [
        (module, name) for module in model.modules() if isinstance(module, MambaMixer) for name in QUANTISED
    ]
    for module, name in places:
        setattr(module, name, Int8Linear.of(getattr(module, name)))
    model.lm_head = Int8Head(model.lm_head)
    return len(places) + 1


@torch.no_grad()
def quantisation_quality(plain: HasModel, quantised: HasModel, ids: Tensor) -> Quality:
    """Compare two language models on a text.

    Args:
        ids: (B, L) token ids, L at least 2.

    Returns:
        Largest and mean absolute difference of the logits over all positions and embedding rows, and the ratio of the
        perplexities, 1 where nothing is lost.
    """
    hidden, other = (lm.model.backbone(input_ids=ids, use_cache=False).last_hidden_state for lm in (plain, quantised))
    hidden, other = hidden[:, :-1].flatten(0, 1), other[:, :-1].flatten(0, 1)
    largest, total, lost, squares = 0.0, 0.0, 0.0, 0.0
    pairs = zip(hidden.split(CHUNK), other.split(CHUNK), ids[:, 1:].flatten().split(CHUNK), strict=True)
    for one, two, target in pairs:
        logits, changed = _logits(plain.model, one), _logits(quantised.model, two)
        difference = (logits - changed).abs()
        largest, total = max(largest, float(difference.max())), total + float(difference.double().sum())
        squares += float(logits.double().var(dim=1, correction=0).sum())
        worse = F.cross_entropy(changed, target, reduction="sum") - F.cross_entropy(logits, target, reduction="sum")
        lost += float(worse)
    positions = len(hidden)
    mean, deviation = total / (positions * logits.shape[1]), math.sqrt(squares / positions)
    return Quality(largest, mean, math.exp(lost / positions), deviation)


def _logits(model: MambaForCausalLM, hidden: Tensor) -> Tensor:
    """As the model's own forward makes them."""
    return model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()


def bitsandbytes_options(device: torch.device) -> dict[str, object]:
    """What ``from_pretrained`` takes for ``--llm_8bit``.

    Raises:
        InputError: bitsandbytes does not import, or there is no GPU.
    """
    try:
        import bitsandbytes  # noqa: F401  (a CUDA build; present on few machines)
        from transformers import BitsAndBytesConfig
    except (ImportError, RuntimeError) as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"--llm_8bit needs bitsandbytes, which does not import here ({cause}): "
            "pip install -r requirements-cuda.txt, or use --llm_int8, which needs nothing"
        ) from error
    if device.type == "cpu":
        raise InputError(
            "--llm_8bit needs a CUDA device: add --llm_device auto, or use --llm_int8, which works on every device"
        )
    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}
