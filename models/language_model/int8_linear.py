"""Linear layers with frozen int8 weights: half the bytes of bfloat16 for a machine that waits for its memory.

    W [O, I] ≈ q [O, I] int8 · scale [O] float32        scale[o] = max_i |W[o, i]| / 127

Each output row has its own scale, symmetric around zero, as the vector-wise scheme of LLM.int8() has it for weights
(Dettmers et al., arXiv 2208.07339); activations stay as they are. Few rows on a CPU meet the int8 weights in our
compiled product, all else meets them widened, a block at a time. The plain reference is
``F.linear(x, layer.dequantised(), layer.bias)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.language_model.cpu_decode import frozen_linear
from models.language_model.cpu_decode.frozen_linear import FrozenLinear

LEVELS = 127
# Widened weights that exist at a time: a block that stays in a core's cache, and on a GPU one that fills it.
BLOCK = {"cpu": 1 << 20, "other": 1 << 24}


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) → int8 (O, I) and scale (O,) float32; a row of zeros stays zeros. No float copy of the whole is made.

    Raises:
        ValueError: a weight is not finite.
    """
    whole = torch.empty_like(weight, dtype=torch.int8, memory_format=torch.contiguous_format)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for rows in _spans(weight.shape[0], weight.shape[1], weight.device):
        part = weight.detach()[rows].float()
        largest = part.abs().amax(dim=1)
        if not bool(largest.isfinite().all()):
            raise ValueError("weights that are not finite cannot be quantised")
        scale[rows] = largest / LEVELS
        whole[rows] = (part / scale[rows].clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round()
    return whole, scale


class Int8Linear(FrozenLinear):
    """A frozen linear layer whose ``weight`` (O, I) is int8, with ``scale`` (O,) float32 and a plain bias.

    All three are parameters that never ask for gradients: what a module does with the frozen (counting, moving,
    leaving them out of what processes exchange) it does with them too.
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

    def forward(self, x: Tensor) -> Tensor:
        if frozen_linear.product is not None and frozen_linear.few_rows(x, self.weight):
            return frozen_linear.product(x, self.weight, self.bias, self.scale)
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        rows = x.reshape(-1, x.shape[-1])
        return _Widened.apply(rows, self.weight, self.scale, bias).reshape(*x.shape[:-1], self.out_features)

    def stored(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.scale

    def dequantised(self) -> Tensor:
        """The weights (O, I) in float32."""
        return self.weight * self.scale[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        # A change of the model's dtype is none of the scale's: rounded, it would bend whole rows.
        scale = self.scale.data
        super()._apply(fn, recurse)
        if self.scale.dtype is not torch.float32:
            self.scale.data = scale.to(self.scale.device)
        return self


class Int8Head(nn.Linear):
    """A head that may share its ``weight`` with the embedding table, and multiplies with an int8 copy of it.

    A table of embeddings is read one row a token, a head as a whole. ``weight`` stays what it was, for the table and
    for transformers, which looks up its dtype.
    """

    def __init__(self, head: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = head.weight.shape
        self.weight, self.bias = head.weight, head.bias
        self.narrow = Int8Linear.of(head)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(x)


class _Widened(torch.autograd.Function):
    """x (R, I) · (weight · scale)ᵀ + bias → (R, O) in the dtype of x, which the widened blocks have too."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)  # int8: nothing widened waits for the backward pass
        parts = [
            F.linear(x, block, None if bias is None else bias[rows])
            for rows, block in _widened_rows(weight, scale, x.dtype)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        # Columns at a time: each is one whole sum, none is rounded on the way.
        parts = [grad @ block for block in _widened_columns(weight, scale, grad.dtype)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1), None, None, None


def _widened_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their weights in ``dtype``; the memory of a block is used again for the next."""
    for rows in _spans(weight.shape[0], weight.shape[1], weight.device):
        yield rows, _widen(weight[rows], scale[rows], dtype)


def _widened_columns(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for columns in _spans(weight.shape[1], weight.shape[0], weight.device):
        yield _widen(weight[:, columns], scale, dtype)


def _widen(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplied in float32, rounded once."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    return torch.mul(weight, scale[:, None], out=out)


def _spans(length: int, width: int, device: torch.device) -> list[slice]:
    """``length`` lines of ``width`` values, so many at a time that a block is no larger than :data:`BLOCK`."""
    step = max(1, BLOCK.get(device.type, BLOCK["other"]) // max(1, width))
    return [slice(first, min(length, first + step)) for first in range(0, length, step)]
