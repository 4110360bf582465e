"""The encoder of a trained nnU-Net as a feature extractor, rebuilt from the checkpoint's own plans.

    2D: x (B, C_in, H, W)    → stage features (B, C, H/s, W/s)           → pooled (B, C, T, T)
    3D: x (B, C_in, d, h, w) → stage features (B, C, d/s, h/s, w/s)      → pooled (B, P, C, T, T)

T is ``target_spatial`` and P ``planes``, the depth that 3D features are pooled to. One stage is used; by default the
deepest that has at least T x T features in plane at the plan's patch size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from config.errors import InputError
from config.nnunet_plans import required
from models.nnunet.architecture import Architecture
from models.nnunet.checkpoint import NnUNetCheckpoint, load_strictly
from models.nnunet.unet import UNetEncoder


class NnUNetEncoder(nn.Module):
    """nnU-Net's encoder up to one stage, pooled to a fixed grid.

    Attributes:
        architecture: JSON-storable description; :meth:`from_architecture` rebuilds the module from it.
        dim: 2 or 3. in_channels: C_in. out_channels: C of the chosen stage. output_stage: its index.
        total_stride: input voxels per feature, per axis.
        receptive_field_offset: voxels by which the centre of a feature's receptive field lies before the centre of its
            cell, per axis; pooling keeps it. :class:`data.view_selection.ViewSelection` applies it.
    """

    def __init__(
        self, network: Architecture, output_stage: int | None = None, target_spatial: int = 28, planes: int = 4
    ) -> None:
        """Raises InputError if the network has no ``output_stage``."""
        super().__init__()
        stages = len(network.features)
        if output_stage is None:
            output_stage = default_stage(network, target_spatial)
        elif not 0 <= output_stage < stages:
            raise InputError(f"encoder_output_stage is {output_stage}, but the encoder has stages 0 to {stages - 1}")
        self.network = network
        self.dim = network.dim
        self.in_channels = network.in_channels
        self.out_channels = network.features[output_stage]
        self.output_stage = output_stage
        self.total_stride = network.total_stride(output_stage)
        self.receptive_field_offset = network.receptive_field_offset(output_stage)
        self.target_spatial = target_spatial
        self.planes = planes
        self.encoder = UNetEncoder(network)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: NnUNetCheckpoint, output_stage: int | None = None, target_spatial: int = 28, planes: int = 4
    ) -> NnUNetEncoder:
        """The encoder with nnU-Net's weights. Raises InputError if weights and plans do not fit."""
        module = cls(checkpoint.architecture, output_stage, target_spatial, planes)
        load_strictly(module, checkpoint.encoder_state, checkpoint.path)
        return module

    @classmethod
    def from_architecture(cls, architecture: Mapping[str, Any]) -> NnUNetEncoder:
        """An encoder with untrained weights, as the attribute ``architecture`` of another one describes it."""
        keys = ("output_stage", "target_spatial", "planes")
        pooling = {key: required(architecture, key, "stored encoder architecture") for key in keys}
        return cls(Architecture.from_dict(architecture), **pooling)

    @property
    def architecture(self) -> dict[str, Any]:
        pooling = {"output_stage": self.output_stage, "target_spatial": self.target_spatial, "planes": self.planes}
        return {**self.network.to_dict(), **pooling}

    def stage_features(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        """Features of stages 0 … ``last`` (default: all), shallow to deep."""
        if x.ndim != self.dim + 2 or x.shape[1] != self.in_channels:
            space = "H, W" if self.dim == 2 else "d, h, w"
            raise ValueError(f"expected (B, {self.in_channels}, {space}), got {tuple(x.shape)}")
        # A residual stage adds a pooled shortcut (rounds down) to strided convolutions (round up).
        stride = self.network.total_stride(len(self.network.features) - 1 if last is None else last)
        if self.network.residual and any(n % s for n, s in zip(x.shape[2:], stride, strict=True)):
            raise ValueError(f"a residual encoder needs sizes divisible by {stride}, got {tuple(x.shape[2:])}")
        return self.encoder(x, last)

    def forward(self, x: Tensor) -> Tensor:
        """2D: (B, C_in, H, W) → (B, C, T, T). 3D: (B, C_in, d, h, w) → (B, P, C, T, T)."""
        features = self.stage_features(x, self.output_stage)[-1]
        side = self.target_spatial
        if self.dim == 2:
            return F.adaptive_avg_pool2d(features, (side, side))
        return F.adaptive_avg_pool3d(features, (self.planes, side, side)).transpose(1, 2)


def default_stage(network: Architecture, target_spatial: int) -> int:
    """The deepest stage that has at least ``target_spatial`` features along both in-plane axes, or 0."""

    def side(stage: int) -> int:
        strides = network.total_stride(stage)[-2:]
        return min(math.ceil(size / stride) for size, stride in zip(network.patch_size[-2:], strides, strict=True))

    fitting = (stage for stage in range(len(network.features)) if side(stage) >= target_spatial)
    return max(fitting, default=0)
