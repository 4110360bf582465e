"""Loading a language model with its weights, from the hub or a local folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import cached_file

from config.errors import InputError
from models.language_model.adapter_file import read_adapters, tensor_digest
from models.language_model.embedding_table import not_found
from models.language_model.identity import LMIdentity, read_lm_config, read_tokenizer
from models.language_model.lora import merge
from models.language_model.quantisation import bitsandbytes_options, load_int8, quantise_int8, save_int8

TIED_MESSAGE = "lm_head 已绑定到 input_embeddings"  # users look for this line
LARGE_MODEL = 1_000_000_000  # parameters from which "auto" means bfloat16 on a CPU too, and blocks are recomputed


class _Mamba(MambaForCausalLM):
    # Rounded decay rates accumulate over the sequence; both stay float32 whatever the weights' dtype.
    _keep_in_fp32_modules_strict = {"A_log", "mixer.D"}


def load_language_model(
    name: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    load_in_8bit: bool = False,
    int8: bool = False,
    int8_folder: Path | None = None,
    stage0: str | Path | None = None,
    adapters: Mapping[str, Any] | None = None,
) -> tuple[MambaForCausalLM, PreTrainedTokenizerBase, str, str]:
    """The model, its tokenizer, its name, and the digest of Stage 0's adapters in its weights.

    Args:
        name: hub name or local folder.
        dtype: ``auto`` (bfloat16 on an accelerator or from a billion parameters, else float32) or torch's name.
        load_in_8bit: weights in int8 through bitsandbytes (GPU only).
        int8: the large weights in int8 by our own layers, on any device; ``dtype`` is that of the rest.
        int8_folder: where the int8 model is kept once made, and mapped into memory from then on; implies ``int8``.
        stage0: file of Stage 0's adapters (language_model_adapters), merged into the weights.
        adapters: of a checkpoint that was trained with --lora_rank; merged after them.

    Raises:
        InputError: not found, not a Mamba-1, weights or bitsandbytes missing, adapters of another model, or options
            that exclude each other.
    """
    device = torch.device(device)
    int8 = int8 or int8_folder is not None
    eight_bit = bitsandbytes_options(device, int8=int8, adapters=bool(adapters or stage0)) if load_in_8bit else {}
    stage0 = read_adapters(Path(stage0)) if stage0 else None
    config, tokenizer = read_lm_config(name), read_tokenizer(name)
    kind, digest = _dtype(dtype, config, device), stage0.digest if stage0 else ""
    kept = int8_folder and int8_file(int8_folder, name, kind, digest, adapters)
    if kept and kept.is_file():
        return _mapped(name, config, kind, kept).to(device), tokenizer, name, digest
    model = _from_pretrained(name, dtype=kind, **eight_bit)
    if stage0:
        stage0.merge_into(model, LMIdentity.of(name, config, tokenizer).to_dict())
    if adapters:
        merge(model, adapters)
    if int8:
        quantise_int8(model)  # before it moves: the device never holds the weights as they were
    if kept:
        save_int8(model, kept)
        print(f"int8 weights kept: {kept} ({kept.stat().st_size / 1e9:.1f} GB)", flush=True)
    if not load_in_8bit:
        model.to(device)
    return model, tokenizer, name, digest


def _from_pretrained(name: str, **options: Any) -> MambaForCausalLM:
    try:
        model, report = _Mamba.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise not_found(name, error) from error
    missing = set(report["missing_keys"]) - {"lm_head.weight"}
    if missing or report["mismatched_keys"]:
        what = sorted(missing)[:3] or sorted(map(str, report["mismatched_keys"]))[:3]
        raise InputError(f"weights of mamba_model '{name}' are incomplete or of another shape: {', '.join(what)}")
    _tie_head(model, head_missing="lm_head.weight" in report["missing_keys"])
    return model


def int8_file(folder: Path, name: str, dtype: torch.dtype, stage0: str, adapters: Mapping[str, Any] | None) -> Path:
    """Where ``folder`` keeps the int8 weights of a model: named by what they are made from.

    That is: its files by name, size and time of change, the dtype of what is not int8, and the adapters in it.
    """
    layers = (adapters or {}).get("layers", {})
    matrices = {f"{layer}.{part}": value for layer, parts in layers.items() for part, value in parts.items()}
    total = blake2b(f"{dtype} {stage0} {tensor_digest(matrices)}".encode(), digest_size=8)
    # of a hub model the folder of its snapshot, which is there: its configuration was read
    for path in sorted(Path(cached_file(name, "config.json")).parent.iterdir()):
        if path.suffix in (".json", ".safetensors", ".bin"):
            total.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return folder / f"int8_{total.hexdigest()}.safetensors"


def _mapped(name: str, config: MambaConfig, dtype: torch.dtype, path: Path) -> MambaForCausalLM:
    """The model of an int8 file; its weights are read from the disk as they are used."""
    config.dtype = dtype
    with torch.device("meta"):
        model = _Mamba(config).eval()
    _tie_head(model, head_missing=load_int8(model, path))
    if cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        model.generation_config = GenerationConfig.from_pretrained(name)  # as from_pretrained does
    return model


def _dtype(wanted: str, config: MambaConfig, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        return getattr(torch, wanted)
    return torch.bfloat16 if device.type != "cpu" or is_large(config) else torch.float32


def is_large(config: MambaConfig) -> bool:
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
