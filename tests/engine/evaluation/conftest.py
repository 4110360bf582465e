"""A random model, small enough for a processor, and a batch of three cases."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from config.schema import load_config
from data.medical_vlm_dataset import pad_tokens
from models.medical_vlm import MedicalVLM, VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder
from tests.models.language_model.tiny import sharp_lm

WIDTH = 16


@pytest.fixture(scope="module")
def model(assets: Path) -> MedicalVLM:
    source = load_nnunet_checkpoint(assets / "nnunet_tiny" / "2d_plain" / "fold_0" / "checkpoint_best.pth")
    encoder = NnUNetEncoder.from_checkpoint(source, target_spatial=4, planes=2)
    config = load_config(
        None, bridge_width=8, bridge_depth=1, encoder_target_spatial=4, max_visual_tokens=8, slices=2, use_cmi=True
    )
    lm = sharp_lm(hidden_size=WIDTH, num_hidden_layers=2, state_size=4)
    torch.manual_seed(1)
    return MedicalVLM(VisionBridge.build(config, encoder, WIDTH, 1.0, with_cmi=True), lm).eval()


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
