"""Suite ``train_step``: one step of Stage 2 through the frozen language model, batch 1."""

from __future__ import annotations

import gc

import torch

from engine.benchmark.language_models import (
    Stage2Step,
    our_loss,
    product_operations,
    product_shapes,
    recomputes,
    rival_loss,
    step_peak,
)
from engine.benchmark.limits import best_rate, product_limits
from engine.benchmark.peak_memory import in_own_process
from engine.benchmark.pictures import Panel
from engine.benchmark.random_lm import our_lm, random_mamba, same_weights, weight_bytes
from engine.benchmark.ratios import limit_seconds, speedup
from engine.benchmark.report import Report
from engine.benchmark.rivals import use_mambapy, why_missing
from engine.benchmark.sizes import Size
from engine.benchmark.timing import Candidate, Timing, take_turns


def run(report: Report) -> None:
    """The whole model alone, then a part of it beside unpatched transformers."""
    size, device = report.size, report.device
    report.settings |= {
        "batch": 1, "visual_tokens": size.visual, "question_and_answer_tokens": size.answer, "layers": size.layers,
        "width": size.width, "dtype": str(size.dtype), "blocks_recomputed": recomputes(size),
    }  # fmt: skip
    report.add_note("the step starts at the encoder's features: bridge, language model, loss, gradients, AdamW")
    whole, limit = _whole(report)
    gc.collect()
    who = "ours, all layers"
    measure = in_own_process if size.own_process else lambda f, *a: f(*a)
    peak = measure(step_peak, "ours", size, size.layers, (size.visual, size.answer), str(device))
    report.add_peak(who, peak, "above weights, inputs and AdamW's averages")
    part = _beside_rivals(report)
    for name in ("transformers", "mambapy"):
        if name in part:
            report.add_ratio(f"train_step_vs_{name}", speedup(part["ours"].median, part[name].median))
    where = f"{size.rival_layers} layers, {size.rival_step[0]} + {size.rival_step[1]} tokens"
    report.add_note(f"train_step_vs_* are taken at {where} for both: the rival's backward pass takes the square of L")
    report.panels += [
        Panel(f"all {size.layers} layers, {size.visual} + {size.answer} tokens", "seconds",
              {"ours": whole.median, "limit: matrix products": limit}, logarithmic=False),
        Panel(where, "seconds", {name: timing.median for name, timing in part.items()}),
    ]  # fmt: skip


def _whole(report: Report) -> tuple[Timing, float]:
    size, device = report.size, report.device
    model = random_mamba(size, device)
    report.add_value("bytes of the weights", weight_bytes(model))
    lm = our_lm(model, size)
    lm.checkpointing(recomputes(size))
    step, loss = Stage2Step(size, size.visual, size.answer, device, lm.embed), our_loss(lm)
    tokens = size.visual + size.answer
    limits = product_limits(product_shapes(size, tokens), size.dtype, device, size.work)
    ours = Candidate("ours, all layers", lambda: step(loss), min(size.rounds, 3))
    times = take_turns([*(limit.candidate(ours.rounds) for limit in limits), ours], device)
    report.add_limits(limits, times)
    report.add_times([times[ours.name]])
    passes = 3 if recomputes(size) else 2  # forward, again, and the gradient of the inputs alone
    operations = passes * product_operations(size, tokens, size.layers)
    seconds = limit_seconds(operations, best_rate(limits, times))
    report.add_value(f"seconds of the matrix products alone, {passes} passes", seconds)
    report.add_share("matrix products in all of the step", seconds / times[ours.name].median)
    return times[ours.name], seconds


def _beside_rivals(report: Report) -> dict[str, Timing]:
    size, device = report.size, report.device
    model = random_mamba(size, device, size.rival_layers)
    losses = {"transformers": rival_loss(same_weights(model))}
    reason = why_missing("mambapy", device, size.dtype)
    if reason:
        report.add_missing(f"mambapy: {reason}")
    else:
        losses["mambapy"] = rival_loss(use_mambapy(same_weights(model)))
    lm = our_lm(model, size)
    lm.checkpointing(recomputes(size))
    losses = {"ours": our_loss(lm)} | losses
    candidates = [_candidate(name, loss, size, device, lm) for name, loss in losses.items()]
    times = take_turns(candidates, device)
    report.add_times(Timing(f"{name}, {size.rival_layers} layers", t.seconds, t.note) for name, t in times.items())
    return times


def _candidate(name: str, loss: object, size: Size, device: torch.device, lm: object) -> Candidate:
    step = Stage2Step(size, *size.rival_step, device, lm.embed)
    return Candidate(name, lambda: step(loss), 3, note=f"{size.rival_step[0]} + {size.rival_step[1]} tokens")
