"""The suites of the language model: what is timed and weighed in each, beside which baselines and limits."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.benchmark.data_suite import data
from engine.benchmark.measure import Candidate, OutOfMemory, finish, memory_limits, product_limit
from engine.benchmark.models import (
    STATE,
    Kind,
    Model,
    call_maker,
    call_peak,
    candidate_model,
    product_operations,
    prompt,
    random_mamba,
)
from engine.benchmark.report import Panel, Report
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixState, seconds_to_first_token
from models.language_model.quantisation import quantisation_quality, quantise_int8

PEAK_NOTE = "peak memory is that of the call alone: above weights and inputs, which exist before it"


def product_limits(report: Report, tokens: int, rounds: int, dtype: torch.dtype | None = None) -> list[Candidate]:
    """The two products that are nearly all of a Mamba's: into and out of the inner width."""
    size = report.size
    like = torch.empty(0, dtype=dtype or size.dtype, device=report.device)
    shapes = (tokens, size.width, 2 * size.inner), (tokens, size.inner, size.width)
    return [product_limit(*shape, like, size.work, rounds) for shape in shapes]


def scan(report: Report) -> None:
    """The selective scan alone in float32: times, agreement, peak memory, fractions of the machine's limits."""
    size, device = report.size, report.device
    L, short = size.scan_tokens, size.baseline_training_tokens
    report.settings |= {"B": 1, "L": L, "E": size.inner, "N": STATE, "dtype": "float32"}
    present = report.present(("ours", "transformers", "mambapy", "mamba_ssm"), torch.float32)
    first, *others = (call_maker("scan", who, size, device)(short)() for who in present)
    for who, y in zip(present[1:], others, strict=True):
        report.add_value(f"largest difference of y to {who} (L {short})", float((y - first).abs().max()))
    rows = [(f"forward {who}", "scan", who, L) for who in present]
    for who in present:
        rows += [(f"forward+backward {who}", "scan_training", who, L)] if who != "transformers" else []
        rows += [(f"forward+backward {who} L {short}", "scan_training", who, short)] if who in present[:2] else []
    slow = {f"forward+backward transformers L {short}": f"L {short}: its backward pass takes the square of L"}
    candidates = [
        Candidate(name, call_maker(kind, who, size, device)(n), size.rounds, note=slow.get(name, ""))
        for name, kind, who, n in rows
    ]
    seconds = report.time(memory_limits(size.block, device, size.rounds) + candidates)
    moved = 4 * L * (4 * size.inner + 2 * STATE)  # bytes of u, delta, z and y; B and C
    needed = L * size.inner * (STATE + 2)  # a decay per state; a softplus and a gate per token and channel
    for name, amount, limit in (
        ("copying what goes in and out", moved, "copy"),
        ("its exponentials alone", needed, "exponentials: torch.exp"),
    ):
        fraction = amount / report.limits[limit]["rate"] / seconds["forward ours"]
        report.add_fraction(f"forward scan, of {name}", fraction)
    for name, kind, who, n in rows:
        if n == L:
            report.peak(name, call_peak, kind, who, size, n, device)
    scan_ratios(report, seconds)
    once, twice = ({n.removeprefix(start): seconds[n] for n, *_ in rows if n.startswith(start)}
                   for start in ("forward ", "forward+backward "))  # fmt: skip
    peaks = {n.removeprefix("forward+backward "): peak["call"] / 1e6 for n, peak in report.memory.items() if "+" in n}
    report.panels += [
        Panel(f"forward (B 1, L {L}, E {size.inner}, N {STATE})", "seconds", once),
        Panel("forward + backward", "seconds", twice),
        Panel("peak memory, forward + backward", "MB above the inputs", peaks),
    ]


