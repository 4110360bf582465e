"""The frozen language model: any Mamba of the hub or of a local folder, fed with embeddings.

    inputs_embeds [B, L, D] → hidden [B, L, D] → logits [B, L, V]

``V`` counts embedding rows (50,280 for Mamba-2.8B); the tokenizer has fewer tokens (50,277). Rows
without a token are masked, so that they are never generated.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import StoppingCriteria

from config.errors import InputError
from models.language_model.adapter_file import read_adapters
from models.language_model.cuda_graph_decode import static_steps
from models.language_model.decoding import StopAtText, StopRule, plain_text
from models.language_model.embedding_table import not_found
from models.language_model.hf_patch import read_in_chunks, recompute_blocks, use_our_scan
from models.language_model.identity import LMIdentity, read_lm_config, read_tokenizer
from models.language_model.lora import merge
from models.language_model.quantisation import bitsandbytes_options, quantise_int8

IGNORED = -100  # label of a position that the loss skips
TIED_MESSAGE = "lm_head 已绑定到 input_embeddings"  # users look for this line
LARGE_MODEL = 1_000_000_000  # parameters from which "auto" means bfloat16 on a CPU too, and blocks are recomputed
LOSS_CHUNK = 256  # answer tokens whose logits exist at one time: 50 MB in float32 with 50,280 rows


class _Mamba(MambaForCausalLM):
    # Rounded decay rates accumulate over the sequence; both stay float32 whatever the weights' dtype.
    _keep_in_fp32_modules_strict = {"A_log", "mixer.D"}


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
        use_our_scan(model)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def load(
        cls,
        name: str,
        *,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        load_in_8bit: bool = False,
        int8: bool = False,
        stage0: str | Path | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> MambaLM:
        """
        Args:
            name: hub name or local folder.
            dtype: ``auto`` (bfloat16 on an accelerator or from a billion parameters, else float32) or torch's name.
            load_in_8bit: weights in int8 through bitsandbytes (GPU only).
            int8: the large weights in int8 by our own layers, on any device; ``dtype`` is that of the rest.
            stage0: file of Stage 0's adapters (language_model_adapters), merged into the weights.
            adapters: of a checkpoint that was trained with --lora_rank; merged after them.

        Raises:
            InputError: not found, not a Mamba-1, weights or bitsandbytes missing, adapters of another model, or options
                that exclude each other.
        """
        device = torch.device(device)
        adapted = bool(adapters or stage0)
        eight_bit = bitsandbytes_options(device, int8=int8, adapters=adapted) if load_in_8bit else {}
        stage0 = read_adapters(Path(stage0)) if stage0 else None
        config, tokenizer = read_lm_config(name), read_tokenizer(name)
        kind = _dtype(dtype, config, device)
        try:
            model, report = _Mamba.from_pretrained(name, output_loading_info=True, dtype=kind, **eight_bit)
        except (OSError, ValueError, RuntimeError) as error:
            raise not_found(name, error) from error
        missing = set(report["missing_keys"]) - {"lm_head.weight"}
        if missing or report["mismatched_keys"]:
            what = sorted(missing)[:3] or sorted(map(str, report["mismatched_keys"]))[:3]
            raise InputError(f"weights of mamba_model '{name}' are incomplete or of another shape: {', '.join(what)}")
        _tie_head(model, head_missing="lm_head.weight" in report["missing_keys"])
        if stage0:
            stage0.merge_into(model, LMIdentity.of(name, config, tokenizer).to_dict())
        if adapters:
            merge(model, adapters)
        if int8:
            quantise_int8(model)  # before it moves: the device never holds the weights as they were
        if not load_in_8bit:
            model.to(device)
        return cls(model, tokenizer, name, stage0.digest if stage0 else "")

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
        hidden = self.model.backbone(inputs_embeds=inputs_embeds, use_cache=False).last_hidden_state
        target = labels[:, 1:]
        wanted = target != IGNORED
        # Logits of the answer alone, some at a time; they are made again in the backward pass.
        pairs = zip(hidden[:, :-1][wanted].split(LOSS_CHUNK), target[wanted].split(LOSS_CHUNK), strict=True)
        parts = [checkpoint(self._token_log_probs, *pair, use_reentrant=False) for pair in pairs]
        return torch.cat(parts), wanted.sum(1)

    def _token_log_probs(self, hidden: Tensor, target: Tensor) -> Tensor:
        hidden = hidden.to(self.model.get_input_embeddings().weight.dtype)  # the last norm leaves it in float32
        logits = self.model.lm_head(hidden)[:, : self.known_tokens].float()
        return -F.cross_entropy(logits, target, reduction="none")

    def checkpointing(self, wanted: bool | None) -> bool:
        """Keep only the blocks' inputs for the backward pass (None: from a billion parameters on); returns which."""
        wanted = _is_large(self.model.config) if wanted is None else wanted
        recompute_blocks(self.model, wanted)
        return wanted

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
        with static_steps(self.model, max_new_tokens, int(options.get("num_beams", 1))):
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


def _dtype(wanted: str, config: MambaConfig, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if device.type != "cpu" or _is_large(config) else torch.float32


def _is_large(config: MambaConfig) -> bool:
    """Counts in_proj, out_proj and the embedding table, which hold nearly all parameters of a Mamba."""
    weights = 3 * config.num_hidden_layers * config.intermediate_size + config.vocab_size
    return weights * config.hidden_size > LARGE_MODEL


def _tie_head(model: MambaForCausalLM, head_missing: bool) -> None:
    """The official ``-hf`` files hold no head: it is the embedding table, or it would be random."""
    table = model.get_input_embeddings().weight
    if head_missing:
        model.lm_head.weight = table
    if model.lm_head.weight is table:
        print(TIED_MESSAGE, flush=True)
    else:
        logging.getLogger(__name__).warning("lm_head has weights of its own in these files; it is not tied")
