"""The selective scan by the CUDA kernels of the package mamba-ssm (2.3), where it is installed and works.

Its ``selective_scan_fn`` does less than ``selective_scan`` promises. What it cannot do is done here:

- no initial state, no empty tensor, at most 256 states: such calls go, whole, to ``backend_triton``,
  or to ``backend_torch`` where Triton does not work. A decoding step goes the same way.
- no walk from the end: the sequences are flipped and y is flipped back.
- no gradient from the last state: it returns one without saying that backward ignores it. Here that gradient
  is computed by the other backend, from the inputs; it costs nothing unless the last state is used in a loss.
- one dtype for u, delta, B, C and z, float32 for A, D and delta_bias: mixed calls are promoted, never rounded.

mamba-ssm is imported by ``check``, not by this module: a wheel made for other hardware may raise anything.
Source: github.com/state-spaces/mamba, ``mamba_ssm/ops/selective_scan_interface.py`` and ``csrc/selective_scan``.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from config.errors import first_line
from models.selective_scan import BackendUnavailable, ScanInputs, reference_state_update
from models.selective_scan.selftest import check_scan

logger = logging.getLogger(__name__)

MOST_STATES = 256
KERNEL_TOKENS = 2048  # that the kernel takes at a time


def check(device_type: str) -> None:
    """Raise ``BackendUnavailable`` unless mamba-ssm imports and returns the right numbers on this device."""
    _kernel()
    # An initial state would send the test to the other backend.
    check_scan(scan, device_type, channels=5, length=KERNEL_TOKENS + 52, absent=("initial_state",))


def scan(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """See ``selective_scan.selective_scan``. Returns y (B, E, L) and the last state (B, E, N)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state = inputs
    if initial_state is not None or u.numel() == 0 or A.shape[1] > MOST_STATES:
        return _other(u.device.type).scan(inputs, delta_softplus, reverse)
    moving = (u, delta, B, C) if z is None else (u, delta, B, C, z)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in moving))
    x, size, B_, C_, *gate = (_aligned((t.flip(-1) if reverse else t).to(dtype)) for t in moving)
    A_, D_, bias = (None if t is None else t.float().contiguous() for t in (A, D, delta_bias))
    y, last = _kernel()(
        x, size, A_, B_, C_, D=D_, z=gate[0] if gate else None, delta_bias=bias,
        delta_softplus=delta_softplus, return_last_state=True,
    )  # fmt: skip
    last = _LastState.apply(last.detach(), delta_softplus, reverse, u, delta, A, B, C, delta_bias)
    return (y.flip(-1) if reverse else y).to(u.dtype), last


def state_update(state: Tensor, inputs: ScanInputs, delta_softplus: bool) -> Tensor:
    """See ``selective_scan.selective_state_update``."""
    update = getattr(_other(state.device.type), "state_update", reference_state_update)
    return update(state, inputs, delta_softplus)


class _LastState(torch.autograd.Function):
    """The last state as computed already, with the gradient that the kernel leaves out."""

    @staticmethod
    def forward(ctx: FunctionCtx, last: Tensor, delta_softplus: bool, reverse: bool, *tensors: Tensor | None) -> Tensor:
        """``tensors``: u, delta, A, B, C and delta_bias."""
        ctx.save_for_backward(*tensors)
        ctx.options = delta_softplus, reverse
        return last.clone(memory_format=torch.contiguous_format)  # a slice of the kernel's work space

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad(), torch.autocast(grad_last.device.type, enabled=False):
            *leaves, bias = (None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors)
            _, last = _other(grad_last.device.type).scan(ScanInputs(*leaves, delta_bias=bias), *ctx.options)
        del leaves[4]  # C does not reach the state
        grads = torch.autograd.grad(last, leaves if bias is None else [*leaves, bias], grad_last)
        return None, None, None, *grads[:4], None, None if bias is None else grads[4]


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous and starting at a multiple of 16 bytes: the kernel reads that many at once."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@functools.cache
def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    try:
        return importlib.import_module("mamba_ssm").selective_scan_fn
    except Exception as error:  # noqa: BLE001 (an extension made for other hardware may raise anything)
        raise BackendUnavailable(f"importing it fails: {type(error).__name__}: {first_line(error)}") from error


@functools.cache
def _other(device_type: str) -> ModuleType:
    """The backend for calls that the kernel cannot serve."""
    name = "triton"
    try:
        module = importlib.import_module("models.selective_scan.backend_triton")
        module.check(device_type)
    except (ImportError, BackendUnavailable) as reason:
        name, module = f"torch (not triton: {reason})", importlib.import_module("models.selective_scan.backend_torch")
    logger.info("selective scan on %s: calls that mamba_ssm cannot serve go to %s", device_type, name)
    return module
