"""Triton kernels for what lies between a Mamba block's matrix products: convolution with SiLU, and RMSNorm.

Letters: B batch, L tokens, D width, E inner width, K taps. In plain PyTorch each of them reads and writes its tensor a
dozen times over, and a GPU spends as long on that as on the products. Here every tensor is read once and written once,
in its own dtype; arithmetic is float32. Backward computes again from the inputs what it needs, and gives the gradients
of the activations alone: the language model's weights are frozen. The plain references, which serve CPUs and weights
that are trained, are in ``hf_patch``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.selective_scan.backend_triton import _on
from models.selective_scan.selftest import TOLERANCE, expect_close

# Convolution: tokens at a time, times in a program, channels. Four warps: 16 bytes of bfloat16 a thread and token.
ROWS, REPEATS, BLOCK, WARPS = 4, 8, 256, 4
_STRIDES = ["length"]


def check(device_type: str) -> None:
    """Raise ``BackendUnavailable`` unless the kernels give the right numbers and gradients on this device."""
    random, E, L = torch.Generator().manual_seed(0), BLOCK + 3, ROWS * REPEATS + 3

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).bfloat16()  # so that every dtype starts from the same numbers

    x, before, weight, bias, grad = normal(2, L, E), normal(2, 3, E), normal(E, 4), normal(E), normal(2, L, E)
    for dtype, tolerance in TOLERANCE.items():

        def convolved(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return ConvSiLU.apply(x.to(dtype), *(t.to(x.device, dtype) for t in (weight, bias, before)))

        def exactly_convolved(x: Tensor) -> Tensor:
            inputs, taps = torch.cat([before.double(), x], 1).mT, weight.double()[:, None]
            return F.silu(F.conv1d(inputs, taps, bias.double(), groups=E)).mT

        def normed(x: Tensor, dtype: torch.dtype = dtype) -> Tensor:
            return sum(NormAndResidual.apply(x, bias.to(x.device, dtype), 1e-5, dtype, torch.float32))

        def exactly_normed(x: Tensor) -> Tensor:
            return F.rms_norm(x, (E,), bias.double(), 1e-5) + x

        for name, ours, exact in (("convolution", convolved, exactly_convolved), ("norm", normed, exactly_normed)):
            with torch.enable_grad():
                leaves = x.to(device_type, torch.float32).requires_grad_(), x.double().requires_grad_()
                found, expected = ours(leaves[0]), exact(leaves[1])
                gradients = [
                    torch.autograd.grad(y, leaf, grad.to(y))[0]
                    for y, leaf in zip((found, expected), leaves, strict=True)
                ]
            expect_close(name, found, expected, tolerance, device_type)
            expect_close(f"the gradient of the {name}", *gradients, tolerance, device_type)


@triton.jit
def _tokens(pointer, stride_t, t, length, e, in_e):
    """(tokens, BLOCK) of a channels-last (L, E) sample, in float32; zeros outside."""
    here = ((t >= 0) & (t < length))[:, None] & in_e[None, :]
    return tl.load(pointer + t.to(tl.int64)[:, None] * stride_t + e[None, :], mask=here, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_STRIDES)
def conv_silu_kernel(
    x, before, y,  # (B, L, E), (B, K-1, E), (B, L, E), channels contiguous
    weight, bias,  # (E, K), (E,), contiguous
    length, channels,
    x_b, x_t, before_b, before_t, y_b, y_t,
    HAS_BEFORE: tl.constexpr, HAS_BIAS: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, REPEATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = SiLU(causal convolution of x)."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_e = e < channels
    sample = tl.program_id(2).to(tl.int64)
    x += sample * x_b
    before += sample * before_b
    y += sample * y_b
    for repeat in range(REPEATS):
        t = (tl.program_id(1) * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
        out = tl.zeros((ROWS, BLOCK), tl.float32)
        if HAS_BIAS:
            out += tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(TAPS):
            row = _tokens(x, x_t, t + (k - TAPS + 1), length, e, in_e)
            if HAS_BEFORE:
                row += _tokens(before, before_t, t + k, TAPS - 1, e, in_e)
            out += row * tl.load(weight + e * TAPS + k, mask=in_e, other=0.0).to(tl.float32)[None, :]
        here = (t < length)[:, None] & in_e[None, :]
        place = y + t.to(tl.int64)[:, None] * y_t + e[None, :]
        tl.store(place, (out * tl.sigmoid(out)).to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=_STRIDES)
def conv_silu_backward_kernel(
    x, before, grad_y, grad_x,  # as in forward
    weight, bias,
    length, channels,
    x_b, x_t, before_b, before_t, gy_b, gy_t, gx_b, gx_t,
    HAS_BEFORE: tl.constexpr, HAS_BIAS: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, REPEATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x: a token reaches the K outputs from its own on, which are computed again."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_e = e < channels
    sample = tl.program_id(2).to(tl.int64)
    x += sample * x_b
    before += sample * before_b
    grad_y += sample * gy_b
    grad_x += sample * gx_b
    for repeat in range(REPEATS):
        t = (tl.program_id(1) * REPEATS + repeat) * ROWS + tl.arange(0, ROWS)
        rows = ()
        for r in tl.static_range(2 * TAPS - 1):
            row = _tokens(x, x_t, t + (r - TAPS + 1), length, e, in_e)
            if HAS_BEFORE:
                row += _tokens(before, before_t, t + r, TAPS - 1, e, in_e)
            rows = rows + (row,)
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        for ahead in tl.static_range(TAPS):
            out = tl.zeros((ROWS, BLOCK), tl.float32)
            if HAS_BIAS:
                out += tl.load(bias + e, mask=in_e, other=0.0).to(tl.float32)[None, :]
            for k in tl.static_range(TAPS):
                out += rows[ahead + k] * tl.load(weight + e * TAPS + k, mask=in_e, other=0.0).to(tl.float32)[None, :]
            sigmoid = tl.sigmoid(out)
            flow = _tokens(grad_y, gy_t, t + ahead, length, e, in_e) * sigmoid * (1.0 + out * (1.0 - sigmoid))
            tap = tl.load(weight + e * TAPS + (TAPS - 1 - ahead), mask=in_e, other=0.0).to(tl.float32)
            grad += flow * tap[None, :]
        here = (t < length)[:, None] & in_e[None, :]
        place = grad_x + t.to(tl.int64)[:, None] * gx_t + e[None, :]
        tl.store(place, grad.to(grad_x.dtype.element_ty), mask=here)


@triton.jit
def rms_norm_kernel(
    x, weight, y,  # (rows, D), (D,), (rows, D), contiguous
    width, epsilon,
    ROUNDED: tl.constexpr,  # the dtype in which x enters the norm
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = x / rms(x) · weight, rounded where MambaRMSNorm rounds."""
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    here = i < width
    value = tl.load(x + row + i, mask=here, other=0.0).to(ROUNDED).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / width + epsilon)
    normed = (value * factor).to(ROUNDED).to(tl.float32)
    scaled = normed * tl.load(weight + i, mask=here, other=0.0).to(tl.float32)
    tl.store(y + row + i, scaled.to(y.dtype.element_ty), mask=here)


