"""Suite ``prefill``: the language model reads visual tokens and a question, up to the first token's logits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from engine.benchmark.language_models import (
    our_prefill,
    product_operations,
    product_shapes,
    prompt,
    rival_prefill,
)
from engine.benchmark.limits import best_rate, product_limits
from engine.benchmark.pictures import Panel
from engine.benchmark.random_lm import our_lm, random_mamba, same_weights
from engine.benchmark.ratios import limit_seconds, speedup
from engine.benchmark.report import Report
from engine.benchmark.rivals import use_mambapy, why_missing
from engine.benchmark.timing import Candidate, take_turns


def run(report: Report) -> None:
    """Times beside the matrix products' own limit, transformers' loop and mambapy, all with the same weights."""
    size, device = report.size, report.device
    L = size.visual + size.text
    report.settings |= {
        "visual_tokens": size.visual, "text_tokens": size.text, "layers": size.layers, "width": size.width,
        "dtype": str(size.dtype),
    }  # fmt: skip
    model = random_mamba(size, device)
    rivals = {"transformers": same_weights(model)}
    reason = why_missing("mambapy", device, size.dtype)
    if reason:
        report.add_missing(f"mambapy: {reason}")
    else:
        rivals["mambapy"] = use_mambapy(same_weights(model))
    lm = our_lm(model, size)
    embeds = prompt(size, L, device)
    answers: dict[str, Tensor] = {}

    def keep(name: str, call: functools.partial[Tensor]) -> None:
        answers[name] = call()

    limits = product_limits(product_shapes(size, L), size.dtype, device, size.work)
    if size.dtype is not torch.float32:
        limits += product_limits(product_shapes(size, L), torch.float32, device, size.work)
    candidates = [limit.candidate(size.rounds) for limit in limits]
    candidates.append(Candidate("ours", functools.partial(keep, "ours", functools.partial(our_prefill, lm, embeds)),
                                size.rounds))  # fmt: skip
    for name, rival in rivals.items():
        call = functools.partial(keep, name, functools.partial(rival_prefill, rival, embeds))
        candidates.append(Candidate(name, call, 3))
    times = take_turns(candidates, device)

    report.add_limits(limits, times)
    report.add_times(times[name] for name in ("ours", *rivals))
    for name in rivals:
        difference = (answers[name].float() - answers["ours"].float()).abs().max() / answers[name].float().abs().max()
        report.add_value(f"largest relative difference of the logits to {name}", float(difference))
    used = limits[:2]
    operations = product_operations(size, L, size.layers) + 2.0 * size.vocabulary * size.width
    limit = limit_seconds(operations, best_rate(used, times))
    report.add_value("seconds of the matrix products alone at the best rate", limit)
    report.add_share("matrix products in all of the prefill", limit / times["ours"].median)
    report.add_ratio("prefill_vs_matmul_limit", times["ours"].median / limit)
    for name in rivals:
        report.add_ratio(f"prefill_vs_{name}", speedup(times["ours"].median, times[name].median))
    bars = {name: times[name].median for name in ("ours", *rivals)} | {"limit: matrix products": limit}
    report.panels.append(Panel(f"{size.visual} visual + {size.text} text tokens", "seconds", bars, logarithmic=False))
