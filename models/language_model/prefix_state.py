"""Read an image once, ask many questions: Mamba's state after the visual tokens, kept and reused.

    visual [B, L, D] → frozen Mamba → convolution inputs [layers, B, E, K], recurrent state [layers, B, E, N]

The state of a recurrent model holds all that it has read, in a size that does not depend on L. A question
continues from a copy of it: no vision pass, no prefill of the visual tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from config.errors import InputError
from config.files import atomic_path, read_safetensors
from models.language_model.identity import LMIdentity
from models.language_model.mamba_lm import MambaLM

FORMAT = "mamba-ct-image-state"
VERSION = 1
_SAMPLED = 1024  # values of each weight that enter its fingerprint

# The compared fields, and how the message names a difference.
_COMPARED = {
    "lm_size": "another language model",
    "lm_weights": "other weights or another precision of the language model",
    "vision": "another vision checkpoint",
    "preprocessing": "another preprocessing",
    "image": "another image",
    "mask": "another lesion mask",
}


@dataclass(frozen=True)
class PrefixIdentity:
    """What a state was made from. An empty field of an expectation is not compared.

    ``lm_name`` and ``image_name`` are for people: a folder may be moved and a file renamed.
    """

    lm_name: str = ""
    lm_size: str = ""
    lm_weights: str = ""
    vision: str = ""
    preprocessing: str = ""
    image: str = ""
    mask: str = ""
    image_name: str = ""
    notices: str = ""  # kinds of sentences that stand before a report of the image, with commas; and their language
    language: str = "zh"
    key_points: str = ""  # the findings prompt

    @classmethod
    def of_model(cls, lm: MambaLM, **rest: str) -> PrefixIdentity:
        name = lm.identity.name
        return cls(lm_name=name, lm_size=lm_size(lm.identity), lm_weights=weights_fingerprint(lm.model), **rest)

    def check(self, expected: PrefixIdentity, origin: str) -> None:
        """Raises: InputError naming the first thing that differs."""
        for name, words in _COMPARED.items():
            here, wanted = getattr(self, name), getattr(expected, name)
            if wanted and here != wanted:
                raise InputError(
                    f"{origin} was made with {words} ({_short(here)} there, {_short(wanted)} here): "
                    "use what it was made with, or read the image again with --image and --save_prefix"
                )


@dataclass(frozen=True)
class PrefixState:
    """States of all layers after the visual tokens of B images. Never changed: each use gets a copy.

    ``conv``: (layers, B, E, K), the last inputs of the convolutions; ``recurrent``: (layers, B, E, N);
    ``visual_tokens``: how many were read.
    """

    conv: Tensor
    recurrent: Tensor
    visual_tokens: int

    @classmethod
    @torch.no_grad()
    def read(cls, lm: MambaLM, visual: Tensor) -> PrefixState:
        """Let the language model read visual tokens (B, L, D)."""
        dtype = lm.model.get_input_embeddings().weight.dtype
        _, cache = lm.prefill(visual.to(dtype))
        return cls.of_cache(cache, visual.shape[1])

    @classmethod
    def of_cache(cls, cache: Cache, visual_tokens: int) -> PrefixState:
        conv = torch.stack([layer.conv_states[0] for layer in cache.layers])
        recurrent = torch.stack([layer.recurrent_states[0] for layer in cache.layers])
        return cls(conv, recurrent, visual_tokens)

    @property
    def nbytes(self) -> int:
        return self.conv.nbytes + self.recurrent.nbytes

    @property
    def images(self) -> int:
        return self.conv.shape[1]

    def to(self, device: torch.device | str) -> PrefixState:
        return PrefixState(self.conv.to(device), self.recurrent.to(device), self.visual_tokens)

    def rows(self, index: list[int]) -> PrefixState:
        """The states of these images, in this order; an image may occur more than once."""
        chosen = torch.tensor(index, device=self.conv.device)
        return PrefixState(self.conv[:, chosen], self.recurrent[:, chosen], self.visual_tokens)

    def cache(self, lm: MambaLM) -> Cache:
        """A fresh cache of transformers', holding a copy: what is generated from it leaves this state as it is.

        Raises InputError: the state belongs to a model of another size.
        """
        config = lm.model.config
        needed = (config.num_hidden_layers, self.images, config.intermediate_size)
        if self.conv.shape != (*needed, config.conv_kernel) or self.recurrent.shape != (*needed, config.state_size):
            raise InputError(
                f"the image state has shapes {tuple(self.conv.shape)} and {tuple(self.recurrent.shape)}, which "
                f"mamba_model '{lm.name}' does not have: use the model that it was made with"
            )
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update_conv_state(self.conv[layer], layer, conv_kernel_size=config.conv_kernel)
            cache.update_recurrent_state(self.recurrent[layer], layer)
        return cache

    def save(self, path: Path, identity: PrefixIdentity) -> None:
        """Write a safetensors file, atomically."""
        head = {"format": FORMAT, "version": str(VERSION), "visual_tokens": str(self.visual_tokens)}
        head["identity"] = json.dumps(asdict(identity), ensure_ascii=False)
        tensors = {"conv": self.conv.cpu().contiguous(), "recurrent": self.recurrent.cpu().contiguous()}
        with atomic_path(path) as part:
            save_file(tensors, part, metadata=head)

    @classmethod
    def load(cls, path: Path) -> tuple[PrefixState, PrefixIdentity]:
        """Raises: InputError where the file is missing, damaged, not such a state, or from a newer version."""
        if not path.is_file():
            raise InputError(f"image state not found: {path}; --save_prefix writes one")
        try:
            head, tensors = read_safetensors(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a readable image state (truncated or damaged): {error}") from error
        if head.get("format") != FORMAT:
            raise InputError(f"{path} is no image state of this project: use a file that --save_prefix wrote")
        if head.get("version") != str(VERSION):
            raise InputError(
                f"{path} has format version {head.get('version')}, this program knows {VERSION}: "
                "read the image again with --image and --save_prefix"
            )
        state = cls(tensors["conv"], tensors["recurrent"], int(head["visual_tokens"]))
        return state, PrefixIdentity(**json.loads(head["identity"]))


@torch.no_grad()
def answer_from_state(
    lm: MambaLM, state: PrefixState, batch: Mapping[str, Any], max_new_tokens: int, **options: Any
) -> list[str]:
    """Answers to B questions, about the one image of ``state`` or about one each.

    Args:
        batch: ``question_ids`` and ``question_mask``, both (B, Lq), padded on the right.
        options: as :meth:`MambaLM.generate` takes them.
    """
    lengths = [int(length) for length in batch["question_mask"].sum(1)]
    questions = [batch["question_ids"][b, :length] for b, length in enumerate(lengths)]
    if state.images == 1:
        state = state.rows([0] * len(questions))
    if state.images != len(questions):
        raise ValueError(f"{len(questions)} questions about the states of {state.images} images")
    if len(set(lengths)) > 1:
        state, questions = _level(lm, state, questions)
    embeds = lm.embed(torch.stack(questions))
    cache = state.cache(lm)
    beams = int(options.get("num_beams", 1))
    if beams > 1:  # HF repeats its inputs for the beams, but no cache that it was given
        cache.reorder_cache(torch.arange(len(questions), device=embeds.device).repeat_interleave(beams))
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    return lm.generate(embeds, mask, max_new_tokens, cache_params=cache, **options)


def _level(lm: MambaLM, state: PrefixState, questions: list[Tensor]) -> tuple[PrefixState, list[Tensor]]:
    """Read all but the last token of each question, those of equal length together.

    Padding between a state and the question would decay the state and shift the convolution.
    """
    conv, recurrent = torch.empty_like(state.conv), torch.empty_like(state.recurrent)
    for length in {len(question) for question in questions}:
        rows = [b for b, question in enumerate(questions) if len(question) == length]
        after = state.rows(rows)
        if length > 1:
            cache = after.cache(lm)
            embeds = lm.embed(torch.stack([questions[b][:-1] for b in rows]))
            lm.model.backbone(inputs_embeds=embeds, cache_params=cache, use_cache=True)
            after = PrefixState.of_cache(cache, state.visual_tokens)
        conv[:, rows], recurrent[:, rows] = after.conv, after.recurrent
    return PrefixState(conv, recurrent, state.visual_tokens), [question[-1:] for question in questions]


def lm_size(identity: LMIdentity) -> str:
    """In words, for comparing and for the message; the name is no part of it."""
    sizes = f"width {identity.width}, {identity.layers} layers, {identity.vocabulary} embedding rows"
    return f"{sizes}, {identity.tokens} tokens"


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Digest of names, shapes, dtypes and evenly spread values of all weights: other weights or another precision
    give another one, without reading gigabytes."""
    digest = blake2b(digest_size=16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(tensors):
        flat = tensors[name].detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensors[name].shape)} {flat.dtype}\n".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _short(value: str) -> str:
    return value if " " in value else value[:12] or "none"
