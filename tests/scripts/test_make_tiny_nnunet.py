"""The small nnU-Net: its plans have what nnU-Net's own predictor reads, and its decoder is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from config.nnunet_plans import PreprocessPlan
from data.phantom.dataset import make_dataset
from data.phantom.finding import LESION_TYPES
from models.nnunet.architecture import Architecture
from models.nnunet.checkpoint import load_nnunet_checkpoint
from models.nnunet.unet import SegmentationUNet
from scripts import make_tiny_nnunet
from scripts.make_tiny_nnunet import decoder_logits, entropy_and_dice, fold_norms, make_plans, network_to_train


def test_resampling_is_written_as_nnunet_writes_it(assets: Path) -> None:
    theirs = json.loads((assets / "nnunet_tiny" / "2d_plain" / "plans.json").read_text(encoding="utf-8"))
    intensity = theirs["foreground_intensity_properties_per_channel"]["0"]
    plans = make_plans(intensity, 2.8, [8, 24, 48, 96])
    ours, nnunets = plans["configurations"]["2d"], theirs["configurations"]["2d"]
    keys = [key for key in nnunets if key.startswith("resampling_fn")]
    assert len(keys) == 6 and {key: ours.get(key) for key in keys} == {key: nnunets[key] for key in keys}
    assert PreprocessPlan.from_nnunet(plans, "2d").spacing == (2.8, 2.8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder, 3, 2, 0, seed=5, workers=1, normal_share=0)
    return folder


@pytest.mark.parametrize("one_class", [False, True])
def test_all_of_the_network_is_trained_and_scored(data, tmp_path, monkeypatch, capsys, one_class) -> None:
    command = ["make", "--data", str(data), "--out", str(tmp_path), "--cache_dir", str(data / "cache"), "--steps", "6"]
    monkeypatch.setattr(sys, "argv", [*command, *["--one_class"] * one_class, "--features", "2", "4", "4", "4"])
    make_tiny_nnunet.main()
    assert "of 2 held-out cases: Dice " in capsys.readouterr().out
    source = load_nnunet_checkpoint(tmp_path / "fold_0" / "checkpoint_best.pth")
    names = ["background", *(["lesion"] if one_class else LESION_TYPES)]
    assert list(source.dataset_json["labels"]) == names and source.architecture.num_classes == len(names)
    torch.manual_seed(42)
    untrained = SegmentationUNet(source.architecture).state_dict()
    weights = [name for name, value in source.network_state.items() if value.ndim == 4]
    assert all(not torch.equal(source.network_state[name], untrained[name]) for name in weights)


def test_deep_supervision_ends_in_the_forward_pass() -> None:
    plans = make_plans({}, 2.8, [2, 4, 4, 4])
    network = SegmentationUNet(Architecture.from_plans(plans, "2d", in_channels=1, num_classes=3)).eval()
    image = torch.randn(2, 1, 32, 32)
    logits = list(decoder_logits(network.decoder, network.encoder(image)))
    assert [out.shape[-1] for out in logits] == [8, 16, 32]
    torch.testing.assert_close(logits[-1], network(image))
    right = torch.nn.functional.one_hot(logits[-1].argmax(1), 3).movedim(-1, 1).float()
    assert entropy_and_dice(50 * right, right) == pytest.approx(-1, abs=1e-3)
    assert np.isfinite(float(entropy_and_dice(logits[-1], torch.eye(3)[0].view(1, 3, 1, 1).expand_as(right))))


def test_folded_norms_leave_the_function_as_it_is() -> None:
    planned = Architecture.from_plans(make_plans({}, 2.8, [2, 4, 4, 4]), "2d", in_channels=1, num_classes=3)
    network = network_to_train(planned)
    for _ in range(5):
        network(3 * torch.randn(4, 1, 32, 32) + 1)  # the norms' running statistics
    image = torch.randn(2, 1, 32, 32)
    expected = network.eval()(image)
    fold_norms(network)
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
    saved = SegmentationUNet(planned)
    saved.load_state_dict(network.state_dict())
    torch.testing.assert_close(saved(image), expected, rtol=1e-4, atol=1e-5)
