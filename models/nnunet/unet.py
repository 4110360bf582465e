"""nnU-Net's segmentation U-Net: encoder, decoder and heads, interchangeable with nnU-Net's own weights.

    x (B, C_in, H, W) or (B, C_in, d, h, w) → logits (B, num_classes, same space)

Space must be divisible by the architecture's total stride.

Source: dynamic-network-architectures 0.4.4, ``architectures/unet.py``.
"""

from __future__ import annotations

from torch import Tensor, nn

from models.nnunet.architecture import Architecture
from models.nnunet.blocks import ConvBlock, ResidualBlock, UNetDecoder, UNetEncoder
from models.nnunet.checkpoint import NnUNetCheckpoint, load_strictly


class SegmentationUNet(nn.Module):
    """PlainConvUNet or ResidualEncoderUNet, as ``architecture`` says, initialised as nnU-Net initialises it."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder = UNetEncoder(architecture)
        self.decoder = UNetDecoder(architecture)
        self.apply(_initialise)
        if architecture.residual:
            self.apply(_silence_residual)

    @classmethod
    def from_checkpoint(cls, checkpoint: NnUNetCheckpoint) -> SegmentationUNet:
        """The user's trained network. Raises InputError if weights and plans do not fit."""
        network = cls(checkpoint.architecture)
        load_strictly(network, checkpoint.network_state, checkpoint.path)
        return network

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))

    def state_dict_nnunet(self) -> dict[str, Tensor]:
        """The state dict as nnU-Net stores it: every block's layers also as ``all_modules``, and the encoder
        also as a part of the decoder. Aliases share memory."""
        alias = {}
        for name, module in self.named_modules():
            if isinstance(module, ConvBlock):
                alias[f"{name}.conv"] = f"{name}.all_modules.0"
                # A layer's number is its place among those that are there.
                alias[f"{name}.norm"] = f"{name}.all_modules.{1 + module.has_dropout}"
        aliased: dict[str, Tensor] = {}
        for name, tensor in self.state_dict().items():
            aliased[name] = tensor
            layer, _, parameter = name.rpartition(".")
            if layer in alias:
                aliased[f"{alias[layer]}.{parameter}"] = tensor
        nested = {f"decoder.{name}": tensor for name, tensor in aliased.items() if name.startswith("encoder.")}
        return {**aliased, **nested}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        nn.init.kaiming_normal_(module.weight, a=1e-2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _silence_residual(module: nn.Module) -> None:
    """Residual blocks start as their shortcut."""
    if isinstance(module, ResidualBlock) and isinstance(module.conv2.norm.weight, Tensor):
        nn.init.zeros_(module.conv2.norm.weight)
        nn.init.zeros_(module.conv2.norm.bias)
