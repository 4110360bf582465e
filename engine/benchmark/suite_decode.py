"""Suite ``decode``: seconds per new token, and to the first token of a second question about the same image."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import MambaForCausalLM, StoppingCriteria, StoppingCriteriaList

from engine.benchmark.language_models import prompt
from engine.benchmark.limits import Limit, best_rate, read_limits
from engine.benchmark.pictures import Panel
from engine.benchmark.random_lm import our_lm, random_mamba, same_weights, weight_bytes
from engine.benchmark.ratios import limit_seconds, speedup
from engine.benchmark.report import Report
from engine.benchmark.timing import Timing, finish, take_turns
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixState, seconds_to_first_token
from models.language_model.quantisation import quantisation_quality, quantise_int8

Writer = Callable[["TokenClock", int], object]


class TokenClock(StoppingCriteria):
    """Notes when each token was there; never stops anything."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        finish(self.device)
        self.stamps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def intervals(self) -> list[float]:
        """Seconds per token after the first, which the prompt belongs to."""
        return [after - before for before, after in zip(self.stamps, self.stamps[1:], strict=False)]


def our_writer(lm: MambaLM, embeds: Tensor) -> Writer:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return lambda clock, count: lm.generate(embeds, mask, count, criteria=[clock], min_new_tokens=count)


@torch.no_grad()
def rival_writer(model: MambaForCausalLM, embeds: Tensor) -> Writer:
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return lambda clock, count: model.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0, stopping_criteria=StoppingCriteriaList([clock]),
    )  # fmt: skip


def decode_times(report: Report, writers: dict[str, Writer], limits: list[Limit]) -> dict[str, Timing]:
    """Every round: the limits, then some tokens of each writer."""
    size, device = report.size, report.device
    seconds: dict[str, list[float]] = {name: [] for name in (*writers, *(limit.name for limit in limits))}
    for writer in writers.values():
        writer(TokenClock(device), 2)
    for _ in range(size.rounds):
        for limit in limits:
            seconds[limit.name] += take_turns([limit.candidate(1)], device)[limit.name].seconds
        for name, writer in writers.items():
            clock = TokenClock(device)
            writer(clock, size.decode + 1)
            seconds[name] += clock.intervals()
    return {name: Timing(name, tuple(values)) for name, values in seconds.items()}


def run(report: Report) -> None:
    """Decoding beside the time of reading the weights once and beside transformers; then two questions."""
    size, device = report.size, report.device
    report.settings |= {"prompt_tokens": size.text, "tokens": size.decode, "rounds": size.rounds, "width": size.width}
    report.settings |= {"dtype": str(size.dtype), "layers": size.layers}
    report.add_note("transformers' mambapy path decodes as its plain one does: one token needs no scan")
    model = random_mamba(size, device)
    plain = same_weights(model)
    lm = our_lm(model, size)
    embeds = prompt(size, size.text, device)
    kind = str(size.dtype).removeprefix("torch.").replace("bfloat16", "bf16")
    narrow = our_lm(same_weights(model), size)
    quantise_int8(narrow.model)
    table = narrow.model.get_input_embeddings().weight.nbytes  # one row of it is read, the head has its own copy
    bytes_of = {f"ours {kind}": weight_bytes(lm), "ours int8": weight_bytes(narrow) - table}
    writers = {f"ours {kind}": our_writer(lm, embeds), "ours int8": our_writer(narrow, embeds),
               f"transformers {kind}": rival_writer(plain, embeds)}  # fmt: skip
    limits = read_limits(size.block, device)
    times = decode_times(report, writers, limits)
    report.add_limits(limits, times)
    report.add_times(times[name] for name in writers)
    bandwidth = best_rate(limits, times)
    bars = {f"{name}": times[name].median for name in writers}
    for name, nbytes in bytes_of.items():
        limit = limit_seconds(nbytes, bandwidth)
        bars[f"limit: weights of {name.removeprefix('ours ')} read once"] = limit
        report.add_share(f"reading the weights, {name}", limit / times[name].median)
    ours = times[f"ours {kind}"].median
    report.add_ratio("decode_bf16_vs_bandwidth_limit", bars[f"limit: weights of {kind} read once"] / ours)
    rival = times[f"transformers {kind}"].median
    report.add_ratio("decode_bf16_vs_transformers", speedup(ours, rival))
    report.add_ratio("decode_int8_vs_transformers_bf16", speedup(times["ours int8"].median, rival))
    report.add_ratio("decode_int8_vs_ours_bf16", speedup(times["ours int8"].median, ours))
    if kind != "bf16":
        report.add_note(f"at this size the weights are {kind}, also where a ratio says bf16")
    report.panels.append(Panel("one new token", "seconds", bars, logarithmic=False))
    _quality(report, lm, narrow)
    _second_question(report, lm)


def _quality(report: Report, lm: MambaLM, narrow: MambaLM) -> None:
    """What int8 does to the logits of a text, here of a random one."""
    size, generator = report.size, torch.Generator().manual_seed(0)
    ids = torch.randint(1, size.tokens, (1, size.answer), generator=generator).to(report.device)
    quality = quantisation_quality(lm, narrow, ids)
    report.add_value("int8: largest difference of a logit", quality.max_difference)
    report.add_value("int8: mean difference of a logit", quality.mean_difference)
    report.add_value("int8: standard deviation of the logits themselves", quality.standard_deviation)
    report.add_value("int8: perplexity over the plain model's", quality.perplexity_ratio)
    report.add_note(f"int8's differences are those of random weights on {size.answer} random tokens; a trained model's "
                    "perplexity says more: models/language_model/quantisation.py compares any two")  # fmt: skip


def _second_question(report: Report, lm: MambaLM) -> None:
    size, device = report.size, report.device
    visual = prompt(size, size.visual, device)
    question = torch.arange(1, size.text + 1, device=device)
    state = PrefixState.read(lm, visual)
    first, second = "ours: first question", "ours: second question"
    seconds: dict[str, list[float]] = {first: [], second: []}
    for _ in range(3):
        seconds[first].append(seconds_to_first_token(lm, question, visual=visual))
        seconds[second].append(seconds_to_first_token(lm, question, state=state))
    note = f"to the first token; {size.visual} visual and {size.text} text tokens, without the vision part"
    times = {name: Timing(name, tuple(values), note) for name, values in seconds.items()}
    report.add_times(times.values())
    report.add_value("bytes of the state after the image", state.nbytes)
    report.add_ratio("second_question_speedup", speedup(times[second].median, times[first].median))
    bars = {name: timing.median for name, timing in times.items()}
    report.panels.append(Panel("to the first token of an answer", "seconds", bars, logarithmic=False))