def scan_ratios(report: Report, seconds: Mapping[str, float]) -> None:
    """Ratios of the medians in ``seconds`` and of the peaks, with their targets."""
    L, short = report.size.scan_tokens, report.size.baseline_training_tokens
    for name, call, who, target in (
        ("forward", "forward {}", "transformers", "≥ 15"),
        ("forward_backward", f"forward+backward {{}} L {short}", "transformers", "≥ 150"),
        ("forward", "forward {}", "mambapy", ""),
        ("forward_backward", "forward+backward {}", "mambapy", "≥ 12"),
        ("forward", "forward {}", "mamba_ssm", ""),
        ("forward_backward", "forward+backward {}", "mamba_ssm", ""),
    ):
        report.add_ratio(f"{name}_vs_{who}", seconds.get(call.format(who)), seconds[call.format("ours")], target)
    peaks = {name: found["call"] for name, found in report.memory.items()}
    for who, target in (("mambapy", "≤ 0.1"), ("mamba_ssm", "")):
        ours, baseline = peaks["forward+backward ours"], peaks.get(f"forward+backward {who}")
        report.add_ratio(f"peak_memory_vs_{who}", ours, baseline, target)
        if baseline:
            report.add_note(f"peak_memory_vs_{who}: forward+backward, memory above the inputs")
    report.add_note(
        f"forward_backward_vs_transformers is taken at L {short} for both; at L {L} it is larger, because the "
        "baseline's backward pass writes a full (E, L, N) gradient per token"
    )


def prefill(report: Report) -> None:
    """The language model reads visual tokens and a question, up to the first token's logits; all with same weights."""
    size, device = report.size, report.device
    L = size.visual + size.text
    report.settings |= {
        "visual_tokens": size.visual, "text_tokens": size.text, "layers": size.layers, "width": size.width,
        "dtype": str(size.dtype),
    }  # fmt: skip
    weights = random_mamba(size, device)
    present = report.present(("ours", "transformers", "mambapy"), size.dtype)
    calls = {who: call_maker("prefill", who, size, device, weights)(L) for who in present}
    logits: dict[str, Tensor] = {}

    def keep(who: str) -> None:
        logits[who] = calls[who]().float()

    limits = product_limits(report, L, size.rounds)
    others = product_limits(report, L, size.rounds, torch.float32) if size.dtype is not torch.float32 else []
    candidates = [Candidate(who, partial(keep, who), size.rounds if who == "ours" else 3) for who in present]
    seconds = report.time(limits + others + candidates)
    for who in present[1:]:
        difference = (logits[who] - logits["ours"]).abs().max() / logits[who].abs().max()
        report.add_value(f"largest relative difference of the logits to {who}", float(difference))
    operations = product_operations(weights, L) + 2 * size.vocabulary * size.width
    limit, ours = operations / report.best_rate(limits), seconds["ours"]
    report.add_value("seconds of the matrix products alone at the best rate", limit)
    report.add_fraction("matrix products in all of the prefill", limit / ours)
    report.add_ratio("prefill_vs_matmul_limit", ours, limit, "≤ 1.5")
    for who, target in (("transformers", "≥ 3"), ("mambapy", "")):
        report.add_ratio(f"prefill_vs_{who}", seconds.get(who), ours, target)
    bars = {who: seconds[who] for who in present} | {"limit: matrix products": limit}
    report.panels.append(Panel(f"{size.visual} visual + {size.text} text tokens", "seconds", bars, False))


