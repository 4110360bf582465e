"""Suite ``memory``: peak memory of scan, prefill and training step against the number of tokens, beside the rivals."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.benchmark.language_models import prefill_peak, step_peak
from engine.benchmark.peak_memory import OutOfMemory, Peak, in_own_process
from engine.benchmark.pictures import Panel
from engine.benchmark.report import Report
from engine.benchmark.rivals import why_missing
from engine.benchmark.sizes import Size
from engine.benchmark.suite_scan import scan_peak

WHO = ("ours", "transformers", "mambapy")
TITLES = {
    "scan": "scan, forward + backward, float32",
    "prefill": "prefill",
    "train_step": "training step of Stage 2",
}


def run(report: Report) -> None:
    """Every point in a process of its own; rivals as far as time and memory allow."""
    size, device = report.size, str(report.device)
    layers = size.part_layers
    report.settings |= {"tokens": list(size.memory_tokens), "layers": layers, "width": size.width}
    report.settings |= {"dtype": str(size.dtype), "scan_dtype": "float32"}
    report.add_note(f"prefill and training step with {layers} of {size.layers} layers at full width")
    report.add_note("peak memory is that of the call alone: above weights and inputs, which exist before it")
    report.add_note(
        f"in training, transformers is measured up to {size.rival_memory_tokens} tokens (its time grows with their "
        f"square) and mambapy up to {size.scan_tokens} (its memory)"
    )
    kinds: dict[str, tuple[Callable[..., Peak], Callable[[str, int], tuple[object, ...]]]] = {
        "scan": (scan_peak, lambda who, n: (who, size, n, True, device)),
        "prefill": (prefill_peak, lambda who, n: (who, size, layers, n, device)),
        "train_step": (step_peak, lambda who, n: (who, size, layers, _parts(n), device)),
    }
    measure = in_own_process if size.own_process else lambda f, *a: f(*a)
    for kind, (function, arguments) in kinds.items():
        lines: dict[str, dict[int, float]] = {}
        for who in WHO:
            reason = why_missing(who, report.device, torch.float32 if kind == "scan" else size.dtype)
            if reason:
                report.add_missing(f"{kind} {who}: {reason}")
            else:
                lines[who] = {}
        for tokens in size.memory_tokens:
            for who in lines:
                if tokens > _most(size, kind, who):
                    continue
                try:
                    peak = measure(function, *arguments(who, tokens))
                except OutOfMemory as error:
                    report.add_missing(f"{kind} {who} at {tokens} tokens: {error}")
                    continue
                lines[who][tokens] = peak.call
                report.add_peak(f"{kind} {who} {tokens}", peak)
        _ratios(report, kind, lines)
        shown = {who: {n: max(v, 1e3) / 1e6 for n, v in points.items()} for who, points in lines.items() if points}
        report.panels.append(Panel(TITLES[kind], "MB above weights and inputs", lines=shown))


def _most(size: Size, kind: str, who: str) -> int:
    """Tokens up to which somebody is measured."""
    if who == "ours" or (kind == "prefill" and who == "transformers"):
        return max(size.memory_tokens)
    return size.rival_memory_tokens if who == "transformers" else size.scan_tokens


def _parts(tokens: int) -> tuple[int, int]:
    """Visual tokens, a square number as the bridge gives them, and the rest; about three quarters are visual."""
    side = int((0.77 * tokens) ** 0.5)
    return side * side, tokens - side * side


def _ratios(report: Report, kind: str, lines: dict[str, dict[int, float]]) -> None:
    """Ours over the rival's at the largest number of tokens that both have."""
    for who, points in lines.items():
        if who == "ours" or not points:
            continue
        tokens = max(points)
        if points[tokens]:
            report.add_ratio(f"{kind}_peak_memory_vs_{who}", lines["ours"][tokens] / points[tokens])
            report.add_note(f"{kind}_peak_memory_vs_{who} is taken at {tokens} tokens")
