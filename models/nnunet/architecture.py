"""The architecture section of nnU-Net's plans, read into a checked value that can be stored as JSON.

The plans name classes that nnU-Net imports. Here a name selects an entry of an allow-list; nothing that a file names is
imported or called.

Source: nnU-Net 2.8.1 (``plans_handler.py``, for plans without ``architecture``) and dynamic-network-architectures 0.4.4
(``architectures/unet.py``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from config.errors import InputError
from config.nnunet_plans import required, resolve_configuration

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
# Plans translated by nnU-Net itself name the residual network by the module it once lived in.
_NETWORKS = {
    PLAIN: PLAIN,
    RESIDUAL: RESIDUAL,
    "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet": RESIDUAL,
}
_BLOCKS_KEY = {PLAIN: "n_conv_per_stage", RESIDUAL: "n_blocks_per_stage"}

_get = partial(required, where="architecture")
_TORCH_NAME = re.compile(r"torch\.nn\.(?:modules\.[a-z]+\.)?([A-Za-z0-9]+)")
_CONV = {"Conv2d": 2, "Conv3d": 3}
_NORM = ("InstanceNorm2d", "InstanceNorm3d", "BatchNorm2d", "BatchNorm3d")
_DROPOUT = ("Dropout", "Dropout2d", "Dropout3d")
_NONLIN = ("LeakyReLU", "ReLU", "GELU", "SiLU")
_ALLOWED_KWARGS = {
    "norm_op": {"eps", "momentum", "affine", "track_running_stats"},
    "dropout_op": {"p", "inplace"},
    "nonlin": {"negative_slope", "inplace", "approximate"},
}
# Arguments that change nothing at these values; at any other value the network would be a different one.
_NEUTRAL = {"deep_supervision": (True, False), "nonlin_first": (False,), "bottleneck_channels": (None,)}


@dataclass(frozen=True)
class Op:
    """One layer type: ``factory`` is an allowed ``torch.nn`` class, ``name`` its name in plans."""

    name: str
    factory: type[nn.Module]
    kwargs: dict[str, Any]

    def __call__(self, *args: int) -> nn.Module:
        return self.factory(*args, **self.kwargs)


@dataclass(frozen=True)
class Architecture:
    """A U-Net of nnU-Net's: what decides its parameters' names and shapes, and its arithmetic.

    Per stage, shallow to deep: ``features`` (channels), ``kernel_sizes`` and ``strides`` (``dim`` numbers
    each), ``blocks`` (convolutions, or residual blocks). ``patch_size`` is in voxels.
    """

    network: str
    dim: int
    in_channels: int
    num_classes: int
    features: tuple[int, ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    conv_bias: bool
    norm: Op | None
    dropout: Op | None
    nonlin: Op | None
    stem_channels: int
    patch_size: tuple[int, ...]

    @property
    def residual(self) -> bool:
        return self.network == RESIDUAL

    def total_stride(self, stage: int) -> tuple[int, ...]:
        """Input voxels per feature of ``stage``, per axis."""
        total = [1] * self.dim
        for strides in self.strides[: stage + 1]:
            total = [a * b for a, b in zip(total, strides, strict=True)]
        return tuple(total)

    def receptive_field_offset(self, stage: int) -> tuple[float, ...]:
        """Voxels by which the centre of a feature's receptive field lies before the centre of its cell, per axis.

        A cell is the block of ``total_stride`` voxels that the feature stands for. A padded convolution of stride s is
        centred on voxel s·i, the first of the cell; the pooling of a residual shortcut, on the middle of the cell. A
        residual stage adds both, and their mean is taken.
        """
        half = 0.25 if self.residual else 0.5  # Σ half·(s − 1)·(strides before) over the stages is half·(S − 1)
        return tuple(half * (stride - 1) for stride in self.total_stride(stage))

    @classmethod
    def from_plans(
        cls, plans: Mapping[str, Any], configuration: str, *, in_channels: int, num_classes: int
    ) -> Architecture:
        """Read one configuration of nnU-Net plans, also of those written before ``architecture`` existed.

        Raises InputError, naming key and value, for a network that cannot be rebuilt.
        """
        resolved = resolve_configuration(plans, configuration)
        if resolved.get("previous_stage"):
            raise InputError(
                f"plans, configuration '{configuration}': is the second stage of a cascade and needs the first "
                "one's segmentation as input; use a checkpoint of '2d', '3d_lowres' or '3d_fullres'"
            )
        described = resolved.get("architecture") or _from_old_plans(resolved, configuration)
        io = {"input_channels": in_channels, "num_classes": num_classes, "patch_size": resolved["patch_size"]}
        return cls.from_dict({**described, **io})

    @classmethod
    def from_dict(cls, described: Mapping[str, Any]) -> Architecture:
        """``described``: the plans' architecture (``network_class_name``, ``arch_kwargs``) together with
        ``input_channels``, ``num_classes`` and ``patch_size``. Raises InputError as :meth:`from_plans`."""
        name = _get(described, "network_class_name")
        if name not in _NETWORKS:
            raise InputError(
                f"architecture: network '{name}' is not supported; expected PlainConvUNet or ResidualEncoderUNet"
            )
        network, kwargs = _NETWORKS[name], _get(described, "arch_kwargs")
        _refuse_unknown(kwargs, _BLOCKS_KEY[network])
        dim = _CONV[_allowed_name(_get(kwargs, "conv_op"), _CONV, "conv_op")]
        stages = int(_get(kwargs, "n_stages"))
        features = _per_stage(kwargs, "features_per_stage", stages)
        return cls(
            network=network,
            dim=dim,
            in_channels=int(_get(described, "input_channels")),
            num_classes=int(_get(described, "num_classes")),
            features=features,
            kernel_sizes=_per_axis(kwargs, "kernel_sizes", stages, dim),
            strides=_per_axis(kwargs, "strides", stages, dim),
            blocks=_per_stage(kwargs, _BLOCKS_KEY[network], stages),
            decoder_blocks=_per_stage(kwargs, "n_conv_per_stage_decoder", stages - 1),
            conv_bias=bool(kwargs.get("conv_bias", False)),
            norm=_op(kwargs, "norm_op", _NORM),
            dropout=_op(kwargs, "dropout_op", _DROPOUT),
            nonlin=_op(kwargs, "nonlin", _NONLIN),
            stem_channels=int(kwargs.get("stem_channels") or features[0]),
            patch_size=tuple(int(size) for size in _get(described, "patch_size")),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain Python types; :meth:`from_dict` reads it back, and nnU-Net reads its ``arch_kwargs``."""
        kwargs: dict[str, Any] = {
            "n_stages": len(self.features),
            "features_per_stage": list(self.features),
            "conv_op": f"torch.nn.modules.conv.Conv{self.dim}d",
            "kernel_sizes": [list(size) for size in self.kernel_sizes],
            "strides": [list(stride) for stride in self.strides],
            _BLOCKS_KEY[self.network]: list(self.blocks),
            "n_conv_per_stage_decoder": list(self.decoder_blocks),
            "conv_bias": self.conv_bias,
        }
        for key, op in (("norm_op", self.norm), ("dropout_op", self.dropout), ("nonlin", self.nonlin)):
            kwargs[key] = op.name if op else None
            kwargs[f"{key}_kwargs"] = dict(op.kwargs) if op else None
        if self.residual:
            kwargs["stem_channels"] = self.stem_channels
        io = {"input_channels": self.in_channels, "num_classes": self.num_classes, "patch_size": list(self.patch_size)}
        return {"network_class_name": self.network, "arch_kwargs": kwargs, **io}


