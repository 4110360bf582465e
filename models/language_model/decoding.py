"""Settings of decoding, stop strings and streaming.

Search and sampling are those of Hugging Face's ``generate``. This module checks its settings and adds what it lacks:
stop strings on decoded text, and a stream of whole characters (a byte-level BPE token may hold half of one).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from config.errors import InputError

LEAST_LIKELY = 0.05  # a sampled token's probability by the likeliest one's
INCOMPLETE = "\ufffd"  # what a decoder shows for bytes that are no whole character
OPENING_LENGTH = 20  # characters within which a report's opening ("所见：", "Findings:") ends
_SENTENCE_END = "。.!！?？;；\n"


@dataclass(frozen=True)
class Decoding:
    """Settings of the search; the defaults are greedy, without penalties.

    ``temperature`` 0 is greedy, above it sampling; ``top_p`` keeps the likeliest tokens of that total probability;
    the penalties count what was generated, not the question.

    Raises InputError: a value out of its range, or two that contradict each other.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 <= self.temperature <= 10, "0 (greedy) to 10"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1 (all tokens)"),
            "num_beams": (1 <= self.num_beams <= 64, "a whole number from 1 (no beam search) to 64"),
            "repetition_penalty": (0.1 <= self.repetition_penalty <= 10, "0.1 to 10, 1 being none"),
            "no_repeat_ngram_size": (0 <= self.no_repeat_ngram_size <= 1000, "a whole number from 0 (off) to 1000"),
        }
        for name, (is_allowed, expected) in allowed.items():  # NaN is in no range
            if not is_allowed:
                raise InputError(f"--{name} {getattr(self, name)}: expected {expected}")
        if self.top_p < 1 and self.temperature == 0:
            raise InputError(f"--top_p {self.top_p} has no effect on greedy decoding: add --temperature, for example 1")
        if self.num_beams > 1 and self.temperature > 0:
            raise InputError("--num_beams searches, --temperature samples: give one of them")

    def options(self) -> dict[str, object]:
        """Keyword arguments of HF ``generate``. Greedy decoding without penalties needs none."""
        options: dict[str, object] = {}
        if self.temperature > 0:
            # HF would keep only the 50 likeliest tokens.
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        if self.num_beams > 1:
            # Rows without a token are masked after the softmax of a beam: the rest must sum to one again.
            options |= {"num_beams": self.num_beams, "renormalize_logits": True}
        if self.repetition_penalty != 1:
            options["repetition_penalty"] = self.repetition_penalty
        if self.no_repeat_ngram_size:
            options["no_repeat_ngram_size"] = self.no_repeat_ngram_size
        return options


class StopRule:
    """Where a text ends apart from the end-of-text token; what comes before the cut stays as it is."""

    def __init__(self, strings: Sequence[str] = (), *, at_restart: bool = False) -> None:
        """
        Args:
            strings: the text ends before the first of them.
            at_restart: it also ends where its own opening, up to the first colon, begins a sentence once more
                (所见：… 结论：… 所见：…): the model has finished and writes the next report.

        Raises InputError: an empty string, at which any text would end before it began.
        """
        if "" in strings:
            raise InputError("--stop '': expected at least one character; leave the flag out to stop at the end only")
        self.strings = tuple(strings)
        self.at_restart = at_restart

    def __bool__(self) -> bool:
        return bool(self.strings) or self.at_restart

    def end(self, text: str) -> int | None:
        """The index at which ``text`` is to be cut, or None."""
        found = [position for string in self.strings if (position := text.find(string)) >= 0]
        if opening := self._opening(text):
            again = re.compile(rf"(?<=[{_SENTENCE_END}])\s*{re.escape(opening)}").search(text, text.index(opening) + 1)
            found += [again.start()] if again else []
        return min(found, default=None)

    def cut(self, text: str) -> str:
        return text[: self.end(text)]

    def settled(self, text: str) -> int:
        """How many characters of an unfinished ``text`` no continuation can cut off any more."""
        end = self.end(text)
        if end is not None:
            return end
        settled = len(text) - max((_overlap(text, string) for string in self.strings), default=0)
        if opening := self._opening(text):
            first = text.index(opening) + len(opening)
            before = len(text) - _overlap(text[first:], opening)
            settled = min(settled, len(text[:before].rstrip()))
        return settled

    def _opening(self, text: str) -> str | None:
        if not self.at_restart:
            return None
        match = re.match(rf"\s*([^:：\n]{{1,{OPENING_LENGTH - 1}}}[:：])", text)
        return match and match[1]


