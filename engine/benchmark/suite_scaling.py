"""Suite ``scaling``: cost against the number of visual tokens, beside an attention decoder of the same width."""

from __future__ import annotations

import functools

from engine.benchmark.language_models import (
    bridge_call,
    bridge_peak,
    our_prefill,
    prefill_peak,
    product_shapes,
    prompt,
    rival_prefill,
)
from engine.benchmark.limits import product_limits
from engine.benchmark.peak_memory import in_own_process
from engine.benchmark.pictures import Panel
from engine.benchmark.random_lm import our_lm, random_mamba
from engine.benchmark.ratios import vs_linear
from engine.benchmark.report import Report
from engine.benchmark.rivals import attention_decoder
from engine.benchmark.timing import Candidate, Timing, take_turns

READERS = ("ours", "attention", "bridge")


def run(report: Report) -> None:
    """Reading times and peaks of Mamba (in chunks), attention (fused, all at once), and our bridge."""
    size = report.size
    layers = size.part_layers
    report.settings |= {
        "tokens": list(size.scaling), "width": size.width, "mamba_layers": layers, "attention_layers": layers // 2,
        "dtype": str(size.dtype), "bridge_width": 512, "bridge_depth": 2, "bridge_dtype": "float32",
    }  # fmt: skip
    report.add_note(f"{layers} of {size.layers} layers at full width: all layers cost the same")
    report.add_note(
        "peak memory is that of the call alone: above weights and inputs, which exist before it; a prompt of "
        f"{size.scaling[-1]} tokens itself takes {size.scaling[-1] * size.width * size.dtype.itemsize / 1e6:.3g} MB"
    )
    times = _times(report)
    peaks = _peaks(report)
    short, long = size.scaling[2], size.scaling[-1]
    if (short, long) != (784, 12544):
        report.add_note(f"at this size the ratios named 784_to_12544 are from {short} to {long} tokens")
    report.add_ratio("time_784_to_12544_vs_linear", vs_linear(times["ours"], short, long))
    for name in ("attention", "bridge"):
        report.add_ratio(f"{name}_time_784_to_12544_vs_linear", vs_linear(times[name], short, long))
    for name, points in peaks.items():
        label = "peak_memory_784_to_12544" if name == "ours" else f"{name}_peak_memory_784_to_12544"
        if points[short]:
            report.add_ratio(label, points[long] / points[short])
        else:
            report.add_missing(f"{label}: nothing to see at this size")
    process = [report.memory[f"ours {tokens}"]["process"] for tokens in (short, long)]
    report.add_ratio("process_peak_memory_784_to_12544", process[1] / process[0])
    named = {"ours": "ours: Mamba, in chunks", "attention": "attention decoder", "bridge": "ours: bridge alone"}
    report.panels += [
        Panel("reading time", "seconds", lines={named[name]: times[name] for name in READERS}),
        Panel("peak memory of the call", "MB above weights and inputs",
              lines={named[n]: {t: max(v, 1e3) / 1e6 for t, v in peaks[n].items()} for n in READERS}),
    ]  # fmt: skip


def _times(report: Report) -> dict[str, dict[int, float]]:
    size, device = report.size, report.device
    lm = our_lm(random_mamba(size, device, size.part_layers), size)
    attention = attention_decoder(size, size.part_layers, device)
    limits = product_limits(product_shapes(size, 512), size.dtype, device, size.work)
    candidates = [limit.candidate(3) for limit in limits]
    for tokens in size.scaling:
        embeds = prompt(size, tokens, device)
        warm = tokens <= size.scaling[2]
        calls = {
            "ours": functools.partial(our_prefill, lm, embeds),
            "attention": functools.partial(rival_prefill, attention, embeds),
            "bridge": bridge_call(size, tokens, device),
        }
        candidates += [Candidate(f"{name} {tokens}", call, 3, warm=warm) for name, call in calls.items()]
    timings = take_turns(candidates, device)
    report.add_limits(limits, timings)
    found: dict[str, Timing] = {name: timing for name, timing in timings.items() if name.split()[0] in READERS}
    report.add_times(found.values())
    return {name: {tokens: found[f"{name} {tokens}"].median for tokens in size.scaling} for name in READERS}


def _peaks(report: Report) -> dict[str, dict[int, float]]:
    size, device = report.size, str(report.device)
    measure = in_own_process if size.own_process else lambda f, *a: f(*a)
    peaks: dict[str, dict[int, float]] = {name: {} for name in READERS}
    for tokens in size.scaling:
        for name in READERS:
            if name == "bridge":
                peak = measure(bridge_peak, size, tokens, device)
            else:
                peak = measure(prefill_peak, name, size, size.part_layers, tokens, device)
            peaks[name][tokens] = peak.call
            report.add_peak(f"{name} {tokens}", peak)
    return peaks
