"""A small run of a selective-scan backend on the very device, against the float64 reference on the CPU.

A backend built for other hardware may fail to import, to compile or to launch, or return wrong numbers; each
becomes one line of ``BackendUnavailable``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from models.selective_scan import BackendUnavailable, ScanFunction
from models.selective_scan.backend_reference import scan as reference_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check_scan(
    scan: ScanFunction, device_type: str, channels: int, length: int, states: int = 3, absent: tuple[str, ...] = ()
) -> None:
    """Compare y, the last state and every gradient: float32 forward, bfloat16 backward in time.

    Args:
        scan: as in ``scan_reference``.
        device_type: where to run it.
        channels, length: more than the backend takes at a time, and no multiple of it.
        absent: arguments to leave out, such as those that send a call elsewhere.

    Raises:
        BackendUnavailable: it raises, or its numbers differ.
    """
    sizes = (2, channels, length, states)
    for dtype, reverse in ((torch.float32, False), (torch.bfloat16, True)):
        attempt(functools.partial(_compare, scan, device_type, sizes, dtype, reverse, absent), device_type)


def attempt(test: Callable[[], None], device_type: str) -> None:
    """Run ``test``; whatever it raises becomes ``BackendUnavailable``."""
    try:
        test()
    except BackendUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 (compilers, drivers and extensions raise exceptions of any type)
        raise BackendUnavailable(f"its self-test on {device_type} raises {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Type and first line of an exception, as a compiler's message can fill a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def expect_close(name: str, actual: Tensor, expected: Tensor, tolerance: float, device_type: str) -> None:
    """Refuse ``actual`` unless its relative error, in norm, is at most ``tolerance``; NaN is refused."""
    actual = actual.detach().cpu().double()
    error = float((actual - expected.detach()).norm() / expected.detach().norm())
    if not error <= tolerance:
        raise BackendUnavailable(f"its self-test on {device_type} gives wrong numbers: {name} is off by {error:.1e}")


def _compare(
    scan: ScanFunction,
    device_type: str,
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    reverse: bool,
    absent: tuple[str, ...],
) -> None:
    random = torch.Generator().manual_seed(0)
    batch, channels, length, states = sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    inputs = {
        "u": normal(batch, channels, length).to(dtype),
        "delta": normal(batch, length, channels).to(dtype).transpose(1, 2),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(batch, length, states).to(dtype).transpose(1, 2),
        "C": normal(batch, states, length).to(dtype),
        "D": normal(channels),
        "z": normal(batch, channels, length).to(dtype),
        "delta_bias": normal(channels) - 2,
        "initial_state": normal(batch, channels, states),
    }
    inputs = {name: value for name, value in inputs.items() if name not in absent}
    grads = normal(batch, channels, length).to(dtype), normal(batch, channels, states)
    actual = _results(scan, {k: v.to(device_type) for k, v in inputs.items()}, grads, reverse)
    exact = _results(reference_scan, {k: v.double() for k, v in inputs.items()}, grads, reverse)
    for name, expected in exact.items():
        expect_close(name, actual[name], expected, TOLERANCE[dtype], device_type)


def _results(
    scan: ScanFunction, inputs: dict[str, Tensor], grads: tuple[Tensor, Tensor], reverse: bool
) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        y, last = scan(*(leaves.get(name) for name in NAMES), True, reverse)
        found = torch.autograd.grad((y, last), list(leaves.values()), (grads[0].to(y), grads[1].to(last)))
    return {"y": y, "the last state": last, **{f"the gradient of {k}": g for k, g in zip(leaves, found, strict=True)}}