def _overlap(text: str, string: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``string``."""
    return next((n for n in range(min(len(text), len(string)), 0, -1) if text.endswith(string[:n])), 0)


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] | Tensor) -> str:
    """The decoded text without special tokens; no space is cleaned up."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopAtText(StoppingCriteria):
    """Ends a row whose text a :class:`StopRule` cuts. For generation from embeddings: every id is generated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rule: StopRule) -> None:
        self.tokenizer = tokenizer
        self.rule = rule

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        done = [self.rule.end(plain_text(self.tokenizer, row)) is not None for row in input_ids.tolist()]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


class Varied(LogitsProcessor):
    """Makes greedy decoding sample ``count`` texts of each prompt, from the coolest to the warmest.

    The largest of logits plus T times Gumbel noise is a sample at temperature T, here of the tokens that are not far
    less likely than the likeliest (min-p, Nguyen et al. 2024, arXiv:2407.01082). The noise depends on ``seed``, on a
    row's place among the ``count`` rows of its prompt, and on the token's place in the text: the texts are the same
    each time, and whatever else is in the batch.
    """

    def __init__(self, count: int, temperatures: tuple[float, float], seed: int = 0) -> None:
        self.count, self.seed = count, seed
        self.temperatures = torch.linspace(*temperatures, count)[:, None]
        self.random: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.random is None:
            self.random = torch.Generator(scores.device).manual_seed(self.seed)
        uniform = torch.rand(self.count, scores.shape[1], generator=self.random, device=scores.device)
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7))) * self.temperatures.to(scores.device)
        likely = scores > scores.amax(1, keepdim=True) + math.log(LEAST_LIKELY)
        return (scores.float() + noise.repeat(len(scores) // self.count, 1)).masked_fill(~likely, -math.inf)


class FirstTokenClock(StoppingCriteria):
    """Measures the seconds from its creation to the first token, and counts the tokens; stops nothing. Works with
    beams, unlike a streamer."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: float | None = None
        self.tokens = 0

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        self.tokens = input_ids.shape[1]
        if self.seconds is None:
            input_ids[0, -1].item()  # waits for a GPU to have it
            self.seconds = time.perf_counter() - self.started
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class CharacterStream(BaseStreamer):
    """Writes a text while it is generated, in whole characters; in total exactly the text without streaming.

    It holds back what ``rule`` may still cut and the bytes of an unfinished character; bytes that never become one
    are written at the end as the decoder shows them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], object], rule: StopRule | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.write = write
        self.rule = rule or StopRule()
        self.ids: list[int] = []
        self.shown = 0

    def put(self, value: Tensor) -> None:
        if value.dim() == 2:  # the prompt's ids: none, because it is given as embeddings
            return
        if len(value) != 1:
            raise ValueError(f"only one text can be streamed, not {len(value)}")
        self.ids += value.tolist()
        text = plain_text(self.tokenizer, self.ids).rstrip(INCOMPLETE)
        self._show(text, self.rule.settled(text))

    def end(self) -> None:
        text = self.rule.cut(plain_text(self.tokenizer, self.ids))
        self._show(text, len(text))
        self.ids, self.shown = [], 0

    def _show(self, text: str, until: int) -> None:
        if until > self.shown:
            self.write(text[self.shown : until])
            self.shown = until
