"""The rebuilt networks compute what nnU-Net's own computed, stage by stage and to the logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from config.errors import InputError
from models.nnunet.architecture import Architecture
from models.nnunet.checkpoint import NnUNetCheckpoint, load_nnunet_checkpoint
from models.nnunet.encoder import NnUNetEncoder, default_stage
from models.nnunet.unet import SegmentationUNet

TINY = ["2d_plain", "2d_resenc", "3d_plain"]
LARGE = ["2d_plain", "3d_plain"]


def _reference(folder: Path) -> tuple[NnUNetCheckpoint, dict[str, np.ndarray]]:
    (file,) = folder.glob("reference_*.npz")
    return load_nnunet_checkpoint(folder / "fold_0" / "checkpoint_best.pth"), dict(np.load(file))


def _assert_parity(folder: Path) -> None:
    checkpoint, reference = _reference(folder)
    encoder = NnUNetEncoder.from_checkpoint(checkpoint).eval()
    network = SegmentationUNet.from_checkpoint(checkpoint).eval()
    x = torch.from_numpy(reference["network_input"])
    with torch.no_grad():
        features, logits = encoder.stage_features(x), network(x)
    assert len(features) == sum(key.startswith("stage_") for key in reference)
    for index, feature in enumerate(features):
        expected = torch.from_numpy(reference[f"stage_{index}"])
        torch.testing.assert_close(feature, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, torch.from_numpy(reference["logits"]), rtol=1e-3, atol=1e-4)


def _plans(assets: Path, name: str = "2d_plain") -> dict:
    return json.loads((assets / "nnunet_tiny" / name / "plans.json").read_text(encoding="utf-8"))


def _from_plans(plans: dict, configuration: str = "2d") -> Architecture:
    return Architecture.from_plans(plans, configuration, in_channels=1, num_classes=2)


def _architecture(assets: Path, name: str = "2d_plain", configuration: str = "2d") -> Architecture:
    return _from_plans(_plans(assets, name), configuration)


@pytest.mark.parametrize("name", TINY)
def test_stages_and_logits_equal_nnunets_tiny(assets, name):
    _assert_parity(assets / "nnunet_tiny" / name)


@pytest.mark.parametrize("name", LARGE)
def test_stages_and_logits_equal_nnunets(shared, name):
    _assert_parity(shared / "nnunet" / name)


@pytest.mark.parametrize(
    ("name", "configuration", "shape", "expected"),
    [
        ("2d_plain", "2d", (3, 1, 64, 64), (3, 16, 9, 9)),
        ("2d_resenc", "2d", (2, 1, 96, 64), (2, 16, 9, 9)),
        ("3d_plain", "3d_fullres", (2, 1, 8, 48, 48), (2, 5, 16, 9, 9)),
    ],
)
def test_forward_pools_the_chosen_stage(assets, name, configuration, shape, expected):
    encoder = NnUNetEncoder(_architecture(assets, name, configuration), 2, target_spatial=9, planes=5)
    x = torch.randn(shape)
    out = encoder(x)
    assert out.shape == expected
    raw = encoder.stage_features(x)[2]
    # Whatever the pooling grid, a bin lies within its stage's range, and planes follow the batch axis.
    assert out.amax() <= raw.amax() and out.amin() >= raw.amin()
    if encoder.dim == 3:
        pooled = torch.nn.functional.adaptive_avg_pool3d(raw, (5, 9, 9))
        torch.testing.assert_close(out[:, 3, 7], pooled[:, 7, 3])


def test_default_stage_is_the_deepest_that_fills_the_grid(assets):
    network = _architecture(assets)  # patch 64 x 64, sizes 64 32 16 8
    assert [default_stage(network, side) for side in (65, 64, 33, 28, 16, 8, 1)] == [0, 0, 0, 1, 2, 3, 3]
    encoder = NnUNetEncoder(network)
    assert (encoder.output_stage, encoder.out_channels, encoder.total_stride) == (1, 8, (2, 2))
    volumetric = NnUNetEncoder(_architecture(assets, "3d_plain", "3d_fullres"), target_spatial=20)
    assert volumetric.output_stage == 1 and volumetric.total_stride == (1, 2, 2)
    assert volumetric.network.patch_size == (8, 48, 48)


def test_deeper_stages_are_not_computed(assets):
    encoder = NnUNetEncoder(_architecture(assets), 1)
    encoder.encoder.stages[2].register_forward_hook(lambda *_: pytest.fail("stage 2 ran"))
    encoder(torch.randn(1, 1, 64, 64))


def test_rebuilt_from_its_stored_architecture(assets):
    checkpoint, _ = _reference(assets / "nnunet_tiny" / "2d_resenc")
    original = NnUNetEncoder.from_checkpoint(checkpoint, 1, target_spatial=7, planes=2)
    rebuilt = NnUNetEncoder.from_architecture(json.loads(json.dumps(original.architecture)))
    assert rebuilt.architecture == original.architecture
    rebuilt.load_state_dict(original.state_dict(), strict=True)
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(rebuilt(x), original(x))
    with pytest.raises(InputError, match="'planes' is missing"):
        NnUNetEncoder.from_architecture({k: v for k, v in original.architecture.items() if k != "planes"})


@pytest.mark.parametrize("name", TINY)
def test_state_dict_has_nnunets_names_aliases_and_values(assets, name):
    folder = assets / "nnunet_tiny" / name
    network = SegmentationUNet.from_checkpoint(_reference(folder)[0])
    # Reference material of ours: this is the file's own state dict, aliases included.
    content = torch.load(folder / "fold_0" / "checkpoint_best.pth", weights_only=False)
    stored, own = content["network_weights"], network.state_dict_nnunet()
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[key], stored[key]) for key in stored)


def test_old_plans_describe_the_same_network_and_others_are_refused(assets):
    plans = _plans(assets)
    configuration = plans["configurations"]["2d"]
    with pytest.raises(InputError, match="neither 'architecture' nor 'UNet_class_name'"):
        _from_plans({"configurations": {"2d": {"patch_size": [8, 8]}}})
    kwargs = configuration.pop("architecture")["arch_kwargs"]
    configuration.update(
        UNet_class_name="PlainConvUNet",
        UNet_base_num_features=kwargs["features_per_stage"][0],
        unet_max_num_features=max(kwargs["features_per_stage"]),
        conv_kernel_sizes=kwargs["kernel_sizes"],
        pool_op_kernel_sizes=kwargs["strides"],
        n_conv_per_stage_encoder=kwargs["n_conv_per_stage"],
        n_conv_per_stage_decoder=kwargs["n_conv_per_stage_decoder"],
    )
    old = _from_plans(plans)
    assert old.to_dict() == _architecture(assets).to_dict()
    plans["configurations"]["cascade"] = {"inherits_from": "2d", "previous_stage": "3d_lowres"}
    with pytest.raises(InputError, match="second stage of a cascade"):
        _from_plans(plans, "cascade")
    configuration["UNet_class_name"] = "MyUNet"
    with pytest.raises(InputError, match="UNet_class_name 'MyUNet'"):
        _from_plans(plans)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_op": "os.system"}, "conv_op 'os.system' is not supported"),
        ({"conv_op": "torch.nn.modules.conv.Conv1d"}, "Conv1d"),
        ({"nonlin": "torch.nn.Softmax"}, "nonlin 'torch.nn.Softmax'"),
        ({"nonlin": "torch.nn.functional.LeakyReLU.x"}, "is not supported"),
        ({"norm_op_kwargs": {"device": "cuda"}}, "not supported: device"),
        ({"squeeze_excitation": True}, "squeeze_excitation=True"),
        ({"nonlin_first": True}, "nonlin_first=True"),
        ({"strides": [[1, 1], [2, 2]]}, "strides .* each of 4 stages"),
        ({"features_per_stage": [4, 8]}, "features_per_stage"),
    ],
)
def test_architectures_outside_the_allow_list_are_refused_by_name(assets, change, message):
    plans = _plans(assets)
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"].update(change)
    with pytest.raises(InputError, match=message):
        _from_plans(plans)


def test_scalars_in_plans_mean_every_stage_and_axis(assets):
    described = _architecture(assets).to_dict()
    described["arch_kwargs"].update(kernel_sizes=3, n_conv_per_stage=2, features_per_stage=6)
    network = Architecture.from_dict(described)
    assert network.kernel_sizes == ((3, 3),) * 4 and network.blocks == (2,) * 4 and network.features == (6,) * 4


def test_a_residual_network_without_norms_is_built(assets):
    described = _architecture(assets, "2d_resenc").to_dict()
    described["arch_kwargs"].update(norm_op=None, norm_op_kwargs=None)
    names = SegmentationUNet(Architecture.from_dict(described)).state_dict_nnunet()
    assert "encoder.stages.0.blocks.0.conv1.conv.weight" in names and not any(".norm." in name for name in names)


def test_dropout_moves_the_alias_of_the_norm(assets):
    described = _architecture(assets, "2d_resenc").to_dict()
    described["arch_kwargs"].update(dropout_op="torch.nn.modules.dropout.Dropout2d", dropout_op_kwargs={"p": 0.1})
    names = SegmentationUNet(Architecture.from_dict(described)).state_dict_nnunet()
    first = "encoder.stages.0.blocks.0.conv1.all_modules"
    assert f"{first}.2.weight" in names and f"{first}.1.weight" not in names
    second = "encoder.stages.0.blocks.0.conv2.all_modules"  # never has dropout
    assert f"{second}.1.weight" in names and f"{second}.2.weight" not in names


def test_wrong_stage_and_wrong_input_are_named(assets):
    network = _architecture(assets, "2d_resenc")
    with pytest.raises(InputError, match="encoder_output_stage is 4, but the encoder has stages 0 to 3"):
        NnUNetEncoder(network, 4)
    encoder = NnUNetEncoder(network, 3)
    with pytest.raises(ValueError, match=r"expected \(B, 1, H, W\)"):
        encoder(torch.randn(1, 2, 64, 64))
    with pytest.raises(ValueError, match=r"divisible by \(8, 8\)"):
        encoder(torch.randn(1, 1, 60, 64))


def test_weights_of_another_network_are_refused_by_name(assets):
    checkpoint, _ = _reference(assets / "nnunet_tiny" / "2d_plain")
    wider = replace(checkpoint, architecture=replace(checkpoint.architecture, features=(4, 8, 16, 32)))
    with pytest.raises(InputError, match=r"encoder\.stages\.3.* has shape"):
        NnUNetEncoder.from_checkpoint(wider)
    deeper = replace(checkpoint, architecture=replace(checkpoint.architecture, blocks=(2, 2, 2, 4)))
    with pytest.raises(InputError, match="is missing"):
        NnUNetEncoder.from_checkpoint(deeper)
    larger = {**checkpoint.network_state, "encoder.extra": torch.zeros(1)}
    with pytest.raises(InputError, match=r"'encoder\.extra' is unknown"):
        NnUNetEncoder.from_checkpoint(replace(checkpoint, network_state=larger))


# ---------------------------------------------------------------- where a feature looks


def _measured_offset(encoder: NnUNetEncoder, size: int) -> float:
    """Voxels, along the last axis, by which the centre of a feature's gradient lies before the centre of its cell.

    The network is made linear, with equal weights; the feature is the one in the middle of the grid.
    """
    for module in list(encoder.modules()):
        for child, part in module.named_children():
            if "Norm" in type(part).__name__ or "ReLU" in type(part).__name__:
                setattr(module, child, torch.nn.Identity())
    for name, parameter in encoder.named_parameters():
        torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 0.01)
    x = torch.zeros(1, encoder.in_channels, size, size, requires_grad=True)
    features = encoder(x)
    at = features.shape[-1] // 2
    features[0, 0, at, at].backward()
    weight = x.grad.abs().sum((0, 1, 2)).double()
    centre = float((weight * torch.arange(size)).sum() / weight.sum())
    return (at + 0.5) * size / features.shape[-1] - 0.5 - centre


@pytest.mark.parametrize(("stage", "target"), [(0, 64), (1, 32), (2, 16), (2, 8), (1, 8)])
def test_the_receptive_field_is_centred_before_the_cell(assets, stage, target):
    """Also where features are pooled: with a stride of 4 in cells of 4 or 8 it is 1.5 voxels."""
    encoder = NnUNetEncoder(_architecture(assets), output_stage=stage, target_spatial=target)
    assert encoder.receptive_field_offset == tuple((stride - 1) / 2 for stride in encoder.total_stride)
    assert _measured_offset(encoder, 64) == pytest.approx(encoder.receptive_field_offset[-1], abs=1e-3)


def test_the_shortcut_of_residual_stages_halves_the_offset(assets):
    encoder = NnUNetEncoder(_architecture(assets, "2d_resenc"), output_stage=2, target_spatial=16)
    assert encoder.receptive_field_offset == tuple((stride - 1) / 4 for stride in encoder.total_stride)
    assert 0 < _measured_offset(encoder, 64) < 2 * encoder.receptive_field_offset[-1]


def test_axes_without_stride_have_no_offset(assets):
    architecture = _architecture(assets, "3d_plain", "3d_fullres")
    assert architecture.receptive_field_offset(0) == (0, 0, 0)
    assert architecture.receptive_field_offset(1) == (0, 0.5, 0.5)
