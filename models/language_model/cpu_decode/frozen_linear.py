"""A frozen linear layer: compiled products for few rows of activations, blocks of widened weights for many.

    x [..., I] → [..., O]

Being an ``nn.Linear``, it is found by adapters (which wrap it) and by quantisation (which replaces it).

A CPU without bfloat16 instructions emulates bfloat16 products, several times slower than float32 ones. There a block of
the frozen weights at a time is widened to float32, multiplied in float32 and dropped: forward, where no compiled
product (``gemm.py``) is faster, and backward to the inputs. Int8 weights are widened alike, to bfloat16 where the CPU
multiplies that. No second copy of the model exists. The reference is ``F.linear`` in float32.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

try:
    from models.language_model.cpu_decode import gemm
    from models.language_model.cpu_decode.gemv import few_rows, product
except (ImportError, RuntimeError) as error:  # numba has no build for every platform, or no folder for its cache
    logging.getLogger(__name__).warning("decoding uses PyTorch's matrix products: numba does not import (%s)", error)

    gemm = None

    def few_rows(*_: Tensor) -> bool:
        return False


# Weights widened at a time: on a CPU 5 MB in float32, which stay in the shared cache; a GPU is occupied by more.
BLOCK = {"cpu": 5 << 18, "other": 1 << 24}
# Of bfloat16 that meet int8 weights. More are faster by PyTorch's product with widened weights, where the CPU has one.
INT8_ROWS = 48
# Instructions that multiply these dtypes themselves, by torch's names.
_NATIVE = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}


@cache
def is_native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype`` without emulation.

    By the processor's flags, not by timing: the numbers of a run do not depend on what else the machine does.
    """
    flags = torch.cpu.get_capabilities()
    return dtype not in _NATIVE or any(flags.get(name, False) for name in _NATIVE[dtype])


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which matrices of ``dtype`` are multiplied fastest on ``device``."""
    return torch.float32 if device.type == "cpu" and not is_native(dtype) else dtype


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of the module would do more than its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


class FrozenLinear(nn.Linear):
    """``nn.Linear`` with our products where they are faster: few rows without gradients, and emulated dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        if (compiled := self.compiled(x)) is not None:
            return compiled
        # As a matrix: for a strided (B, L, I) torch would repeat the weights for every sample.
        return many_rows(x.reshape(-1, x.shape[-1]), self.weight, self.bias).reshape(*x.shape[:-1], self.out_features)

    def compiled(self, x: Tensor) -> Tensor | None:
        """The output by the compiled product, None where PyTorch has to compute it."""
        weight, scale = self.stored()
        few = few_rows(x, weight) and not several_rows(x.reshape(-1, x.shape[-1]), weight)
        if not few:
            return None
        out, kind = product(x, weight, self.bias, scale), x.device.type
        return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out

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


def several_rows(x: Tensor, weight: Tensor) -> bool:
    """Whether there is a compiled product for x (R, I), faster than a GEMV and than PyTorch."""
    if weight.dtype is torch.int8:
        ours = x.dtype is not torch.bfloat16 or not is_native(x.dtype) or len(x) <= INT8_ROWS
    else:
        ours = product_dtype(x.dtype, x.device) is not x.dtype
    return gemm is not None and ours and gemm.applies(x, weight)


def many_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of x (R, I) and weight (O, I), widened where the CPU emulates their dtype."""
    kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if weight.requires_grad or weight.dtype is not kind or product_dtype(kind, x.device) is kind:
        return F.linear(x, weight, bias)
    return WidenedProduct.apply(x.to(kind), weight, None, bias)


class WidenedProduct(torch.autograd.Function):
    """x (R, I) · (weight · scale)ᵀ + bias → (R, O) in the dtype of x; a block of weights is widened at a time.

    Args (of ``apply``):
        weight: (O, I), frozen; int8 with ``scale`` (O,), or of the dtype of x without. bias: (O,), frozen.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)  # nothing widened waits for the backward pass
        if several_rows(x, weight):
            wide = gemm.product(x, weight, scale)
            return (wide if bias is None else wide.add_(bias)).to(x.dtype)
        kind = product_dtype(x.dtype, x.device)
        inputs, out = x.to(kind), x.new_empty(len(x), len(weight))
        # Bfloat16 holds int8 as it is, and its sums do not overflow: they are scaled, fewer numbers than the weights.
        late = scale is not None and kind is torch.bfloat16
        for rows in spans(*weight.shape, x.device):
            part = F.linear(inputs, widen(weight[rows], None if scale is None or late else scale[rows], kind))
            part = part * scale[rows] if late else part
            out[:, rows] = part if bias is None else part + bias[rows]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        kind = product_dtype(grad.dtype, grad.device)
        outer = grad.to(kind)
        if kind is torch.float32:  # sums over blocks of rows, which are read as they lie in memory
            out = outer.new_zeros(len(grad), weight.shape[1])
            for rows in spans(*weight.shape, grad.device):
                out.addmm_(outer[:, rows], widen(weight[rows], None if scale is None else scale[rows], kind))
            return out.to(grad.dtype), None, None, None
        out = outer.new_empty(len(grad), weight.shape[1])
        # Columns at a time: each is one whole sum, none is rounded on the way.
        for columns in spans(*weight.T.shape, grad.device):
            out[:, columns] = outer @ widen(weight[:, columns], scale, kind)
        return out, None, None, None


def widen(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """weight (O, I) · scale (O,) in ``dtype``; multiplied in float32, rounded once."""
    if scale is None:
        return weight.to(dtype)
    return torch.mul(weight, scale[:, None], out=torch.empty(weight.shape, dtype=dtype, device=weight.device))


def spans(length: int, width: int, device: torch.device) -> list[slice]:
    """``length`` lines of ``width`` values, so many at a time that a block is no larger than :data:`BLOCK`."""
    step = max(1, BLOCK.get(device.type, BLOCK["other"]) // max(1, width))
    return [slice(first, min(length, first + step)) for first in range(0, length, step)]
