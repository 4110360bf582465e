"""The building blocks of nnU-Net's U-Nets, in 2D and 3D, with nnU-Net's parameter names.

Shapes: x (B, C, *space), space being (H, W) or (d, h, w). A stage with stride s divides space by s, rounding
up in plain stages (padded convolutions); residual stages need space to be divisible (pooled shortcut).

nnU-Net registers every convolution and norm a second time, as ``all_modules.<i>``; here each parameter has
one name, and ``models/nnunet/checkpoint.py`` and ``models/nnunet/unet.py`` translate.

Source: dynamic-network-architectures 0.4.4, ``building_blocks/``; residual blocks follow ResNet-D
(He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.nnunet.architecture import Architecture, Op

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_AVERAGE_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


class ConvBlock(nn.Module):
    """Convolution with same padding, then dropout, norm and nonlinearity where the architecture has them."""

    def __init__(
        self,
        arch: Architecture,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
        *,
        bias: bool | None = None,
        dropout: Op | None = None,
        nonlin: Op | None = None,
    ) -> None:
        super().__init__()
        padding = tuple((size - 1) // 2 for size in kernel_size)
        bias = arch.conv_bias if bias is None else bias
        self.conv = _CONV[arch.dim](in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.has_dropout = dropout is not None
        self.dropout = dropout() if dropout else nn.Identity()
        self.norm = arch.norm(out_channels) if arch.norm else nn.Identity()
        self.nonlin = nonlin() if nonlin else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin(self.norm(self.dropout(self.conv(x))))


class ConvStack(nn.Module):
    """``count`` convolution blocks; the first one has the stride."""

    def __init__(
        self,
        arch: Architecture,
        count: int,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        unit = (1,) * arch.dim
        self.convs = nn.Sequential(
            *(
                ConvBlock(
                    arch,
                    in_channels if index == 0 else out_channels,
                    out_channels,
                    kernel_size,
                    stride if index == 0 else unit,
                    dropout=arch.dropout,
                    nonlin=arch.nonlin,
                )
                for index in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that is pooled where strided and projected where channels change."""

    def __init__(
        self,
        arch: Architecture,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        unit = (1,) * arch.dim
        self.conv1 = ConvBlock(
            arch, in_channels, out_channels, kernel_size, stride, dropout=arch.dropout, nonlin=arch.nonlin
        )
        self.conv2 = ConvBlock(arch, out_channels, out_channels, kernel_size, unit)
        self.nonlin2 = arch.nonlin() if arch.nonlin else nn.Identity()
        shortcut: list[nn.Module] = []
        if stride != unit:
            shortcut.append(_AVERAGE_POOL[arch.dim](stride, stride))
        if in_channels != out_channels:
            shortcut.append(ConvBlock(arch, in_channels, out_channels, unit, unit, bias=False))
        self.skip = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class ResidualStack(nn.Module):
    """``count`` residual blocks; the first one has the stride."""

    def __init__(
        self,
        arch: Architecture,
        count: int,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        unit = (1,) * arch.dim
        self.blocks = nn.Sequential(
            ResidualBlock(arch, in_channels, out_channels, kernel_size, stride),
            *(ResidualBlock(arch, out_channels, out_channels, kernel_size, unit) for _ in range(count - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class UNetEncoder(nn.Module):
    """The contracting path: (B, C_in, *space) → the features of stages 0 … ``last``, shallow to deep."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.in_channels
        self.stem: ConvStack | None = None
        if arch.residual:
            unit = (1,) * arch.dim
            self.stem = ConvStack(arch, 1, channels, arch.stem_channels, arch.kernel_sizes[0], unit)
            channels = arch.stem_channels
        stages: list[nn.Module] = []
        for count, features, kernel_size, stride in zip(
            arch.blocks, arch.features, arch.kernel_sizes, arch.strides, strict=True
        ):
            if arch.residual:
                stages.append(ResidualStack(arch, count, channels, features, kernel_size, stride))
            else:  # nnU-Net wraps a plain stage, because pooling could stand before it
                stages.append(nn.Sequential(ConvStack(arch, count, channels, features, kernel_size, stride)))
            channels = features
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor, last: int | None = None) -> list[Tensor]:
        if self.stem is not None:
            x = self.stem(x)
        features = []
        for stage in self.stages[: None if last is None else last + 1]:
            x = stage(x)
            features.append(x)
        return features


class UNetDecoder(nn.Module):
    """The expanding path: stage features, shallow to deep → logits (B, num_classes, *space).

    ``seg_layers`` holds the heads of every resolution, as nnU-Net's deep supervision has them; the forward
    pass uses the last one, at full resolution.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        unit = (1,) * arch.dim
        transpconvs, stages, heads = [], [], []
        for depth, count in zip(range(len(arch.features) - 1, 0, -1), arch.decoder_blocks, strict=True):
            below, beside, stride = arch.features[depth], arch.features[depth - 1], arch.strides[depth]
            transpconvs.append(_TRANSPOSED[arch.dim](below, beside, stride, stride, bias=arch.conv_bias))
            stages.append(ConvStack(arch, count, 2 * beside, beside, arch.kernel_sizes[depth - 1], unit))
            heads.append(_CONV[arch.dim](beside, arch.num_classes, 1))
        self.stages = nn.ModuleList(stages)
        self.transpconvs = nn.ModuleList(transpconvs)
        self.seg_layers = nn.ModuleList(heads)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for transpconv, stage, beside in zip(self.transpconvs, self.stages, reversed(features[:-1]), strict=True):
            x = stage(torch.cat((transpconv(x), beside), dim=1))
        return self.seg_layers[-1](x)