def token_seconds(model: Model, embeds: Tensor, count: int) -> list[float]:
    """Seconds of each of ``count`` new tokens, after a first one whose time includes reading ``embeds`` (1, L, D)."""
    stamps: list[float] = []

    def clock(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        finish(embeds.device)
        stamps.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # never stops

    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    if isinstance(model, MambaLM):
        model.generate(embeds, mask, count + 1, criteria=[clock], min_new_tokens=count + 1)
    else:
        model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=count + 1, min_new_tokens=count + 1,
            do_sample=False, pad_token_id=0, stopping_criteria=[clock],
        )  # fmt: skip
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def decode(report: Report) -> None:
    """Seconds per new token beside reading the weights once and beside transformers; then a second question."""
    size, device = report.size, report.device
    report.settings |= {"prompt_tokens": size.text, "tokens": size.decode, "rounds": size.rounds, "width": size.width}
    report.settings |= {"dtype": str(size.dtype), "layers": size.layers}
    report.add_note("transformers' mambapy path decodes as its plain one does: one token needs no scan")
    weights = random_mamba(size, device)
    lm, narrow, baseline = (candidate_model(who, size, weights) for who in ("ours", "ours", "transformers"))
    quantise_int8(narrow.model)
    kind = str(size.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    models = {f"ours {kind}": lm, "ours int8": narrow, f"transformers {kind}": baseline}
    embeds = prompt(size, size.text, device)
    reads = (limit for limit in memory_limits(size.block, device, size.rounds) if limit.name.startswith("read"))
    limits = [replace(limit, warm="each") for limit in reads]
    candidates = limits[:]
    for name, model in models.items():
        token_seconds(model, embeds, 1)
        call = partial(token_seconds, model, embeds, size.decode)
        candidates.append(Candidate(name, call, size.rounds, warm="never", own_clock=True))
    seconds = report.time(candidates)
    bandwidth = report.best_rate(limits)
    bars = {name: seconds[name] for name in models}
    table = narrow.model.get_input_embeddings().weight.nbytes  # one row of it is read, the head has its own copy
    nbytes = {kind: lm.model.get_memory_footprint(), "int8": narrow.model.get_memory_footprint() - table}
    for name, amount in nbytes.items():
        limit = bars[f"limit: weights of {name} read once"] = amount / bandwidth
        report.add_fraction(f"reading the weights, ours {name}", limit / seconds[f"ours {name}"])
    ours, int8, plain = (seconds[name] for name in models)
    report.add_ratio("decode_bf16_vs_bandwidth_limit", bars[f"limit: weights of {kind} read once"], ours, "≥ 0.85")
    report.add_ratio("decode_bf16_vs_transformers", plain, ours)
    report.add_ratio("decode_int8_vs_transformers_bf16", plain, int8, "≥ 1.6")
    report.add_ratio("decode_int8_vs_ours_bf16", ours, int8)
    if kind != "bf16":
        report.add_note(f"at this size the weights are {kind}, also where a ratio says bf16")
    report.panels.append(Panel("one new token", "seconds", bars, False))
    int8_quality(report, lm, narrow)
    second_question(report, lm)


def int8_quality(report: Report, lm: MambaLM, narrow: MambaLM) -> None:
    """What int8 does to the logits of a random text."""
    size, generator = report.size, torch.Generator().manual_seed(0)
    ids = torch.randint(1, size.vocabulary - 3, (1, size.answer), generator=generator).to(report.device)
    quality = quantisation_quality(lm, narrow, ids)
    report.add_value("int8: largest difference of a logit", quality.max_difference)
    report.add_value("int8: mean difference of a logit", quality.mean_difference)
    report.add_value("int8: deviation of the logits themselves", quality.standard_deviation)
    report.add_value("int8: perplexity over the plain model's", quality.perplexity_ratio)
    report.add_note(
        f"int8's differences are those of random weights on {size.answer} random tokens; a trained model's perplexity "
        "says more: models/language_model/quantisation.py compares any two"
    )


def second_question(report: Report, lm: MambaLM) -> None:
    """Seconds to the first token of a first and of a second question about the same image."""
    size, device = report.size, report.device
    visual, question = prompt(size, size.visual, device), torch.arange(1, size.text + 1, device=device)
    state = PrefixState.read(lm, visual)
    note = f"to the first token; {size.visual} visual and {size.text} text tokens, without the vision part"
    calls = {
        "ours: first question": lambda: [seconds_to_first_token(lm, question, visual=visual)],
        "ours: second question": lambda: [seconds_to_first_token(lm, question, state=state)],
    }
    seconds = report.time([Candidate(n, call, 3, "never", note, own_clock=True) for n, call in calls.items()])
    report.add_value("bytes of the state after the image", state.nbytes)
    report.add_ratio("second_question_speedup", *seconds.values(), "≥ 5")
    report.panels.append(Panel("to the first token of an answer", "seconds", seconds, False))


def train_step(report: Report) -> None:
    """One step of Stage 2 through the frozen language model, batch 1: the whole model, then a part beside baselines."""
    size, device = report.size, report.device
    tokens, part, layers = (size.visual, size.answer), size.baseline_step, size.baseline_layers
    report.settings |= {
        "batch": 1, "visual_tokens": size.visual, "question_and_answer_tokens": size.answer, "layers": size.layers,
        "width": size.width, "dtype": str(size.dtype), "blocks_recomputed": size.recomputes,
    }  # fmt: skip
    report.add_note("the step starts at the encoder's features: bridge, language model, loss, gradients, AdamW")
    whole, limit = whole_step(report, tokens)
    gc.collect()
    note = "above weights, inputs and AdamW's averages"
    report.peak("ours, all layers", call_peak, "train_step", "ours", size, tokens, device, size.layers, note=note)
    present = report.present(("ours", "transformers", "mambapy"), size.dtype)
    weights = random_mamba(size, device, layers)
    calls = {who: call_maker("train_step", who, size, device, weights)(part) for who in present}
    note = f"{part[0]} + {part[1]} tokens"
    seconds = report.time([Candidate(f"{who}, {layers} layers", calls[who], note=note) for who in present])
    bars = dict(zip(present, seconds.values(), strict=True))
    for who in ("transformers", "mambapy"):
        report.add_ratio(f"train_step_vs_{who}", bars.get(who), bars["ours"])
    where = f"{layers} layers, {note}"
    report.add_note(
        f"train_step_vs_* are taken at {where} for both: the baseline's backward pass takes the square of L"
    )
    title = f"all {size.layers} layers, {size.visual} + {size.answer} tokens"
    report.panels.append(Panel(title, "seconds", {"ours": whole, "limit: matrix products": limit}, False))
    report.panels.append(Panel(where, "seconds", bars))


def whole_step(report: Report, tokens: tuple[int, int]) -> tuple[float, float]:
    """Seconds of a step through all layers, and of its matrix products at the best rate; the model is freed after."""
    size = report.size
    weights = random_mamba(size, report.device)
    report.add_value("bytes of the weights", weights.get_memory_footprint())
    limits = product_limits(report, sum(tokens), 3)
    step = call_maker("train_step", "ours", size, report.device, weights)(tokens)
    ours = report.time([*limits, Candidate("ours, all layers", step)])["ours, all layers"]
    passes = 3 if size.recomputes else 2  # forward, again, and the gradient of the inputs alone
    limit = passes * product_operations(weights, sum(tokens)) / report.best_rate(limits)
    report.add_value(f"seconds of the matrix products alone, {passes} passes", limit)
    report.add_fraction("matrix products in all of the step", limit / ours)
    return ours, limit


def scaling(report: Report) -> None:
    """Cost against the number of visual tokens: Mamba in chunks, fused attention all at once, and the bridge."""
    size, device, layers = report.size, report.device, report.size.part_layers
    names = {"ours": "ours: Mamba, in chunks", "attention": "attention decoder", "bridge": "ours: bridge alone"}
    report.settings |= {
        "tokens": list(size.scaling), "width": size.width, "mamba_layers": layers, "attention_layers": layers // 2,
        "dtype": str(size.dtype), "bridge_width": 512, "bridge_depth": 2, "bridge_dtype": "float32",
    }  # fmt: skip
    report.add_note(f"{layers} of {size.layers} layers at full width: all layers cost the same")
    megabytes_of_prompt = size.scaling[-1] * size.width * size.dtype.itemsize / 1e6
    report.add_note(f"{PEAK_NOTE}; a prompt of {size.scaling[-1]} tokens itself takes {megabytes_of_prompt:.3g} MB")
    make = {who: call_maker("prefill", who, size, device, layers) for who in names}
    points = [(who, n) for n in size.scaling for who in names]
    candidates = product_limits(report, 512, 3)
    for who, n in points:
        candidates.append(Candidate(f"{who} {n}", make[who](n), warm="once" if n <= size.scaling[2] else "never"))
    seconds = report.time(candidates)
    del make, candidates  # frees the models
    peaks = peak_lines(report, "prefill", points)
    times = {who: {n: seconds[f"{who} {n}"] for n in size.scaling} for who in names}
    short, long = size.scaling[2], size.scaling[-1]
    if (short, long) != (784, 12544):
        report.add_note(f"at this size the ratios named 784_to_12544 are from {short} to {long} tokens")
    for who, *targets in (("ours", "≤ 1.1", "≤ 1.15"), ("attention", "", ""), ("bridge", "", "")):
        prefix = "" if who == "ours" else f"{who}_"
        linear = times[who][short] * long / short
        report.add_ratio(f"{prefix}time_784_to_12544_vs_linear", times[who][long], linear, targets[0])
        report.add_ratio(f"{prefix}peak_memory_784_to_12544", peaks[who][long], peaks[who][short], targets[1])
    process = [report.memory[f"ours {n}"]["process"] for n in (long, short)]
    report.add_ratio("process_peak_memory_784_to_12544", *process)
    lines = {names[who]: points for who, points in megabytes(peaks).items()}
    report.panels.append(Panel("reading time", "seconds", {names[who]: points for who, points in times.items()}))
    report.panels.append(Panel("peak memory of the call", "MB above weights and inputs", lines))


def memory(report: Report) -> None:
    """Peak memory of scan, prefill and training step against the number of tokens; baselines as far as they go."""
    size, layers = report.size, report.size.part_layers
    few, most = size.baseline_training_tokens, max(size.memory_tokens)
    report.settings |= {"tokens": list(size.memory_tokens), "layers": layers, "width": size.width}
    report.settings |= {"dtype": str(size.dtype), "scan_dtype": "float32"}
    report.add_note(f"prefill and training step with {layers} of {size.layers} layers at full width")
    report.add_note(PEAK_NOTE)
    report.add_note(
        f"in training, transformers is measured up to {few} tokens (its time grows with their square) and mambapy up "
        f"to {size.scan_tokens} (its memory)"
    )
    for name, kind, title, dtype, transformers_most in (
        ("scan", "scan_training", "scan, forward + backward, float32", torch.float32, few),
        ("prefill", "prefill", "prefill", size.dtype, most),
        ("train_step", "train_step", "training step of Stage 2", size.dtype, few),
    ):
        limit = {"ours": most, "transformers": transformers_most, "mambapy": size.scan_tokens}
        present = report.present(limit, dtype, f"{name} ")
        points = [(who, n) for n in size.memory_tokens for who in present if n <= limit[who]]
        lines = peak_lines(report, kind, points, f"{name} ")
        for who, found in lines.items():
            if who != "ours":
                tokens = max(found)
                report.add_ratio(f"{name}_peak_memory_vs_{who}", lines["ours"].get(tokens), found[tokens])
                report.add_note(f"{name}_peak_memory_vs_{who} is taken at {tokens} tokens")
        report.panels.append(Panel(title, "MB above weights and inputs", megabytes(lines)))


def peak_lines(
    report: Report, kind: Kind, points: Iterable[tuple[str, int]], prefix: str = ""
) -> dict[str, dict[int, int]]:
    """Peak memory in bytes of each (candidate, tokens), as candidate → {tokens: bytes}; some layers of all."""
    size, lines = report.size, {}
    for who, n in points:
        side = int((0.77 * n) ** 0.5)  # about three quarters are visual, a square number as the bridge gives them
        tokens = (side * side, n - side * side) if kind == "train_step" else n
        try:
            found = report.peak(
                f"{prefix}{who} {n}", call_peak, kind, who, size, tokens, report.device, size.part_layers
            )
            lines.setdefault(who, {})[n] = found
        except OutOfMemory as error:
            report.add_missing(f"{prefix}{who} at {n} tokens: {error}")
    return lines


def megabytes(lines: Mapping[str, Mapping[int, float]]) -> dict[str, dict[int, float]]:
    """Of bytes, at least a thousandth, which a logarithmic axis can show."""
    return {name: {n: max(v, 1e3) / 1e6 for n, v in points.items()} for name, points in lines.items()}


SUITES = {suite.__name__: suite for suite in (scan, prefill, decode, train_step, scaling, memory, data)}
