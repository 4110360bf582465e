"""Low-rank adapters on the language model's input projections: trained by peft, merged for use.

    in_proj(x) → in_proj(x) + (α / r) · B A x        A [r, D], B [2E, r]; B starts at zero

The language model's own weights stay frozen and are saved nowhere; a checkpoint holds A and B alone. To write reports
the product is added to the weights once, so that decoding costs what it cost before, and peft is not needed.

Source: Hu et al. 2021 (arXiv 2106.09685); peft, ``inject_adapter_in_model``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaForCausalLM

from config.errors import InputError

TARGET = "in_proj"
ALPHA_PER_RANK = 2  # α = 2 r: the learning rate need not change with the rank
_PART = ".lora_{}.default.weight"


class Adapters(nn.Module):
    """The trained matrices of a language model that they have been put into, under their layers' names."""

    def __init__(self, model: MambaForCausalLM, rank: int) -> None:
        """Put fresh adapters into ``model``, in float32 whatever its weights are in.

        Raises:
            InputError: peft is not installed.
        """
        super().__init__()
        if importlib.util.find_spec("peft") is None:
            raise InputError("--lora_rank needs peft, which is not installed: pip install -r requirements.txt")
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=ALPHA_PER_RANK * rank, target_modules=[TARGET], lora_dropout=0.0), model
        )
        self.rank = rank
        matrices = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        self.names = list(matrices)
        for parameter in matrices.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        self.matrices = nn.ParameterList(matrices.values())  # the very parameters of the model

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the rank, and each layer's A and B under its name in the plain model."""
        named = dict(zip(self.names, self.matrices, strict=True))
        layers = sorted(name.removesuffix(_PART.format("A")) for name in named if name.endswith(_PART.format("A")))
        weights = {
            layer: {part: named[layer + _PART.format(part)].detach().cpu().clone() for part in "AB"} for layer in layers
        }
        return {"rank": self.rank, "layers": weights}

    def load(self, stored: Mapping[str, Any]) -> None:
        """Take over the matrices of :meth:`to_dict`; the rank and the layers must be the same."""
        own = dict(zip(self.names, self.matrices, strict=True))
        with torch.no_grad():
            for layer, parts in stored["layers"].items():
                for part, value in parts.items():
                    own[layer + _PART.format(part)].copy_(value)


@torch.no_grad()
def merge(model: MambaForCausalLM, stored: Mapping[str, Any]) -> None:
    """Add the adapters of a checkpoint to the weights of a plain ``model``, in place.

    Raises:
        InputError: they belong to a model of another shape.
    """
    layers = dict(model.named_modules())
    for name, parts in stored["layers"].items():
        weight: Tensor | None = getattr(layers.get(name), "weight", None)
        a, b = parts["A"], parts["B"]
        if weight is None or weight.shape != (b.shape[0], a.shape[1]):
            raise InputError(
                f"the checkpoint's adapter of layer '{name}' fits no layer of this language model: use the mamba_model "
                "that it was trained with"
            )
        product = ALPHA_PER_RANK * (b.float() @ a.float())
        weight.copy_(weight.float() + product.to(weight.device))
