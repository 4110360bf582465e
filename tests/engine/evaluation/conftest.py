"""A random model, small enough for a processor, and a batch of three cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from config.schema import load_config
from data.medical_vlm_dataset import pad_tokens
from models.language_model.mamba_lm import MambaLM
from models.medical_vlm import MedicalVLM, VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder

WIDTH = 16


def make_lm() -> MambaLM:
    """Random weights, large enough that the text depends on what was read; one token a byte."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**vocabulary, "<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=264, hidden_size=WIDTH, num_hidden_layers=2, state_size=4, tie_word_embeddings=False
    )
    model = MambaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        for layer in model.backbone.layers:
            for part in (layer.mixer.in_proj, layer.mixer.x_proj, layer.mixer.conv1d):
                part.weight.mul_(3)
    return MambaLM(model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end), "random")


@pytest.fixture(scope="module")
def model(assets: Path) -> MedicalVLM:
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=2)
    config = load_config(
        None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=8, slices=2, use_cmi=True
    )
    torch.manual_seed(1)
    return MedicalVLM(VisionBridge.build(config, encoder, WIDTH, 1.0, with_cmi=True), make_lm()).eval()


@pytest.fixture(scope="module")
def batch(model: MedicalVLM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids, mask = pad_tokens([model.lm.tokenizer.encode(text) for text in ("a\n", "long?\n", "xy\n")])
    return {
        "images": torch.randn(3, 2, 1, 64, 64, generator=generator),
        "slice_position": torch.tensor([[0.2, 0.6]] * 3),
        "roi": torch.zeros(3, 2, 4),
        "question_ids": ids,
        "question_mask": mask,
        "answer_ids": torch.randint(0, 256, (3, 7), generator=generator),
        "answer_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 6 + [0]]),
    }
