"""Small random language models and an untrained tokenizer for the tests of this folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from models.language_model.mamba_lm import MambaLM

END = "<|endoftext|>"


def byte_tokenizer(pad_token: str | None = END) -> PreTrainedTokenizerBase:
    """256 byte tokens and an end: encodes any text without training."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, END: 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=pad_token)


def random_mamba(seed: int = 0, **options: object) -> MambaForCausalLM:
    torch.manual_seed(seed)
    settings = {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8, **options}
    return MambaForCausalLM(MambaConfig(**settings)).eval()


def sharp_lm(
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    seed: int = 0,
    sharpness: float = 40.0,
    memory: float = 3.0,
    **options: object,
) -> MambaLM:
    """A random model whose logits differ (``sharpness``) and that remembers its prompt (``memory``); as drawn, both 1,
    it hardly does."""
    model = random_mamba(seed, **{"tie_word_embeddings": False, **options})
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
        for layer in model.backbone.layers:
            for part in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.conv1d):
                part.weight.mul_(memory)
    return MambaLM(model, tokenizer or byte_tokenizer(), "random")


def without_head(path: Path) -> None:
    """Remove ``lm_head`` from the shards of a saved model, as the official repositories store it."""
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.pop("lm_head.weight", None) is not None:
            save_file(tensors, shard, metadata={"format": "pt"})
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"].pop("lm_head.weight", None)
    index.write_text(json.dumps(content), encoding="utf-8")