def planned_architecture(
    network: str,
    dim: int,
    features: Sequence[int],
    kernel_sizes: Sequence[Sequence[int]],
    strides: Sequence[Sequence[int]],
    blocks: Sequence[int],
    decoder_blocks: Sequence[int],
) -> dict[str, Any]:
    """The ``architecture`` section of plans with what nnU-Net's planner always chooses: convolutions with bias,
    instance norm, leaky ReLU, no dropout. Arguments as the attributes of :class:`Architecture`."""
    return {
        "network_class_name": network,
        "arch_kwargs": {
            "n_stages": len(blocks),
            "features_per_stage": features,
            "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
            "kernel_sizes": kernel_sizes,
            "strides": strides,
            _BLOCKS_KEY[network]: blocks,
            "n_conv_per_stage_decoder": decoder_blocks,
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dim}d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }


def _from_old_plans(resolved: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """The ``architecture`` that plans of nnU-Net before 2.3 imply by ``UNet_class_name`` and its companions."""
    name = resolved.get("UNet_class_name")
    if name is None:
        raise InputError(
            f"plans, configuration '{configuration}': neither 'architecture' nor 'UNet_class_name' is there; "
            "expected the plans of nnU-Net v2"
        )
    networks = {"PlainConvUNet": PLAIN, "ResidualEncoderUNet": RESIDUAL}
    if name not in networks:
        raise InputError(f"plans: UNet_class_name '{name}' is not supported; expected {' or '.join(networks)}")
    blocks, base, most = (
        _get(resolved, key) for key in ("n_conv_per_stage_encoder", "UNet_base_num_features", "unet_max_num_features")
    )
    return planned_architecture(
        networks[name],
        len(_get(resolved, "patch_size")),
        features=[min(base * 2**stage, most) for stage in range(len(blocks))],
        kernel_sizes=_get(resolved, "conv_kernel_sizes"),
        strides=_get(resolved, "pool_op_kernel_sizes"),
        blocks=blocks,
        decoder_blocks=_get(resolved, "n_conv_per_stage_decoder"),
    )


def _refuse_unknown(kwargs: Mapping[str, Any], blocks_key: str) -> None:
    known = {
        *("n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", blocks_key),
        *("n_conv_per_stage_decoder", "conv_bias", "norm_op", "norm_op_kwargs", "dropout_op"),
        *("dropout_op_kwargs", "nonlin", "nonlin_kwargs", "stem_channels"),
    }
    for key, value in kwargs.items():
        if key not in known and value not in _NEUTRAL.get(key, ()):
            raise InputError(f"architecture: argument {key}={value!r} is not supported")


def _allowed_name(name: Any, allowed: Collection[str], key: str) -> str:
    match = _TORCH_NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None or match[1] not in allowed:
        raise InputError(f"architecture: {key} '{name}' is not supported; expected torch.nn's {', '.join(allowed)}")
    return match[1]


def _op(kwargs: Mapping[str, Any], key: str, allowed: Collection[str]) -> Op | None:
    name = kwargs.get(key)
    if name is None:
        return None
    options = dict(kwargs.get(f"{key}_kwargs") or {})
    unknown = sorted(set(options) - _ALLOWED_KWARGS[key])
    if unknown:
        raise InputError(f"architecture: {key}_kwargs has arguments that are not supported: {', '.join(unknown)}")
    return Op(name, getattr(nn, _allowed_name(name, allowed, key)), options)


def _repeated(value: Any, count: int) -> tuple[Any, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _per_stage(kwargs: Mapping[str, Any], key: str, stages: int) -> tuple[int, ...]:
    value = _get(kwargs, key)
    values = tuple(map(int, _repeated(value, stages)))
    if len(values) != stages or min(values) < 1:
        raise InputError(f"architecture: {key} {value} must hold {stages} positive numbers")
    return values


def _per_axis(kwargs: Mapping[str, Any], key: str, stages: int, dim: int) -> tuple[tuple[int, ...], ...]:
    value = _get(kwargs, key)
    axes = tuple(tuple(map(int, _repeated(entry, dim))) for entry in _repeated(value, stages))
    if len(axes) != stages or any(len(sizes) != dim or min(sizes) < 1 for sizes in axes):
        raise InputError(f"architecture: {key} {value} must hold {dim} positive numbers for each of {stages} stages")
    return axes
