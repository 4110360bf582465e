"""A frozen linear layer with a compiled GEMV for few rows of activations; still an ``nn.Linear``.

    x [..., I] → [..., O]

Being an ``nn.Linear``, it is found by adapters (which wrap it) and by quantisation (which replaces it).
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from models.language_model.cpu_decode.gemv import few_rows, product
except ImportError as error:  # numba has no build for every platform
    logging.getLogger(__name__).warning("decoding uses PyTorch's matrix products: numba does not import (%s)", error)

    def few_rows(*_: Tensor) -> bool:
        return False


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would do more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FrozenLinear(nn.Linear):
    """``nn.Linear`` with our product for few rows on a CPU, without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        if (compiled := self.compiled(x)) is not None:
            return compiled
        # As a matrix: for a strided (B, L, I) torch would repeat the weights for every sample.
        rows = F.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        return rows.reshape(*x.shape[:-1], self.out_features)

    def compiled(self, x: Tensor) -> Tensor | None:
        """The output by the compiled product, None where PyTorch has to compute it."""
        weight, scale = self.stored()
        return product(x, weight, self.bias, scale) if few_rows(x, weight) else None

    def stored(self) -> tuple[Tensor, Tensor | None]:
        """Weights as they lie in memory (O, I), and the factor of each row (O,) if they need one."""
        return self.weight, None

    def is_ready(self) -> bool:
        """Whether a compiled kernel can read the weights in place, and nothing else happens in a call."""
        kind = self.weight.dtype in (torch.float32, torch.bfloat16, torch.int8) and self.weight.is_contiguous()
        return kind and "forward" not in self.__dict__ and not has_hooks(self)


def freeze_linear_layers(model: nn.Module) -> None:
    """Turn every ``nn.Linear`` (no subclass) below ``model`` into a :class:`FrozenLinear`, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
