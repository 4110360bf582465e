"""Decoding on buffers that never move equals plain decoding; a capture that fails or errs is not used.

The capture itself needs a GPU; everything around it is run here by steps that only pretend.
"""

from __future__ import annotations

import contextlib
import logging
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models.language_model import cuda_graph_decode
from models.language_model.cuda_graph_decode import CudaGraphStep, DecodeStep, GraphUnusable, static_steps
from models.language_model.decoding import Decoding, StopRule
from models.language_model.mamba_lm import MambaLM
from models.language_model.prefix_state import PrefixState, answer_from_state
from tests.models.language_model.tiny import sharp_lm

STEPS = 24


def make_lm(device: str = "cpu", dtype: torch.dtype = torch.float32) -> MambaLM:
    return sharp_lm(hidden_size=64, state_size=16).to(device, dtype)


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    return make_lm()


def prompts(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 9, 64, generator=torch.Generator().manual_seed(seed))


def write(lm: MambaLM, rows: int = 1, seed: int = 1, **options: object) -> list[str]:
    embeds = prompts(rows, seed).to(lm.model.device, lm.model.dtype)
    return lm.generate(embeds, torch.ones(embeds.shape[:2], device=embeds.device), STEPS, **options)


class Counted(DecodeStep):
    made = calls = 0

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        Counted.made += 1

    def run(self) -> Tensor:
        Counted.calls += 1
        return super().run()


@pytest.fixture
def counted(lm: MambaLM) -> type[Counted]:
    vars(lm.model).pop("_decode_step", None)
    Counted.made = Counted.calls = 0
    return Counted


def test_static_steps_write_what_plain_decoding_writes(lm: MambaLM, counted: type[Counted]) -> None:
    for rows, seed in ((1, 1), (3, 2), (3, 3), (1, 4)):
        expected = write(lm, rows, seed)
        with static_steps(lm.model, STEPS, make=counted):
            assert write(lm, rows, seed) == expected
    assert counted.calls == 4 * (STEPS - 1)  # the prompt gives the first token
    assert counted.made == 3, "a step is kept for the next generation of as many rows"


def test_sampling_with_penalties_and_stops(lm: MambaLM, counted: type[Counted]) -> None:
    options = {**Decoding(temperature=2.0, repetition_penalty=1.2).options(), "stop": StopRule(["q", "\n"])}
    torch.manual_seed(5)
    expected = write(lm, 3, **options)
    torch.manual_seed(5)
    with static_steps(lm.model, STEPS, make=counted):
        assert write(lm, 3, **options) == expected
    assert counted.calls > 0


@pytest.mark.parametrize("rows", [1, 2])
def test_beams_are_put_in_order_between_the_steps(lm: MambaLM, counted: type[Counted], rows: int) -> None:
    options = Decoding(num_beams=3).options()
    expected = write(lm, rows, **options)
    for _ in range(2):  # captured anew, and kept
        with static_steps(lm.model, STEPS, make=counted):
            assert write(lm, rows, **options) == expected
    assert (counted.made, counted.calls) == (1, 2 * (STEPS - 1))


def test_answers_from_an_image_state(lm: MambaLM, counted: type[Counted]) -> None:
    state = PrefixState.read(lm, prompts(1))
    ids = torch.tensor([lm.tokenizer.encode("肺部?"), lm.tokenizer.encode("???????")])
    batch = {"question_ids": ids, "question_mask": torch.ones_like(ids)}
    expected = answer_from_state(lm, state, batch, STEPS)
    with static_steps(lm.model, STEPS, make=counted):
        assert answer_from_state(lm, state, batch, STEPS) == expected
    assert counted.calls == STEPS - 1


def test_logits_and_states_step_by_step(lm: MambaLM) -> None:
    with torch.no_grad():
        plain = lm.model(inputs_embeds=prompts(2), use_cache=True)
        step = DecodeStep(lm.model.forward, plain.cache_params)
        addresses = [state.data_ptr() for state in step.states]
        for token in range(5):
            ids = torch.tensor([[token], [token + 7]])
            plain = lm.model(input_ids=ids, cache_params=plain.cache_params, use_cache=True)
            torch.testing.assert_close(step(ids), plain.logits)
    assert [state.data_ptr() for state in step.states] == addresses
    for own, other in zip(step.states, cuda_graph_decode._states(plain.cache_params), strict=True):
        torch.testing.assert_close(own, other)


def test_the_forward_is_the_models_own_again(lm: MambaLM, counted: type[Counted]) -> None:
    with pytest.raises(KeyError), static_steps(lm.model, STEPS, make=counted):
        assert "forward" in vars(lm.model)
        raise KeyError
    assert "forward" not in vars(lm.model)


class Pretending(CudaGraphStep):
    """A 'captured' step on a CPU: the capture keeps nothing, the replay computes."""

    def _capture(self) -> None:
        self.compute()

    def run(self) -> Tensor:
        return self.compute()


