"""The selective scan of Mamba-1: one function in front of several backends.

Letters: B batch, E channels (inner width), L tokens, N state.
The backend is chosen once per device type: the first of ``BACKENDS`` that serves the device, imports and passes
its self-test there. The log names it, and says why the ones before it were passed over. The environment variable
``MAMBA_SCAN_BACKEND`` forces one by name.

Source of the recurrence: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752), algorithm 2, with the conventions of github.com/state-spaces/mamba.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from config.errors import InputError

logger = logging.getLogger(__name__)

FORCE_VARIABLE = "MAMBA_SCAN_BACKEND"
AXES = {"u": "BEL", "delta": "BEL", "A": "EN", "B": "BNL", "C": "BNL", "D": "E", "z": "BEL", "delta_bias": "E",
        "initial_state": "BEN"}  # fmt: skip


class ScanInputs(NamedTuple):
    """The tensors of a scan, with the shapes of :data:`AXES`; for a single step without the axis L."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    initial_state: Tensor | None = None


# (inputs, delta_softplus, reverse) → y (B, E, L), last state (B, E, N)
ScanFunction = Callable[[ScanInputs, bool, bool], tuple[Tensor, Tensor]]


class BackendUnavailable(Exception):
    """A backend cannot serve here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with a ``scan`` of type :data:`ScanFunction`.

    The module ``backend_NAME`` is imported when the backend is first considered. If it defines ``check(device_type)``,
    that runs next and raises ``BackendUnavailable`` where the implementation imports but does not work. If it defines
    ``state_update``, ``selective_state_update`` uses that for a float32 state.
    """

    name: str
    device_types: frozenset[str] | None = None  # None: any
    forced_types: frozenset[str] = frozenset()  # served too when forced, as in Triton's interpreter
    double: bool = True  # computes in float64 when the input is float64
    automatic: bool = True  # chosen without being forced

    def serves(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    def load(self, device_type: str, double: bool) -> ModuleType:
        """Import and check the module, or raise ``BackendUnavailable``."""
        if not self.serves(device_type) and device_type not in self.forced_types:
            raise BackendUnavailable(f"it runs on {', '.join(sorted(self.device_types))}, not on {device_type}")
        if double and not self.double:
            raise BackendUnavailable("it computes in float32 and the input is float64")
        try:
            module = importlib.import_module(f"{__name__}.backend_{self.name}")
        except ImportError as error:
            raise BackendUnavailable(f"importing it fails: {error}") from error
        if hasattr(module, "check"):
            module.check(device_type)
        return module


# In order of preference. PyTorch on ROCm calls its devices "cuda" too.
BACKENDS: tuple[Backend, ...] = (
    Backend("mamba_ssm", frozenset({"cuda"}), double=False),
    Backend("triton", frozenset({"cuda", "xpu"}), frozenset({"cpu"}), double=False),
    Backend("numba", frozenset({"cpu"}), double=False),
    Backend("torch"),
    Backend("reference", automatic=False),
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the selective state-space recurrence along the last axis.

    With Δ = softplus(delta + delta_bias) (either part optional):
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t;  y_t = (<C_t, h_t> + D u_t) · silu(z_t).

    Args:
        u, delta, z: (B, E, L), float32, bfloat16, float16 or float64, any strides.
        A: (E, N), real, negative. B, C: (B, N, L). D, delta_bias: (E,).
        delta_softplus: pass delta (with its bias) through softplus, linear above 20.
        initial_state: (B, E, N), the state before the first token; zeros if absent.
        return_last_state: also return the state after the last token.
        reverse: walk from the last token to the first (so the "last" state is the one after token 0); equals
            flipping every sequence, scanning and flipping back, without the copies.

    Returns:
        y (B, E, L) in the dtype of ``u``, and if asked the last state (B, E, N) in float32 (float64 for a
        float64 ``u``). The state is kept in that precision whatever the inputs are. Gradients reach every
        tensor argument, and flow in from y and from the last state; they can be taken once, not twice.

    Raises:
        ValueError: shapes or devices disagree.
        InputError: ``MAMBA_SCAN_BACKEND`` names no backend, or one that cannot serve here.
    """
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"u must be (B, E, L) and A (E, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check_shapes(inputs, dict(zip("BELN", (*u.shape, A.shape[1]), strict=True)), u.device)
    backend = _resolve(u.device.type, u.dtype is torch.float64, os.environ.get(FORCE_VARIABLE, ""))
    # Autocast would turn the backends' own matrix products into half precision.
    with torch.autocast(u.device.type, enabled=False):
        y, last_state = backend.scan(inputs, delta_softplus, reverse)
    return (y, last_state) if return_last_state else y


def selective_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """One step of ``selective_scan``, for decoding; ``state`` (B, E, N) is updated in place.

    u, delta, z: (B, E); A: (E, N); B, C: (B, N); D, delta_bias: (E,). Returns y (B, E) in the dtype of ``u``.
    The arithmetic has the precision of ``state``. Not differentiable, because the state is overwritten.

    Raises:
        ValueError: shapes or devices disagree.
        InputError: as in ``selective_scan``.
    """
    if state.ndim != 3:
        raise ValueError(f"state must be (B, E, N), got {tuple(state.shape)}")
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias)
    _check_shapes(inputs, dict(zip("BEN", state.shape, strict=True)), state.device)
    update = reference_state_update
    if state.dtype is torch.float32:
        backend = _resolve(state.device.type, False, os.environ.get(FORCE_VARIABLE, ""))
        update = getattr(backend, "state_update", reference_state_update)
    return update(state, inputs, delta_softplus)


def reference_state_update(state: Tensor, inputs: ScanInputs, delta_softplus: bool) -> Tensor:
    """``selective_state_update`` in PyTorch operations, for any device and dtype."""
    u, delta, A, B, C, D, z, delta_bias, _ = inputs
    dtype = state.dtype
    with torch.no_grad():
        step = delta.to(dtype)
        if delta_bias is not None:
            step = step + delta_bias.to(dtype)
        if delta_softplus:
            step = F.softplus(step, threshold=20)
        x = u.to(dtype)
        state.mul_(torch.exp(step[..., None] * A.to(dtype)))
        state.addcmul_((step * x)[..., None], B.to(dtype)[:, None, :])
        y = (state * C.to(dtype)[:, None, :]).sum(-1)
        if D is not None:
            y = y + D.to(dtype) * x
        if z is not None:
            y = y * F.silu(z.to(dtype))
        return y.to(u.dtype)


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> ScanFunction:
    """Make a backend's two passes one differentiable scan.

    Args:
        forward: (inputs, delta_softplus, reverse, keep) → y, the last state and, if ``keep``, one tensor for backward.
        backward: (inputs without the initial state, that tensor, gradients of y and of the last state or None,
            delta_softplus, reverse, which of the nine are wanted) → gradients of the nine tensors in any dtype; those
            of absent ones and of unwanted ones are not read.
    """

    def scan(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            return _TwoPasses.apply(forward, backward, delta_softplus, reverse, *inputs)
        return forward(inputs, delta_softplus, reverse, False)[:2]

    return scan


class _TwoPasses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, forward: Callable, backward: Callable, softplus: bool, reverse: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, last_state, kept = forward(ScanInputs(*tensors), softplus, reverse, True)
        ctx.save_for_backward(*tensors[:-1], kept)
        ctx.run, ctx.options = backward, (softplus, reverse)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        return y, last_state

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        with torch.autocast(kept.device.type, enabled=False):
            wanted = ctx.needs_input_grad[4:]
            grads = ctx.run(ScanInputs(*tensors), kept, grad_y, grad_last, *ctx.options, wanted)
            return (None,) * 4 + tuple(
                grad.to(dtype) if want else None for grad, dtype, want in zip(grads, ctx.dtypes, wanted, strict=True)
            )


def triton_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether our Triton kernels compute there: for those beside the scan, which have one plain form otherwise.

    On CUDA also where the scan itself is mamba-ssm's; forcing another backend switches them off.
    """
    forced = os.environ.get(FORCE_VARIABLE, "")
    if dtype is torch.float64 or forced not in ("", "triton", "mamba_ssm"):
        return False
    return (device.type != "cpu" or forced == "triton") and _triton_loads(device.type)


@functools.cache
def _triton_loads(device_type: str) -> bool:
    (triton,) = (backend for backend in BACKENDS if backend.name == "triton")
    try:
        triton.load(device_type, double=False)
    except BackendUnavailable as reason:
        logger.info("Triton kernels on %s: none (%s)", device_type, reason)
        return False
    return True


@functools.cache
def _resolve(device_type: str, double: bool, forced: str) -> ModuleType:
    """Choose the backend; cached, so that the choice and its announcement happen once."""
    candidates = [b for b in BACKENDS if (b.name == forced if forced else b.automatic and b.serves(device_type))]
    if not candidates:
        valid = ", ".join(b.name for b in BACKENDS)
        raise InputError(f"{FORCE_VARIABLE}={forced}: no such backend; use one of {valid}, or unset it")
    note = f" (forced by {FORCE_VARIABLE})" if forced else ""
    for backend in candidates:
        try:
            module = backend.load(device_type, double)
        except BackendUnavailable as reason:
            if forced:
                message = f"{FORCE_VARIABLE}={forced} cannot be used: {reason}; fix that or unset it"
                raise InputError(message) from reason
            note += f" (not {backend.name}: {reason})"
            continue
        kind = device_type + (" float64" if double else "")
        logger.info("selective scan on %s: %s%s", kind, backend.name, note)
        return module
    raise AssertionError("the backend torch serves any device")


def backend_name(device_type: str) -> str:
    """The backend that serves float32 on this device. Raises InputError as the scan does."""
    module = _resolve(device_type, False, os.environ.get(FORCE_VARIABLE, ""))
    return module.__name__.rpartition("backend_")[2]


def _check_shapes(inputs: ScanInputs, sizes: dict[str, int], device: torch.device) -> None:
    """Refuse disagreeing shapes here: the compiled kernels index without bounds checks."""
    for name, tensor in zip(AXES, inputs, strict=True):
        if tensor is None:
            continue
        expected = tuple(sizes[axis] for axis in AXES[name] if axis in sizes)
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