@triton.jit
def rms_norm_backward_kernel(
    x, weight, grad_y, grad_residual, grad_x,  # grad_y, grad_residual, grad_x like x
    width, epsilon,
    ROUNDED: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of x through the norm, plus the one that came past it."""
    row = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    here = i < width
    value = tl.load(x + row + i, mask=here, other=0.0).to(ROUNDED).to(tl.float32)
    factor = tl.rsqrt(tl.sum(value * value, axis=0) / width + epsilon)
    flow = tl.load(grad_y + row + i, mask=here, other=0.0).to(tl.float32)
    flow *= tl.load(weight + i, mask=here, other=0.0).to(tl.float32)
    normed = value * factor
    grad = factor * (flow - normed * (tl.sum(flow * normed, axis=0) / width))
    if HAS_RESIDUAL:
        grad += tl.load(grad_residual + row + i, mask=here, other=0.0).to(tl.float32)
    tl.store(grad_x + row + i, grad.to(grad_x.dtype.element_ty), mask=here)


class ConvSiLU(torch.autograd.Function):
    """``causal_conv_silu`` of ``hf_patch``, with the gradient of x alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
        """x (B, L, E), weight (E, K), bias (E,), before (B, K-1, E) → (B, L, E)."""
        x, before = _channels_contiguous(x), None if before is None else _channels_contiguous(before)
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        ctx.save_for_backward(x, weight, bias, before)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch_conv(conv_silu_kernel, (x, y), weight, bias, before)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, before = ctx.saved_tensors
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _launch_conv(conv_silu_backward_kernel, (x, _channels_contiguous(grad_y), grad_x), weight, bias, before)
        return grad_x, None, None, None


def _launch_conv(
    kernel: triton.JITFunction, tensors: tuple[Tensor, ...], weight: Tensor, bias: Tensor | None, before: Tensor | None
) -> None:
    x, *others = tensors
    batch, length, channels = x.shape
    prior = x if before is None else before  # never read where absent
    strides = [stride for t in (x, prior, *others) for stride in t.stride()[:2]]
    with _on(x.device):
        kernel[(triton.cdiv(channels, BLOCK), triton.cdiv(length, ROWS * REPEATS), batch)](
            x, prior, *others, weight, weight if bias is None else bias, length, channels, *strides,
            HAS_BEFORE=before is not None, HAS_BIAS=bias is not None, TAPS=weight.shape[1],
            ROWS=ROWS, REPEATS=REPEATS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class NormAndResidual(torch.autograd.Function):
    """RMSNorm of a block's input, and the input itself as the residual: their gradients are added in one kernel."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, epsilon: float, rounded: torch.dtype, residual: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """hidden (..., D) → the norm of ``hidden`` rounded to ``rounded``, and ``hidden`` in the dtype ``residual``."""
        hidden, weight = hidden.contiguous(), weight.contiguous()
        ctx.save_for_backward(hidden, weight)
        ctx.options = epsilon, rounded
        ctx.set_materialize_grads(False)
        normed = torch.empty(hidden.shape, dtype=torch.promote_types(rounded, weight.dtype), device=hidden.device)
        _launch_norm(rms_norm_kernel, (hidden, weight, normed), epsilon, rounded)
        return normed, hidden.view_as(hidden) if hidden.dtype is residual else hidden.to(residual)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, grad_normed: Tensor | None, grad_residual: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        if grad_normed is None:
            return None if grad_residual is None else grad_residual.to(hidden.dtype), None, None, None, None
        past = grad_normed if grad_residual is None else grad_residual.contiguous()  # never read where absent
        grad = torch.empty_like(hidden)
        tensors = (hidden, weight, grad_normed.contiguous(), past, grad)
        _launch_norm(rms_norm_backward_kernel, tensors, *ctx.options, HAS_RESIDUAL=grad_residual is not None)
        return grad, None, None, None, None


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _launch_norm(
    kernel: triton.JITFunction, tensors: tuple[Tensor, ...], epsilon: float, rounded: torch.dtype, **options: bool
) -> None:
    width = tensors[0].shape[-1]
    block = triton.next_power_of_2(width)
    with _on(tensors[0].device):
        kernel[(tensors[0].numel() // width,)](
            *tensors, width, epsilon, ROUNDED=_TYPES[rounded], BLOCK=block, num_warps=min(8, max(1, block // 512)),
            **options,
        )  # fmt: skip
