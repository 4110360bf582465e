"""A language model's configuration, tokenizer and identity, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, MambaConfig, PreTrainedTokenizerBase
from transformers.utils import cached_file

from config.errors import InputError, first_line
from models.language_model.embedding_table import check_weight_files, not_found


@dataclass(frozen=True)
class LMIdentity:
    """What a checkpoint remembers of its language model, to notice a different one later."""

    name: str
    width: int
    layers: int
    vocabulary: int
    tokens: int
    adapters: str = ""  # digest of Stage 0's

    @classmethod
    def of(cls, name: str, config: MambaConfig, tokenizer: PreTrainedTokenizerBase, adapters: str = "") -> LMIdentity:
        sizes = config.hidden_size, config.num_hidden_layers, config.vocab_size, len(tokenizer)
        return cls(name, *sizes, adapters)

    def to_dict(self) -> dict[str, str | int]:
        return dict(vars(self))


def read_lm_config(name: str) -> MambaConfig:
    """The model's configuration alone; of its weights no more than the files' headers is read.

    Raises InputError: neither a folder nor reachable on the hub, not a Mamba-1 model, or a truncated file of weights.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise not_found(name, error) from error
    if config.model_type != "mamba":
        what = f"is a '{config.model_type}' model; expected model_type 'mamba' (Mamba-1)"
        raise InputError(f"mamba_model '{name}' {what}")
    if config.hidden_act not in ("silu", "swish"):
        raise InputError(
            f"mamba_model '{name}' has hidden_act '{config.hidden_act}'; expected 'silu', as of every Mamba"
        )
    check_weight_files(Path(cached_file(name, "config.json")))
    return config


def read_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padded with the end-of-text token where it has no padding of its own.

    Raises InputError: the files are missing, or the tokenizer has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"mamba_model '{name}' has no usable tokenizer: put tokenizer.json (and tokenizer_config.json) into "
            f"the folder ({first_line(error)})"
        ) from error
    if not tokenizer.encode("a", add_special_tokens=False):
        # Without its files, transformers builds an empty tokenizer that turns every text into nothing.
        raise InputError(f"mamba_model '{name}' has no tokenizer files: put tokenizer.json into the folder")
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of mamba_model '{name}' has no eos_token: set it in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def lm_identity(name: str) -> LMIdentity:
    """Raises: InputError as :func:`read_lm_config` and :func:`read_tokenizer` do."""
    return LMIdentity.of(name, read_lm_config(name), read_tokenizer(name))