class Failing(Pretending):
    def _capture(self) -> None:
        super()._capture()
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class WrongLogits(Pretending):
    def run(self) -> Tensor:
        return super().run() * 1.1


class WrongState(Pretending):
    def run(self) -> Tensor:
        logits = super().run()
        self.states[3].mul_(1.1)
        return logits


@pytest.mark.parametrize(
    ("make", "reason"),
    [(Pretending, None), (Failing, "not permitted"), (WrongLogits, "other logits"), (WrongState, "states of layer 1")],
)
def test_a_capture_that_fails_or_errs_is_not_used(
    lm: MambaLM, counted: type[Counted], caplog: pytest.LogCaptureFixture, make: type[DecodeStep], reason: str | None
) -> None:
    expected = write(lm, 2)
    caplog.set_level(logging.INFO, cuda_graph_decode.__name__)
    with static_steps(lm.model, STEPS, make=make):
        assert write(lm, 2) == expected
    assert bool(caplog.messages) == (reason is not None)
    if reason:
        assert reason in caplog.messages[0] and len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


class FakeCuda:
    """The parts of ``torch.cuda`` that a capture uses. A capture fails as torch's does: its end raises, the stream is
    still switched and the generator still in capture mode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing = types.SimpleNamespace(name="main", device_index=0), False
        self.stream.wait_stream = lambda _: None
        replaced = {
            "current_stream": lambda _: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "default_generators": [self],
            "Stream": lambda _: self.stream,
            "stream": contextlib.nullcontext,
            "device": contextlib.nullcontext,
            "CUDAGraph": object,
            "graph": self.graph,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def graph(self, *_: object, **__: object) -> Iterator[None]:
        self.stream, self.capturing = types.SimpleNamespace(name="capture", device_index=0), True
        with contextlib.suppress(RuntimeError):
            yield
        raise RuntimeError("operation failed due to a previous error during capture\nmore")

    def clone_state(self) -> bool:
        return self.capturing

    def graphsafe_set_state(self, state: bool) -> None:
        self.capturing = state


def test_a_failed_capture_restores_stream_and_generator(
    lm: MambaLM, counted: type[Counted], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Decoding(temperature=2.0).options()
    torch.manual_seed(5)
    expected = [write(lm, 2), write(lm, 2, **options)]
    cuda = FakeCuda(monkeypatch)
    torch.manual_seed(5)
    with static_steps(lm.model, STEPS, make=CudaGraphStep):
        found = [write(lm, 2)]
    assert (cuda.stream.name, cuda.capturing) == ("main", False)
    assert "previous error during capture" in caplog.text
    assert [*found, write(lm, 2, **options)] == expected


def test_the_tolerance_follows_the_weights(lm: MambaLM, counted: type[Counted]) -> None:
    """Logits are float32 whatever the weights are."""

    class Rounding(Pretending):
        def run(self) -> Tensor:
            return super().run() * 1.01

    prompt = prompts(1)
    for dtype, usable in ((torch.float32, False), (torch.bfloat16, True)):
        model = make_lm(dtype=dtype).model
        with torch.no_grad():
            cache = model(inputs_embeds=prompt.to(dtype), use_cache=True).cache_params
            with contextlib.nullcontext() if usable else pytest.raises(GraphUnusable, match="other logits"):
                Rounding(model.forward, cache)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"new_tokens": 3}, "3 tokens"),
        ({"switch": "0"}, "MAMBA_CUDA_GRAPH=0"),
        ({"quantised": True}, "quantised"),
    ],
)
def test_where_it_is_not_used_the_log_says_why(
    lm: MambaLM, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, given: dict, reason: str
) -> None:
    monkeypatch.setenv("MAMBA_CUDA_GRAPH", given.get("switch", "1"))
    monkeypatch.setattr(lm.model, "is_quantized", given.get("quantised", False), raising=False)
    caplog.set_level(logging.INFO, cuda_graph_decode.__name__)
    with static_steps(lm.model, given.get("new_tokens", STEPS), make=DecodeStep):
        assert "forward" not in vars(lm.model)
    assert reason in caplog.text
    with static_steps(lm.model, STEPS):
        assert "forward" not in vars(lm.model), "a CPU decodes plainly"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_step_writes_what_plain_decoding_writes(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm("cuda", dtype)
    for rows, seed in ((1, 1), (3, 2), (1, 3), (1, 4)):
        monkeypatch.setenv("MAMBA_CUDA_GRAPH", "0")
        expected = write(lm, rows, seed)
        monkeypatch.setenv("MAMBA_CUDA_GRAPH", "1")
        with caplog.at_level(logging.WARNING, cuda_graph_decode.__name__):
            assert write(lm, rows, seed) == expected
    assert isinstance(vars(lm.model)["_decode_step"][1], CudaGraphStep)
    assert not caplog.messages
