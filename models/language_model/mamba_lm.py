"""The frozen language model: any Mamba of the hub or of a local folder, fed with embeddings.

    inputs_embeds [B, L, D] → hidden [B, L, D] → logits [B, L, V]

``V`` counts embedding rows (50,280 for Mamba-2.8B); the tokenizer has fewer tokens (50,277). Rows
without a token are masked, so that they are never generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaForCausalLM, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import StoppingCriteria

from config.errors import InputError
from models.language_model.cuda_graph_decode import static_steps
from models.language_model.decoding import StopAtText, StopRule, plain_text
from models.language_model.hf_patch import BlockMemory, read_in_chunks, use_our_scan
from models.language_model.identity import LMIdentity
from models.language_model.loading import is_large, load_language_model

IGNORED = -100  # label of a position that the loss skips
LOSS_CHUNK = 256  # answer tokens whose logits exist at one time: 50 MB in float32 with 50,280 rows


class MambaLM(nn.Module):
    """A frozen ``MambaForCausalLM`` with its tokenizer."""

    def __init__(
        self, model: MambaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, adapters: str = ""
    ) -> None:
        """``adapters``: digest of those of Stage 0 in the weights."""
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.adapters = adapters
        self.known_tokens = min(len(tokenizer), model.config.vocab_size)
        self.memory = BlockMemory(model, LOSS_CHUNK)
        use_our_scan(model)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(cls, name: str, **options: Any) -> MambaLM:
        """Hub name or local folder; options and errors are those of
        :func:`models.language_model.loading.load_language_model`."""
        return cls(*load_language_model(name, **options))

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def identity(self) -> LMIdentity:
        return LMIdentity.of(self.name, self.model.config, self.tokenizer, self.adapters)

    def embed(self, ids: Tensor) -> Tensor:
        """(B, L) token ids → (B, L, D).

        Raises InputError: a token of a tokenizer that is larger than the embedding table has no row in it.
        """
        if len(self.tokenizer) > self.known_tokens and ids.numel() and int(ids.max()) >= self.known_tokens:
            token = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise InputError(
                f"the text contains the token '{token}', for which mamba_model '{self.name}' has no embedding row "
                f"({self.known_tokens} rows, {len(self.tokenizer)} tokens): use the tokenizer that belongs to the model"
            )
        return self.model.get_input_embeddings()(ids)

    def answer_loss(self, inputs_embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross-entropy of the labelled tokens in nats, and their number.

        The arguments are those of :meth:`answer_log_probs`.
        """
        log_probs, counts = self.answer_log_probs(inputs_embeds, labels)
        return -log_probs.sum(), counts.sum()

    def answer_log_probs(self, inputs_embeds: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each labelled token given everything before it.

        Args:
            inputs_embeds: (B, L, D), padded on the right: a causal model needs no mask then.
            labels: (B, L) token ids, :data:`IGNORED` where nothing is to be learnt.

        Returns:
            (N,) float32, all labelled tokens row by row, and (B,) their number in each row.
        """
        wanted = (target := labels[:, 1:]) != IGNORED
        rows, places = wanted.nonzero(as_tuple=True)  # before the backbone: it makes the CPU wait for the device
        self.memory.choose(inputs_embeds)
        hidden = self.model.backbone(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        # Logits of the answer alone, some at a time; they are made again in the backward pass.
        pairs = zip(*(all_of[rows, places].split(LOSS_CHUNK) for all_of in (hidden, target)), strict=True)
        parts = [checkpoint(self._token_log_probs, *pair, use_reentrant=False) for pair in pairs]
        return torch.cat(parts), wanted.sum(1)

    def _token_log_probs(self, hidden: Tensor, target: Tensor) -> Tensor:
        hidden = hidden.to(self.model.get_input_embeddings().weight.dtype)  # the last norm leaves it in float32
        logits = self.model.lm_head(hidden)[:, : self.known_tokens].float()
        return -F.cross_entropy(logits, target, reduction="none")

    def checkpointing(self, wanted: bool | Literal["auto"] | None, reserve: int = 0) -> bool:
        """Keep only the blocks' inputs for the backward pass, as :meth:`BlockMemory.decide` says."""
        return self.memory.decide(wanted, reserve, large=is_large(self.model.config))

    @torch.no_grad()
    def prefill(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> tuple[Tensor, Cache]:
        """Read a prompt in chunks: working memory does not grow with L, and no logits are made.

        Args:
            inputs_embeds: (B, L, D), padded on the left. attention_mask: (B, L), 0 on the padding.
            cache: where to go on from; it is brought to the end of the prompt.

        Returns:
            The hidden state (B, D) at the last position, whose product with the head is the first token's logits,
            and the cache.
        """
        cache = DynamicCache(config=self.model.config) if cache is None else cache
        for hidden in read_in_chunks(self.model.backbone, inputs_embeds, attention_mask, cache):
            last = hidden[:, -1]
        return last, cache

    @torch.no_grad()
    def generate(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        *,
        stop: StopRule | None = None,
        criteria: Sequence[StoppingCriteria] = (),
        **options: object,
    ) -> list[str]:
        """Continue left-padded embeddings; greedy unless ``options`` (of HF ``generate``) say otherwise.

        Args:
            inputs_embeds: (B, L, D), padded on the left.
            attention_mask: (B, L), 0 on the padding.
            stop: where a text ends apart from the end-of-text token; it is cut there.
            criteria: called after every token, as HF's are.
            options: with ``cache_params``, a cache that has read what comes before, there may be no padding.

        Returns:
            B texts, exactly what the model wrote, without special tokens.
        """
        criteria = [*criteria, StopAtText(self.tokenizer, stop)] if stop else [*criteria]
        with static_steps(self.model, max_new_tokens):
            ids = self.model.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                suppress_tokens=list(range(self.known_tokens, self.model.config.vocab_size)) or None,
                stopping_criteria=criteria,
                **{"do_sample": False, **options},
            )
        texts = [plain_text(self.tokenizer, row) for row in ids]
        return [stop.cut(text) for text in texts] if stop else texts
