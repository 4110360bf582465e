"""The selective scan of Mamba-1, one function in front of several backends.

Letters: B batch, E channels (inner width), L tokens, N state.
The backend is chosen once per device type: the first of ``BACKENDS`` that serves the device, loads and passes
its self-test there; the choice is announced in the log, with why the ones before it were passed over. The
environment variable ``MAMBA_SCAN_BACKEND`` forces one by name.

Source of the recurrence: Gu & Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"
(arXiv 2312.00752), algorithm 2, with the conventions of github.com/state-spaces/mamba.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from config.errors import InputError

logger = logging.getLogger(__name__)

FORCE_VARIABLE = "MAMBA_SCAN_BACKEND"

ScanFunction = Callable[..., tuple[Tensor, Tensor]]


class BackendUnavailable(Exception):
    """A backend cannot serve here; the message says what is missing."""


@dataclass(frozen=True)
class Backend:
    """One implementation: a module with ``scan(...)``, signature as in ``scan_reference.scan``.

    The module is imported when the backend is first considered. If it defines ``check(device_type)``, that
    runs next and raises ``BackendUnavailable`` where the implementation imports but does not work. If it
    defines ``state_update(...)``, ``selective_state_update`` uses that for a float32 state.
    """

    name: str
    module: str
    device_types: frozenset[str] | None = None  # None: any
    forced_types: frozenset[str] = frozenset()  # served too when forced, as in Triton's interpreter
    double: bool = True  # computes in float64 when the input is float64
    automatic: bool = True  # chosen without being forced

    def serves(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    def load(self, device_type: str, double: bool) -> ScanFunction:
        """Return the scan function, or raise ``BackendUnavailable``."""
        if not self.serves(device_type) and device_type not in self.forced_types:
            raise BackendUnavailable(f"it runs on {', '.join(sorted(self.device_types))}, not on {device_type}")
        if double and not self.double:
            raise BackendUnavailable("it computes in float32 and the input is float64")
        try:
            module = importlib.import_module(self.module)
        except ImportError as error:
            raise BackendUnavailable(f"importing it fails: {error}") from error
        if hasattr(module, "check"):
            module.check(device_type)
        return module.scan


# In order of preference.
BACKENDS: tuple[Backend, ...] = (
    # PyTorch on ROCm calls its devices "cuda" too.
    Backend("mamba_ssm", "models.selective_scan.backend_mamba_ssm", frozenset({"cuda"}), double=False),
    Backend(
        "triton", "models.selective_scan.backend_triton", frozenset({"cuda", "xpu"}), frozenset({"cpu"}), double=False
    ),
    Backend("numba", "models.selective_scan.backend_numba", frozenset({"cpu"}), double=False),
    Backend("torch", "models.selective_scan.backend_torch"),
    Backend("reference", "models.selective_scan.backend_reference", automatic=False),
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
    _check_shapes(u, delta, A, B, C, D, z, delta_bias, initial_state)
    scan = _resolve(u.device.type, u.dtype is torch.float64, os.environ.get(FORCE_VARIABLE, ""))
    # Autocast would turn the backends' own matrix products into half precision.
    with torch.autocast(u.device.type, enabled=False):
        y, last_state = scan(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
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
    _check_update(state, u, delta, A, B, C, D, z, delta_bias)
    update = plain_state_update
    if state.dtype is torch.float32:
        scan = _resolve(state.device.type, False, os.environ.get(FORCE_VARIABLE, ""))
        update = getattr(sys.modules[scan.__module__], "state_update", plain_state_update)
    return update(state, u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def plain_state_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """``selective_state_update`` in plain PyTorch, for any device and dtype."""
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


@functools.cache
def _resolve(device_type: str, double: bool, forced: str) -> ScanFunction:
    """Choose the backend; cached, so that the choice and its announcement happen once."""
    kind = device_type + (" float64" if double else "")
    if forced:
        backend = {b.name: b for b in BACKENDS}.get(forced)
        if backend is None:
            valid = ", ".join(b.name for b in BACKENDS)
            raise InputError(f"{FORCE_VARIABLE}={forced}: no such backend; use one of {valid}, or unset it")
        try:
            scan = backend.load(device_type, double)
        except BackendUnavailable as reason:
            raise InputError(f"{FORCE_VARIABLE}={forced} cannot be used: {reason}; mend that or unset it") from reason
        logger.info("selective scan on %s: %s (forced by %s)", kind, forced, FORCE_VARIABLE)
        return scan
    passed_over = []
    for backend in BACKENDS:
        if not backend.automatic or not backend.serves(device_type):
            continue
        try:
            scan = backend.load(device_type, double)
        except BackendUnavailable as reason:
            passed_over.append(f"{backend.name}: {reason}")
            continue
        logger.info("selective scan on %s: %s%s", kind, backend.name, "".join(f" (not {p})" for p in passed_over))
        return scan
    raise InputError(f"no selective-scan backend serves {kind}: {'; '.join(passed_over)}")


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    """Refuse disagreeing shapes here: the compiled kernels index without bounds checks."""
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"u must be (B, E, L) and A (E, N), got {tuple(u.shape)} and {tuple(A.shape)}")
    batch, channels, length = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (batch, channels, length)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states, length)),
        "C": (C, (batch, states, length)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels, length)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
    }
    _check_each(expected, u.device)


def _check_update(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    if state.ndim != 3:
        raise ValueError(f"state must be (B, E, N), got {tuple(state.shape)}")
    batch, channels, states = state.shape
    expected = {
        "u": (u, (batch, channels)),
        "delta": (delta, (batch, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, states)),
        "C": (C, (batch, states)),
        "D": (D, (channels,)),
        "z": (z, (batch, channels)),
        "delta_bias": (delta_bias, (channels,)),
    }
    _check_each(expected, state.device)


def _check_each(expected: dict[str, tuple[Tensor | None, tuple[int, ...]]], device: torch.device) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device}")
