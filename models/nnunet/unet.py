"""nnU-Net's segmentation U-Net in 2D and 3D, interchangeable with nnU-Net's own weights.

    x (B, C_in, *space) → encoder → stage features, shallow to deep → decoder → logits (B, num_classes, *space)

``space`` is (H, W) or (d, h, w). A stage with stride s divides it by s, rounding up in plain stages (padded
convolutions); residual stages need it to be divisible (pooled shortcut), and the decoder needs the total stride to
divide it.

nnU-Net registers every convolution and norm a second time, as ``all_modules.<i>``; here each parameter has one name,
and :meth:`SegmentationUNet.state_dict_nnunet` and ``models/nnunet/checkpoint.py`` translate.

Source: dynamic-network-architectures 0.4.4, ``architectures/unet.py`` and ``building_blocks/``; residual blocks follow
ResNet-D (He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019).
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from models.nnunet.architecture import Architecture, Op
from models.nnunet.checkpoint import NnUNetCheckpoint, load_strictly

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_AVERAGE_POOL = {2: nn.AvgPool2d, 3: nn.AvgPool3d}

Size = tuple[int, ...]  # one number per axis


class ConvBlock(nn.Module):
    """Convolution with same padding, then dropout, norm and nonlinearity where the architecture has them.

    ``bare``: without dropout and nonlinearity, as before the sum of a residual block. ``bias``: default, the
    architecture's.
    """

    def __init__(
        self,
        arch: Architecture,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size,
        bias: bool | None = None,
        bare: bool = False,
    ) -> None:
        super().__init__()
        padding = tuple((size - 1) // 2 for size in kernel_size)
        bias = arch.conv_bias if bias is None else bias
        self.conv = _CONV[arch.dim](in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.dropout = _layer(None if bare else arch.dropout)
        self.norm = _layer(arch.norm, out_channels)
        self.nonlin = _layer(None if bare else arch.nonlin)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin(self.norm(self.dropout(self.conv(x))))


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut that is pooled where strided and projected where channels change."""

    def __init__(
        self, arch: Architecture, in_channels: int, out_channels: int, kernel_size: Size, stride: Size
    ) -> None:
        super().__init__()
        unit = (1,) * arch.dim
        self.conv1 = ConvBlock(arch, in_channels, out_channels, kernel_size, stride)
        self.conv2 = ConvBlock(arch, out_channels, out_channels, kernel_size, unit, bare=True)
        self.nonlin2 = _layer(arch.nonlin)
        self.skip = nn.Sequential()
        if stride != unit:
            self.skip.append(_AVERAGE_POOL[arch.dim](stride, stride))
        if in_channels != out_channels:
            self.skip.append(ConvBlock(arch, in_channels, out_channels, unit, unit, bias=False, bare=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlin2(self.conv2(self.conv1(x)) + self.skip(x))


class UNetEncoder(nn.Module):
    """The contracting path: (B, C_in, *space) → the features of stages 0 … ``last``, shallow to deep."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        channels = arch.in_channels
        self.stem: nn.Module | None = None
        if arch.residual:
            unit = (1,) * arch.dim
            self.stem = _stack(ConvBlock, arch, 1, channels, arch.stem_channels, arch.kernel_sizes[0], unit)
            channels = arch.stem_channels
        self.stages = nn.Sequential()
        for count, features, kernel_size, stride in zip(
            arch.blocks, arch.features, arch.kernel_sizes, arch.strides, strict=True
        ):
            if arch.residual:
                stage = _stack(ResidualBlock, arch, count, channels, features, kernel_size, stride)
            else:  # nnU-Net wraps a plain stage, because pooling could stand before it
                stage = nn.Sequential(_stack(ConvBlock, arch, count, channels, features, kernel_size, stride))
            self.stages.append(stage)
            channels = features

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

    ``seg_layers`` holds the heads of every resolution, as nnU-Net's deep supervision has them; the forward pass uses
    the last one, at full resolution.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        unit = (1,) * arch.dim
        self.stages, self.transpconvs, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for depth, count in zip(range(len(arch.features) - 1, 0, -1), arch.decoder_blocks, strict=True):
            below, beside, stride = arch.features[depth], arch.features[depth - 1], arch.strides[depth]
            self.transpconvs.append(_TRANSPOSED[arch.dim](below, beside, stride, stride, bias=arch.conv_bias))
            self.stages.append(_stack(ConvBlock, arch, count, 2 * beside, beside, arch.kernel_sizes[depth - 1], unit))
            self.seg_layers.append(_CONV[arch.dim](beside, arch.num_classes, 1))

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for transpconv, stage, beside in zip(self.transpconvs, self.stages, reversed(features[:-1]), strict=True):
            x = stage(torch.cat((transpconv(x), beside), dim=1))
        return self.seg_layers[-1](x)


class SegmentationUNet(nn.Module):
    """PlainConvUNet or ResidualEncoderUNet, as ``architecture`` says, initialised as nnU-Net initialises it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = UNetEncoder(architecture)
        self.decoder = UNetDecoder(architecture)
        self.apply(_initialise)

    @classmethod
    def from_checkpoint(cls, checkpoint: NnUNetCheckpoint) -> SegmentationUNet:
        """The user's trained network. Raises InputError if weights and plans do not fit."""
        # Scans are segmented once, so a run must not depend on whether these values, soon replaced, were drawn.
        with torch.random.fork_rng(devices=[]):
            network = cls(checkpoint.architecture)
        load_strictly(network, checkpoint.network_state, checkpoint.path)
        return network

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def state_dict_nnunet(self) -> dict[str, Tensor]:
        """The state dict as nnU-Net stores it: a block's layers also as ``all_modules``, the encoder also as a part of
        the decoder. Aliases share memory."""
        alias = {}
        for name, module in self.named_modules():
            if isinstance(module, ConvBlock):
                alias[f"{name}.conv"] = f"{name}.all_modules.0"
                # A layer's number is its place among those that are there.
                has_dropout = not isinstance(module.dropout, nn.Identity)
                alias[f"{name}.norm"] = f"{name}.all_modules.{1 + has_dropout}"
        aliased: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            aliased[name] = tensor
            layer, _, parameter = name.rpartition(".")
            if layer in alias:
                aliased[f"{alias[layer]}.{parameter}"] = tensor
        nested = {f"decoder.{name}": tensor for name, tensor in aliased.items() if name.startswith("encoder.")}
        return {**aliased, **nested}


def _layer(op: Op | None, *args: int) -> nn.Module:
    return op(*args) if op else nn.Identity()


def _stack(
    block: type[ConvBlock | ResidualBlock],
    arch: Architecture,
    count: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Size,
    stride: Size,
) -> nn.Sequential:
    """``count`` blocks, the first with the stride, under nnU-Net's name for them."""
    unit, name = (1,) * arch.dim, "convs" if block is ConvBlock else "blocks"
    rest = (block(arch, out_channels, out_channels, kernel_size, unit) for _ in range(count - 1))
    blocks = nn.Sequential(block(arch, in_channels, out_channels, kernel_size, stride), *rest)
    return nn.Sequential(OrderedDict({name: blocks}))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ResidualBlock) and isinstance(getattr(module.conv2.norm, "weight", None), Tensor):
        nn.init.zeros_(module.conv2.norm.weight)  # a residual block starts as its shortcut
        nn.init.zeros_(module.conv2.norm.bias)
