"""What is trained: everything that the tokens depend on, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from config.schema import build_config
from models.medical_vlm import VisionBridge
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder

WIDTH = 24


def vision_of(folder: Path, *, with_cmi: bool, **keys: object) -> VisionBridge:
    torch.manual_seed(0)
    values = {"slices": 1, "encoder_target_spatial": 6, "bridge_width": 16, "bridge_depth": 1, "max_visual_tokens": 9}
    config = build_config({**values, **keys}, "test")
    checkpoint, side = folder / "fold_0" / "checkpoint_best.pth", config.encoder_target_spatial
    encoder = NnUNetEncoder.from_checkpoint(
        load_nnunet_checkpoint(checkpoint), config.encoder_output_stage, side, config.slices
    )
    return VisionBridge.build(config, encoder, WIDTH, 0.1, with_cmi=with_cmi)


@pytest.mark.parametrize("kind", ["2d_plain", "2d_resenc", "3d_plain"])
@pytest.mark.parametrize(
    "keys", [{}, {"encoder_output_stage": 0, "roi_side": 4}, {"roi_side": 2, "roi_policy": "lesion"}]
)
@pytest.mark.parametrize(("train_encoder", "with_cmi"), [(False, True), (True, False)])
def test_every_trained_parameter_gets_a_gradient(assets, kind, keys, train_encoder, with_cmi):
    """Also with an output stage that is not the deepest; several processes would wait for the others for ever."""
    vision = vision_of(assets / "nnunet_tiny" / kind, with_cmi=with_cmi, **keys)
    vision.freeze(train_encoder=not train_encoder)  # the last word counts
    said = vision.freeze(train_encoder=train_encoder)
    patch = vision.encoder.network.patch_size
    images = torch.randn(2, 1, *patch) if vision.encoder.dim == 3 else torch.randn(2, 1, 1, *patch)
    roi = torch.rand(2, 1, 4)
    seen = vision.visual_tokens(vision.features(images), torch.rand(2, 1), roi)
    visual = vision.steer(seen, torch.randn(2, 3, WIDTH), torch.ones(2, 3))
    visual.pow(3).sum().backward()
    trained = {name for name, parameter in vision.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in vision.named_parameters() if parameter.grad is not None}
    assert any(name.startswith("encoder.") for name in trained) is train_encoder
    assert all(name in trained for name, _ in vision.named_parameters() if not name.startswith("encoder."))
    assert said.count("(trained)") == 1 + train_encoder + with_cmi and ("(frozen)" in said) is not train_encoder


def test_cases_of_different_size_give_what_each_gives_alone(assets):
    vision = vision_of(assets / "nnunet_tiny" / "2d_plain", with_cmi=False).eval()
    images = [torch.randn(1, 1, 64, 64), torch.randn(1, 1, 64, 128)]
    with torch.no_grad():
        together = vision.visual_tokens(vision.features(images), torch.full((2, 1), 0.5))
        for case, image in enumerate(images):
            alone = vision.visual_tokens(vision.features(image[None]), torch.full((1, 1), 0.5))
            torch.testing.assert_close(together[case : case + 1], alone, rtol=1e-4, atol=1e-6)


def test_cmi_without_a_question_is_a_defect_and_says_so(assets):
    vision = vision_of(assets / "nnunet_tiny" / "2d_plain", with_cmi=True)
    seen = vision.visual_tokens(vision.features(torch.randn(1, 1, 1, 64, 64)), torch.rand(1, 1))
    with pytest.raises(ValueError, match="question"):
        vision.steer(seen, None, None)


def test_a_frozen_encoder_stays_in_evaluation_mode(assets):
    """Or the statistics of a user's batch norms would move with every batch."""
    vision = vision_of(assets / "nnunet_tiny" / "2d_plain", with_cmi=False)
    for train_encoder in (False, True):
        vision.freeze(train_encoder=train_encoder)
        vision.train()
        assert vision.bridge.training and vision.encoder.training is train_encoder
