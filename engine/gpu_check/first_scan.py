"""The first scan of a process: how long it waits for compilers. Imports nothing that it does not wait for."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from engine.gpu_check.context import messages
from models.selective_scan import ScanInputs, selective_scan
from models.selective_scan.selftest import results, sample_inputs

STATE = 16  # N


def first_scan(device: str) -> tuple[str, float]:
    """What the choice of the backend logs, and the seconds of the choice and of the first forward and backward pass."""
    torch.zeros(1, device=device) + 1  # the card has started
    inputs = on(sample_inputs(1, 64, 40, STATE, torch.bfloat16), torch.device(device))
    with messages("models.selective_scan") as found:
        started = time.perf_counter()
        results(public_scan, inputs, False)
        torch.get_device_module(device).synchronize()
        seconds = time.perf_counter() - started
    return "; ".join(found), seconds


def public_scan(inputs: ScanInputs, delta_softplus: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """The scan as models call it, by the backend that was chosen."""
    given = {name: value for name, value in inputs._asdict().items() if value is not None}
    return selective_scan(**given, delta_softplus=delta_softplus, return_last_state=True, reverse=reverse)


def on(inputs: ScanInputs, device: torch.device) -> ScanInputs:
    return ScanInputs(*(None if t is None else t.to(device) for t in inputs))
