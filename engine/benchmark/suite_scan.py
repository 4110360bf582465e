"""Suite ``scan``: the selective scan alone, forward and with its backward pass, in float32."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from engine.benchmark.limits import copy_limit, exponential_limit, read_limits
from engine.benchmark.peak_memory import Peak, in_own_process, measure_peak
from engine.benchmark.pictures import Panel
from engine.benchmark.ratios import speedup
from engine.benchmark.report import Report
from engine.benchmark.rivals import SCANS, why_missing
from engine.benchmark.sizes import Size
from engine.benchmark.timing import Candidate, Timing, take_turns

WARM_TOKENS = 8


def scan_inputs(size: Size, tokens: int, device: torch.device) -> list[Tensor]:
    """u, delta (1, E, L), A (E, N), B, C (1, N, L), D (E,), z (1, E, L), delta_bias (E,), all to be differentiated."""
    torch.manual_seed(0)
    E, N = size.inner, size.state
    shapes = [(1, E, tokens), (1, E, tokens), (E, N), (1, N, tokens), (1, N, tokens), (E,), (1, E, tokens), (E,)]
    values = [torch.randn(shape, device=device) for shape in shapes]
    values[2] = -torch.arange(1.0, N + 1, device=device).expand(E, N).contiguous()
    values[7] -= 4  # steps of about 0.02, as a trained model has them
    return [value.requires_grad_() for value in values]


def forward(name: str, inputs: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return SCANS[name](*inputs)


def forward_backward(name: str, inputs: list[Tensor], above: Tensor) -> None:
    """``above``: the gradient that flows in, of y's shape."""
    for value in inputs:
        value.grad = None
    SCANS[name](*inputs).backward(above)


def scan_peak(name: str, size: Size, tokens: int, training: bool, device: str) -> Peak:
    """Peak memory of one scan whose inputs exist."""
    place = torch.device(device)
    small = scan_inputs(size, WARM_TOKENS, place)
    forward_backward(name, small, torch.ones_like(small[0]))
    inputs = scan_inputs(size, tokens, place)
    above = torch.ones_like(inputs[0])
    call = functools.partial(forward_backward, name, inputs, above) if training else lambda: forward(name, inputs)
    return measure_peak(call, place)


def run(report: Report) -> None:
    """Times, agreement, peak memory, and the share of the copy bandwidth that the forward scan reaches."""
    size, device = report.size, report.device
    L, short = size.scan_tokens, size.scan_training_tokens
    report.settings |= {"B": 1, "L": L, "E": size.inner, "N": size.state, "dtype": "float32"}
    present = []
    for name in SCANS:
        reason = why_missing(name, device)
        present += [] if reason else [name]
        if reason:
            report.add_missing(f"{name}: {reason}")
    inputs, small = scan_inputs(size, L, device), scan_inputs(size, short, device)
    for name in present[1:]:
        error = (forward(name, small) - forward("ours", small)).abs().max()
        report.add_value(f"largest difference of y to {name} (L {short})", float(error))

    limits = [*read_limits(size.block, device), copy_limit(size.block, device), exponential_limit(device)]
    slow = f"L {short}: its backward pass takes the square of L"
    candidates = [limit.candidate(size.rounds) for limit in limits]
    candidates += [Candidate(f"forward {n}", functools.partial(forward, n, inputs), size.rounds) for n in present]
    for name in present:
        pairs = [(inputs, L)] if name != "transformers" else []
        pairs += [(small, short)] if name in ("ours", "transformers") else []
        for values, length in pairs:
            call = functools.partial(forward_backward, name, values, torch.ones_like(values[0]))
            note = slow if name == "transformers" else ""
            candidates.append(Candidate(f"forward+backward {name}{_at(length, L)}", call, size.rounds, note=note))
    times = take_turns(candidates, device)
    report.add_limits(limits, times)
    report.add_times(timing for name, timing in times.items() if name.startswith("forward"))
    seconds = times["forward ours"].median
    moved = sum(inputs[i].nbytes for i in (0, 1, 3, 4, 6)) + inputs[0].nbytes
    report.add_share("forward scan, of copying what goes in and out", moved / report.limits["copy"]["rate"] / seconds)
    needed = inputs[0].numel() * (size.state + 2)  # a decay per state; a softplus and a gate per token and channel
    rate = report.limits["exponentials: torch.exp"]["rate"]
    report.add_share("forward scan, of its exponentials alone", needed / rate / seconds)

    _add_memory(report, present)
    _add_ratios(report, times, short)
    report.panels += _panels(report, times)


def _at(length: int, usual: int) -> str:
    return "" if length == usual else f" L {length}"


def _add_memory(report: Report, present: list[str]) -> None:
    size = report.size
    measure: Callable[..., object] = in_own_process if size.own_process else lambda f, *a: f(*a)
    for name in present:
        for training in (False, True):
            if training and name == "transformers":
                continue
            what = "forward+backward" if training else "forward"
            peak = measure(scan_peak, name, size, size.scan_tokens, training, str(report.device))
            report.add_peak(f"{what} {name}", peak)


def _add_ratios(report: Report, times: dict[str, Timing], short: int) -> None:
    ours = times["forward ours"].median
    report.add_ratio("forward_vs_transformers", speedup(ours, times["forward transformers"].median))
    pair = [times[f"forward+backward {name} L {short}"].median for name in ("ours", "transformers")]
    report.add_ratio("forward_backward_vs_transformers", speedup(*pair))
    report.add_note(
        f"forward_backward_vs_transformers is taken at L {short} for both; at L {report.size.scan_tokens} it is "
        "larger, because the rival's backward pass writes a full (E, L, N) gradient per token"
    )
    for name in ("mambapy", "mamba_ssm"):
        if f"forward {name}" not in times:
            continue
        report.add_ratio(f"forward_vs_{name}", speedup(ours, times[f"forward {name}"].median))
        both = [times[f"forward+backward {who}"].median for who in ("ours", name)]
        report.add_ratio(f"forward_backward_vs_{name}", speedup(*both))
        call = [report.memory[f"forward+backward {who}"]["call"] for who in ("ours", name)]
        if call[1]:
            report.add_ratio(f"peak_memory_vs_{name}", call[0] / call[1])
            report.add_note(f"peak_memory_vs_{name}: forward+backward, memory above the inputs")
        else:
            report.add_missing(f"peak_memory_vs_{name}: nothing to see at this size")


def _panels(report: Report, times: dict[str, Timing]) -> list[Panel]:
    length = report.size.scan_tokens
    once = {n.removeprefix("forward "): t.median for n, t in times.items() if n.startswith("forward ")}
    both = {n.removeprefix("forward+backward "): t.median for n, t in times.items() if n.startswith("forward+")}
    memory = {
        name.removeprefix("forward+backward "): peak["call"] / 1e6
        for name, peak in report.memory.items()
        if name.startswith("forward+")
    }
    where = f"B 1, L {length}, E {report.size.inner}, N {report.size.state}"
    return [
        Panel(f"forward ({where})", "seconds", once),
        Panel("forward + backward", "seconds", both),
        Panel("peak memory, forward + backward", "MB above the inputs", memory),
    ]
