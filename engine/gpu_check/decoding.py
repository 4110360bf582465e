"""Checks 5 to 7: a Mamba-2.8B with random weights writes and reads, by a captured graph and without."""

from __future__ import annotations

import os
import statistics
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.benchmark.models import prefill_call, product_limits, product_operations, prompt
from engine.benchmark.suites import token_seconds
from engine.gpu_check.context import Context, Expected, Line, messages
from models.language_model import cuda_graph_decode
from models.language_model.mamba_lm import MambaLM
from models.language_model.quantisation import quantise_int8

TOKEN, PREFILL = Expected(4, 5, "ms"), Expected(35, 50, "ms")
MODES: dict[str, tuple[int, int, dict[str, Any]]] = {  # rows, tokens, and options of ``generate``
    "greedy": (1, 64, {}),
    "greedy, batch 3": (3, 24, {}),
    "sampling": (1, 64, {"do_sample": True, "temperature": 1.0, "top_k": 0}),
    "three beams": (1, 24, {"num_beams": 3, "renormalize_logits": True}),
}
INT8 = 1, 24, {}
SAME = "wanted: the text of plain decoding"
SHORT = {name: (1, 24, MODES[name][2]) for name in ("greedy", "sampling")}
TIMED = 40  # tokens


def decoding(context: Context) -> Iterator[Line]:
    """The graph writes what plain decoding writes; milliseconds of a token in bfloat16 and int8."""
    lm = context.lm()
    for name, mode in MODES.items():
        yield compare(context, lm, name, *mode)
    kind = str(context.size.dtype).removeprefix("torch.")
    wide = yield from token_time(context, lm, kind)
    del lm
    narrow = context.lm()
    quantise_int8(narrow.model)
    yield compare(context, narrow, "int8, greedy", *INT8)
    yield from token_time(context, narrow, "int8", wide)


def compare(context: Context, lm: MambaLM, name: str, rows: int, tokens: int, options: dict[str, Any]) -> Line:
    """The same texts with the graph and without it."""
    with messages("models.language_model") as said:
        fast = write(context, lm, rows, tokens, options)
    with without_graph():
        plain = write(context, lm, rows, tokens, options)
    pairs = [(a, b) for one, other in zip(fast, plain, strict=True) for a, b in zip(one, other, strict=True)]
    same = sum(a == b for a, b in pairs)
    unused = said if context.cuda else []
    note = "".join(f"; {line}" for line in said)
    measured = f"{same} of {len(pairs)} tokens equal, {len({a for a, _ in pairs})} different ones{note}"
    return context.verdict(name, same == len(pairs) and not unused, measured)


def write(context: Context, lm: MambaLM, rows: int, tokens: int, options: dict[str, Any]) -> list[list[str]]:
    """The words of ``rows`` texts after different prompts; the same random numbers at each call."""
    embeds = torch.cat([prompt(context.size, 48, context.device).roll(row, 1) for row in range(rows)])
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=context.device)
    torch.manual_seed(3)
    texts = lm.generate(embeds, mask, tokens, min_new_tokens=tokens, **options)
    return [text.split() for text in texts]


@contextmanager
def without_graph() -> Iterator[None]:
    before = os.environ.get(cuda_graph_decode.SWITCH)
    os.environ[cuda_graph_decode.SWITCH] = "0"
    try:
        yield
    finally:
        del os.environ[cuda_graph_decode.SWITCH]
        if before is not None:
            os.environ[cuda_graph_decode.SWITCH] = before


def token_time(context: Context, lm: MambaLM, kind: str, wide: float | None = None) -> Generator[Line, None, float]:
    """Milliseconds of a token at batch 1; ``wide``: in bfloat16, which int8 must beat. Returns them."""
    count, embeds = TIMED if context.cuda else 17, prompt(context.size, 48, context.device)
    token_seconds(lm, embeds, count)  # captures the step
    times = token_seconds(lm, embeds, count)
    value = 1e3 * statistics.median(times)
    limit = 1e3 * lm.model.get_memory_footprint() / context.copy_rate
    note = f"its weights are copied in {limit:.3g} ms"
    good = wide is None or not context.cuda or value < wide
    expected = TOKEN if wide is None else None
    yield context.figure(f"a token, {kind}, batch 1", value, "ms", expected, note, good)
    return value


def capture_failure(context: Context) -> Iterator[Line]:
    """A step that cannot be captured: decoding and sampling go on without a graph, then with one."""
    lm = context.lm()
    with without_graph():
        expected = {name: write(context, lm, *SHORT[name]) for name in SHORT}
    hook = lm.model.lm_head.register_forward_pre_hook(wait_for_device)
    with messages("models.language_model") as said:
        found = {name: write(context, lm, *SHORT[name]) for name in SHORT}
    hook.remove()
    refused = any("cannot be captured" in line for line in said) or not context.cuda
    yield context.verdict("the capture is refused", refused, "; ".join(said) or "no graph on this device")
    for name, texts in expected.items():
        yield context.verdict(f"{name} meanwhile", found[name] == texts, SAME)
    fresh = context.lm()
    for name, texts in expected.items():
        yield context.verdict(f"{name} afterwards", write(context, lm, *SHORT[name]) == texts, SAME)
    stream = not context.cuda or torch.cuda.current_stream() == torch.cuda.default_stream()
    yield context.verdict("the stream afterwards", stream, "the default one")
    with messages("models.language_model") as said:
        again = write(context, fresh, *SHORT["greedy"])
    good = again == expected["greedy"] and not said
    yield context.verdict("a graph afterwards", good, "; ".join(said) or SAME)


def wait_for_device(module: nn.Module, given: tuple[Tensor, ...]) -> None:
    """Reads a value, which CUDA forbids while a graph is captured."""
    given[0].float().sum().item()


def prefill(context: Context) -> Iterator[Line]:
    """784 visual tokens and a question of 30."""
    size, L = context.size, (784 if context.cuda else context.size.visual) + 30
    lm = context.lm()
    seconds = context.seconds(prefill_call(lm, size, L, context.device), least=0)
    rate = max(limit[1] / context.seconds(limit[0]) for limit in product_limits(size, L, context.device).values())
    limit = product_operations(lm.model, L) / rate
    note = f"{limit * 1e3:.3g} ms the matrix products alone"
    yield context.figure(f"{L} tokens, batch 1", seconds * 1e3, "ms", PREFILL, note)
