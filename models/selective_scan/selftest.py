"""A small run of a selective-scan backend on the very device, against the float64 reference on the CPU.

A backend built for other hardware may fail to import, to compile or to launch, or return wrong numbers; each
becomes one line of ``BackendUnavailable``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from config.errors import first_line
from models.selective_scan import BackendUnavailable, ScanFunction, ScanInputs
from models.selective_scan.backend_reference import scan as reference_scan

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def check_scan(
    scan: ScanFunction, device_type: str, channels: int, length: int, states: int = 3, absent: tuple[str, ...] = ()
) -> None:
    """Compare y, the last state and every gradient: float32 forward, bfloat16 backward in time.

    Args:
        scan: of a backend.
        device_type: where to run it.
        channels, length: more than the backend takes at a time, and no multiple of it.
        absent: arguments to leave out, such as those that send a call elsewhere.

    Raises:
        BackendUnavailable: it raises, or its numbers differ.
    """

    def compare() -> None:
        for dtype, reverse in ((torch.float32, False), (torch.bfloat16, True)):
            inputs = sample_inputs(2, channels, length, states, dtype)._replace(**dict.fromkeys(absent))
            actual = results(scan, ScanInputs(*(t if t is None else t.to(device_type) for t in inputs)), reverse)
            exact = results(reference_scan, ScanInputs(*(t if t is None else t.double() for t in inputs)), reverse)
            for name, expected in exact.items():
                expect_close(name, actual[name], expected, TOLERANCE[dtype], device_type)

    attempt(compare, device_type)


def attempt(test: Callable[[], None], device_type: str) -> None:
    """Run ``test``; whatever it raises becomes ``BackendUnavailable``."""
    try:
        with torch.inference_mode(False):  # in which a caller may be, and where nothing has gradients
            test()
    except BackendUnavailable:
        raise
    except Exception as error:  # noqa: BLE001 (compilers, drivers and extensions raise exceptions of any type)
        reason = f"{type(error).__name__}: {first_line(error)}"  # a compiler's message can fill a page
        raise BackendUnavailable(f"its self-test on {device_type} raises {reason}") from error


def expect_close(name: str, actual: Tensor, expected: Tensor, tolerance: float, device_type: str) -> None:
    """Refuse ``actual`` unless its relative error, in norm, is at most ``tolerance``; NaN is refused."""
    actual = actual.detach().cpu().double()
    error = float((actual - expected.detach()).norm() / expected.detach().norm())
    if not error <= tolerance:
        raise BackendUnavailable(f"its self-test on {device_type} gives wrong numbers: {name} is off by {error:.1e}")


def sample_inputs(batch: int, channels: int, length: int, states: int, dtype: torch.dtype) -> ScanInputs:
    """Random inputs, the same at each call; of each pair of long tensors one has its channels last."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    return ScanInputs(
        u=normal(batch, channels, length).to(dtype),
        delta=normal(batch, length, channels).to(dtype).transpose(1, 2),
        A=-torch.exp(normal(channels, states)),
        B=normal(batch, length, states).to(dtype).transpose(1, 2),
        C=normal(batch, states, length).to(dtype),
        D=normal(channels),
        z=normal(batch, channels, length).to(dtype),
        delta_bias=normal(channels) - 2,
        initial_state=normal(batch, channels, states),
    )


def results(scan: ScanFunction, inputs: ScanInputs, reverse: bool, use_last: bool = True) -> dict[str, Tensor]:
    """y, the last state and every tensor's gradient, for random gradients of y and, if ``use_last``, of the state."""
    with torch.enable_grad():
        leaves = ScanInputs(*(None if t is None else t.detach().requires_grad_() for t in inputs))
        y, last = scan(leaves, True, reverse)
        random = torch.Generator().manual_seed(1)  # rounded to bfloat16, so that every dtype starts from the same ones
        grads = [torch.randn(t.shape, generator=random).bfloat16().to(t) for t in (y, last)]
        present = {f"the gradient of {name}": leaf for name, leaf in leaves._asdict().items() if leaf is not None}
        used = 2 if use_last else 1
        found = torch.autograd.grad((y, last)[:used], list(present.values()), grads[:used])
    return {"y": y, "the last state": last, **dict(zip(present, found, strict=True))}
