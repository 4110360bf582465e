"""Search, sampling, stopping and streaming: against plain loops without a cache, and against each other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from config.errors import InputError
from models.language_model.decoding import (
    INCOMPLETE,
    CharacterStream,
    Decoding,
    FirstTokenClock,
    StopRule,
    Varied,
    plain_text,
)
from models.language_model.mamba_lm import MambaLM
from tests.models.language_model.tiny import byte_tokenizer, sharp_lm

REPORT = "所见：右肺上叶见结节，大小约12mm。\n结论：右肺上叶结节，建议随访。😀 The end."


def random_lm(tokenizer: PreTrainedTokenizerBase | None = None, **options: object) -> MambaLM:
    return sharp_lm(tokenizer, seed=3, memory=1.0, num_hidden_layers=2, **options)


@pytest.fixture(scope="module")
def lm() -> MambaLM:
    return random_lm()


def prompt(seed: int, length: int = 7) -> Tensor:
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))


def generate_ids(lm: MambaLM, embeds: Tensor, count: int, **options: object) -> list[int]:
    options |= {"attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long), "pad_token_id": 256}
    return lm.model.generate(inputs_embeds=embeds, max_new_tokens=count, **options)[0].tolist()


# ------------------------------------------------------------------ sampling with noise of its own


def test_varied_draws_each_token_with_its_probability() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0])
    noise = Varied(2000, (0.5, 0.5))
    drawn = torch.cat([noise(None, logits.expand(2000, -1)).argmax(-1) for _ in range(10)])
    expected = (logits / 0.5).softmax(-1)
    assert torch.allclose(drawn.bincount(minlength=4) / len(drawn), expected, atol=0.015)


def test_varied_rows_are_the_cooler_the_earlier() -> None:
    noise = Varied(50, (0.01, 5.0))
    likeliest = torch.stack([noise(None, torch.tensor([[0.0, 1.0]]).expand(50, -1)).argmax(-1) for _ in range(200)])
    assert likeliest[:, 0].all() and 0.5 < likeliest[:, -1].float().mean() < 0.65


def test_varied_draws_no_token_that_is_far_less_likely_than_the_likeliest() -> None:
    """The warmest noise takes one of 0.06 times its probability, and never one of 0.04 times."""
    noise, logits = Varied(1000, (9.0, 9.0)), torch.tensor([0.0, math.log(0.06), math.log(0.04)])
    drawn = noise(None, logits.expand(1000, -1)).argmax(-1).bincount(minlength=3)
    assert drawn[1] > 300 and drawn[2] == 0


def test_varied_texts_do_not_depend_on_what_else_is_in_the_batch(lm: MambaLM) -> None:
    one, other = (prompt(seed).expand(4, -1, -1) for seed in (1, 2))
    mask = torch.ones(4, 7, dtype=torch.long)

    def write(embeds: Tensor, seed: int = 0) -> list[str]:
        return lm.generate(embeds, mask.repeat(len(embeds) // 4, 1), 12, logits_processor=[Varied(4, (3.0, 3.0), seed)])

    alone = write(one)
    assert len(set(alone)) == 4 and write(one) == alone and write(one, seed=1) != alone
    assert write(torch.cat([other, one]))[4:] == alone


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.1},
        {"top_p": 0.9},
        {"num_beams": 0},
        {"num_beams": 2, "temperature": 0.5},
        {"repetition_penalty": 0.0},
        {"no_repeat_ngram_size": -1},
    ],
)
def test_a_value_out_of_range_is_one_line_that_names_the_flag(settings: dict[str, float]) -> None:
    with pytest.raises(InputError) as error:
        Decoding(**settings)
    assert "\n" not in str(error.value)
    assert any(f"--{name}" in str(error.value) for name in settings)
    assert Decoding().options() == {}, "the defaults are greedy and allowed"


def test_sampling_is_repeated_by_its_seed_and_no_other(lm: MambaLM) -> None:
    options = Decoding(temperature=5.0).options()

    def sample(seed: int) -> str:
        torch.manual_seed(seed)
        return lm.generate(prompt(0), torch.ones(1, 7), 30, **options)[0]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize("settings", [Decoding(), Decoding(temperature=1.0, top_p=1e-6)], ids=str)
def test_rows_without_a_token_are_never_generated(lm: MambaLM, settings: Decoding) -> None:
    """They are masked before a nucleus is chosen, not after: the likeliest would fill it."""
    greedy = lm.generate(prompt(0), torch.ones(1, 7), 12)
    bias = torch.zeros(264)
    bias[260] = 1e3
    hook = lm.model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    masked = lm.generate(prompt(0), torch.ones(1, 7), 12, **settings.options())
    hook.remove()
    assert masked == greedy


def test_no_repeated_ngram(lm: MambaLM) -> None:
    ids = generate_ids(lm, prompt(1), 60, **Decoding(no_repeat_ngram_size=2).options())
    pairs = list(zip(ids, ids[1:], strict=False))
    assert len(pairs) == len(set(pairs))
    plain = generate_ids(lm, prompt(1), 60)
    assert len(set(zip(plain, plain[1:], strict=False))) < len(plain) - 1  # it would repeat itself


# ------------------------------------------------------------------ beams


def beams_without_cache(lm: MambaLM, embeds: Tensor, beams: int, length: int) -> list[int]:
    """Beam search in a few lines, every beam read anew from its first token: no cache to be reordered."""
    running: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        continued = []
        for score, ids in running:
            text = torch.cat([embeds, lm.embed(torch.tensor([ids], dtype=torch.long))], dim=1)
            logits = lm.model(inputs_embeds=text, use_cache=False).logits[0, -1, : lm.known_tokens]
            best = logits.log_softmax(-1).topk(beams)
            continued += [(score + float(v), [*ids, int(i)]) for v, i in zip(best.values, best.indices, strict=True)]
        running = sorted(continued, reverse=True)[:beams]
    return running[0][1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_beam_search_reorders_the_states(seed: int) -> None:
    lm = random_lm(sharpness=8.0, vocab_size=257)
    lm.model.lm_head.weight[256] = 0.0  # hardly ever ends, so that both searches have one length
    expected = beams_without_cache(lm, prompt(seed), 4, 9)
    found = generate_ids(lm, prompt(seed), 9, num_beams=4, do_sample=False)
    assert found == expected
    assert found != generate_ids(lm, prompt(seed), 9)  # a greedy search would not find it


# ------------------------------------------------------------------ the end


def test_stop_strings_cut_at_the_first_of_them() -> None:
    rule = StopRule(["结论", "###"])
    assert rule.cut("所见：结节。结论：无。") == "所见：结节。"
    assert rule.cut("a ### b 结论") == "a "
    assert rule.cut("所见：结节。结") == "所见：结节。结"
    with pytest.raises(InputError, match="--stop"):
        StopRule([""])


def test_a_report_that_begins_once_more_is_cut_there() -> None:
    rule = StopRule(at_restart=True)
    assert rule.cut("所见：结节。结论：结节。\n所见：无。") == "所见：结节。结论：结节。"
    assert rule.cut("Findings: none. Impression: none. Findings: x") == "Findings: none. Impression: none."
    assert rule.cut("所见：超声所见：结节。") == "所见：超声所见：结节。"  # within a sentence: no restart
    assert rule.cut("没有标题的文字。没有标题的文字。") == "没有标题的文字。没有标题的文字。"


@pytest.mark.parametrize("rule", [StopRule(), StopRule(["结论：无", "。。"], at_restart=True), StopRule(["b"])])
def test_what_is_settled_stays(rule: StopRule) -> None:
    for text in ("所见：甲。结论：有。结论：无。所见：乙", "所见：甲。。", "A: x.\n\nA: y", "ab", "  所见：a。  所见"):
        shown = 0
        for length in range(len(text) + 1):
            settled = rule.settled(text[:length])
            assert settled >= shown
            shown = settled
        assert rule.cut(text)[:shown] == text[:shown]
        assert shown <= len(rule.cut(text))


def test_rows_that_end_at_different_times_are_what_they_are_alone(lm: MambaLM) -> None:
    texts = [lm.generate(prompt(seed), torch.ones(1, 7), 40)[0] for seed in range(4)]
    rule = StopRule([texts[0][3:5], texts[1][20:22]])
    alone = [lm.generate(prompt(seed), torch.ones(1, 7), 40, stop=rule)[0] for seed in range(4)]
    assert alone == [rule.cut(text) for text in texts]
    assert len({len(text) for text in alone}) > 1
    together = lm.generate(torch.cat([prompt(seed) for seed in range(4)]), torch.ones(4, 7), 40, stop=rule)
    assert together == alone


def test_generation_does_not_go_on_after_the_stop(lm: MambaLM) -> None:
    text = lm.generate(prompt(0), torch.ones(1, 7), 40)[0]
    clock, steps = FirstTokenClock(), []
    hook = lm.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    lm.generate(prompt(0), torch.ones(1, 7), 40, stop=StopRule([text[2:4]]), criteria=[clock])
    hook.remove()
    assert 0 < len(steps) < 40
    assert clock.seconds is not None and clock.seconds > 0


def test_the_same_stop_for_beams(lm: MambaLM) -> None:
    """With beams the criterion sees every candidate; what is returned is cut all the same."""
    text = lm.generate(prompt(0), torch.ones(1, 7), 30, num_beams=3)[0]
    rule = StopRule([text[4:6]])
    assert rule.end(lm.generate(prompt(0), torch.ones(1, 7), 30, num_beams=3, stop=rule)[0]) is None


# ------------------------------------------------------------------ streaming


def streamed(tokenizer: PreTrainedTokenizerBase, ids: list[int], rule: StopRule | None = None) -> list[str]:
    pieces: list[str] = []
    stream = CharacterStream(tokenizer, pieces.append, rule)
    stream.put(torch.empty(1, 0, dtype=torch.long))
    for token in ids:
        stream.put(torch.tensor([token]))
    stream.end()
    return pieces


@pytest.fixture(scope="module")
def neox(shared: Path) -> PreTrainedTokenizerBase:
    file = shared / "tokenizer" / "20B_tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.mark.parametrize("name", ["bytes", "gpt-neox"])
def test_only_whole_characters_are_streamed(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = byte_tokenizer() if name == "bytes" else request.getfixturevalue("neox")
    ids = tokenizer.encode(REPORT, add_special_tokens=False)
    halves = [i for i in range(len(ids)) if plain_text(tokenizer, ids[: i + 1]).endswith(INCOMPLETE)]
    assert len(halves) > 5  # characters do need several tokens
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == REPORT and not any(INCOMPLETE in piece for piece in pieces)
    assert len(pieces) > 20  # and not all at the end


def test_bytes_that_never_became_a_character_are_shown_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("肺结", add_special_tokens=False)[:-1]
    assert streamed(tokenizer, ids) == ["肺", INCOMPLETE] and plain_text(tokenizer, ids) == "肺" + INCOMPLETE
    # In the middle they are final as soon as something follows them.
    assert "".join(streamed(tokenizer, [*ids, *tokenizer.encode("。ok")])) == f"肺{INCOMPLETE}。ok"


@pytest.mark.parametrize("seed", range(4))
def test_streamed_random_tokens_are_the_text_without_streaming(seed: int, neox: PreTrainedTokenizerBase) -> None:
    ids = torch.randint(0, 50277, (200,), generator=torch.Generator().manual_seed(seed)).tolist()
    assert "".join(streamed(neox, ids)) == plain_text(neox, ids)


def test_a_random_model_streams_what_it_returns(neox: PreTrainedTokenizerBase) -> None:
    lm = random_lm(neox, vocab_size=50280)
    whole = lm.generate(prompt(5), torch.ones(1, 7), 40)[0]
    rule = StopRule([whole[len(whole) // 2 :][:2]])
    for stop in (None, rule):
        pieces: list[str] = []
        stream = CharacterStream(neox, pieces.append, stop)
        text = lm.generate(prompt(5), torch.ones(1, 7), 40, stop=stop, streamer=stream)[0]
        assert "".join(pieces) == text == (rule.cut(whole) if stop else whole)


def test_nothing_is_shown_of_a_stop_string() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("所见：无。结论：无。", add_special_tokens=False)
    assert "".join(streamed(tokenizer, ids, StopRule(["结论"]))) == "所见：无。"
    assert "".join(streamed(tokenizer, ids, StopRule(["结论："]))) == "所见：无。"
    assert "".join(streamed(tokenizer, ids, StopRule(["结石"]))) == "所见：无。结论：无。"
    with pytest.raises(ValueError, match="only one"):
        CharacterStream(tokenizer, print).put(torch.tensor([1, 2]))
