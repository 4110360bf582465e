"""Low-rank adapters on the language model's linear layers: trained by peft, merged for use.

    in_proj(x) → in_proj(x) + (α / r) · B A x        A [r, D], B [2E, r]; B starts at zero

Stage 2 trains them on the input projections (--lora_rank); Stage 0 on all linear layers of the mixers.

The language model's own weights stay frozen and are saved nowhere; a checkpoint holds A and B alone. To write reports
the product is added to the weights once, so that decoding costs what it cost before, and peft is not needed.

Source: Hu et al. 2021 (arXiv 2106.09685); peft, ``inject_adapter_in_model``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MambaForCausalLM

from config.errors import InputError

INPUT_PROJECTION = ("in_proj",)
MIXER_LAYERS = ("in_proj", "x_proj", "dt_proj", "out_proj")
ALPHA_PER_RANK = 2  # α = 2 r: the learning rate need not change with the rank


class Adapters(nn.Module):
    """The trained low-rank matrices inside a language model, by the names of their layers."""

    def __init__(self, model: MambaForCausalLM, rank: int, targets: Sequence[str] = INPUT_PROJECTION) -> None:
        """Put fresh adapters into the layers named ``targets``, in float32 whatever the weights of ``model`` are in."""
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and needed in training alone

        # Into the blocks alone: for a whole Mamba peft refuses out_proj, whose weight its authors' kernel reads past
        # the adapter; our mixer calls the layer.
        fixed = {"lora_alpha": ALPHA_PER_RANK * rank, "lora_dropout": 0.0}
        inject_adapter_in_model(LoraConfig(r=rank, target_modules=[*targets], **fixed), model.backbone.layers)
        self.rank = rank
        self.layers: dict[str, dict[str, nn.Parameter]] = {
            name: {part: getattr(layer, f"lora_{part}")["default"].weight for part in "AB"}
            for name, layer in model.named_modules()
            if hasattr(layer, "lora_A")
        }
        # The very parameters of the model.
        self.matrices = nn.ParameterList(matrix for parts in self.layers.values() for matrix in parts.values())
        self.matrices.float().requires_grad_(True)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the rank, and each layer's A and B under the layer's name in the language model."""
        layers = {
            name: {part: matrix.detach().cpu().clone() for part, matrix in parts.items()}
            for name, parts in self.layers.items()
        }
        return {"rank": self.rank, "layers": layers}

    @torch.no_grad()
    def load(self, stored: Mapping[str, Any]) -> None:
        """Copy the matrices of :meth:`to_dict`; the rank and the layers must be the same."""
        for layer, parts in stored["layers"].items():
            for part, value in parts.items():
                self.layers[layer][part].copy_(value)


@torch.no_grad()
def merge(model: MambaForCausalLM, stored: Mapping[str, Any]) -> None:
    """Add the adapters of a checkpoint to the weights of a ``model`` without adapters, in place.

    Raises InputError: they belong to a model of another shape.
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
