"""Vision-Mamba bridge: encoder features to visual tokens of the language model's width.

features       [B, K, C, H, W]          K slices (or depth planes) of encoder features
  project      [B, K, H·W, W_b]         W_b = bridge width; plus 2-D position, plus slice position
  + lesions    [B, K, H·W + r², W_b]    r × r more tokens per slice, around its lesion (roi_policy lesion)
  VimBlock × n [B, K·(H·W + r²), W_b]   bidirectional scan over the tokens of all slices
  pool         [B, K·s·s, W_b]          s: side of the largest square grid per slice within the token budget
  project      [B, L, D]                L = K·(s² + r²): the grids, then the lesions; D: the language model's width
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import InputError
from models.position_embedding import LesionPosition, SlicePosition, sincos_2d
from models.roi_crop import sample_roi
from models.vim_mixer import VimBlock


@dataclass(frozen=True)
class BridgeSpec:
    """What a bridge is built from.

    Attributes:
        in_channels: C of the encoder features.
        out_width: D, the language model's width.
        output_std: standard deviation of a token at initialisation. A frozen language model expects that of its own
            embeddings.
        width, depth: inner width W_b and number of blocks.
        grid: side of the full feature grid; a RoI crop keeps the positions that it is cut from.
        max_visual_tokens: the token budget.
        lesion_side: r, side of the grid of tokens around each slice's lesion; 0: none.
    """

    in_channels: int
    out_width: int
    output_std: float = 0.1
    width: int = 512
    depth: int = 2
    grid: int = 28
    max_visual_tokens: int = 64
    lesion_side: int = 0


class Bridge(nn.Module):
    """From encoder features to visual tokens: what the rest of the system knows of a bridge.

    A subclass is built from a :class:`BridgeSpec` and implements :meth:`forward`; ``MedicalVLM`` and the checkpoints
    use nothing else of it.
    """

    def __init__(self, spec: BridgeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self, features: Tensor, slice_position: Tensor, corner: tuple[int, int] = (0, 0), roi: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            features: (B, K, C, H, W).
            slice_position: (B, K), 0 lowest to 1 highest.
            corner: row and column of the full grid where a RoI crop begins.
            roi: (B, K, 4) lesions, as :func:`models.roi_crop.sample_roi` takes them; needed with ``lesion_side``.

        Returns:
            (B, L, D) with L at most ``max_visual_tokens``.
        """
        raise NotImplementedError


class VimBridge(Bridge):
    """Positions, bidirectional Mamba blocks (Zhu et al. 2024, Vim), pooling to the token budget."""

    def __init__(self, spec: BridgeSpec) -> None:
        super().__init__(spec)
        width = spec.width
        self.in_norm = nn.LayerNorm(spec.in_channels)
        self.in_proj = nn.Linear(spec.in_channels, width)
        self.position = nn.Parameter(sincos_2d(spec.grid, width))
        self.slice_position = SlicePosition(width)
        self.blocks = nn.ModuleList(VimBlock(width) for _ in range(spec.depth))
        self.out_norm = nn.RMSNorm(width, eps=1e-5)
        self.out_proj = nn.Linear(width, spec.out_width)
        nn.init.normal_(self.out_proj.weight, std=spec.output_std / math.sqrt(width))
        nn.init.zeros_(self.out_proj.bias)
        self.position._no_weight_decay = True
        if spec.lesion_side:
            self.local = LesionPosition(width)
            # Each cell around a lesion has an embedding of its own: one can learn the finding, another the size.
            self.local_cell = nn.Parameter(0.5 * torch.randn(spec.lesion_side**2, width))
            self.local_cell._no_weight_decay = True

    def forward(
        self, features: Tensor, slice_position: Tensor, corner: tuple[int, int] = (0, 0), roi: Tensor | None = None
    ) -> Tensor:
        """See :meth:`Bridge.forward`; L = K·(s² + r²), s from :func:`grid_side`."""
        _, K, _, H, W = features.shape
        row, column = corner
        lesion_tokens = self.spec.lesion_side**2
        side = grid_side(self.spec.max_visual_tokens, K, min(H, W), lesion_tokens)

        normed = self.in_norm(features.permute(0, 1, 3, 4, 2))  # (B, K, H, W, C)
        places = self.position[:, :, row : row + H, column : column + W]  # (1, W_b, H, W)
        grid = self.in_proj(normed) + places.permute(0, 2, 3, 1)[:, None]  # (B, K, H, W, W_b)
        level = self.slice_position(slice_position)[:, :, None]  # (B, K, 1, W_b)
        hidden = grid.flatten(2, 3) + level  # (B, K, H·W, W_b)
        if lesion_tokens:
            if roi is None:
                raise ValueError("a bridge with lesion_side needs roi (B, K, 4)")
            hidden = torch.cat([hidden, self._lesion_tokens(normed, places, roi) + level], dim=2)

        hidden, residual = hidden.flatten(1, 2), None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        hidden = self.out_norm(hidden + residual)

        overview, lesions = hidden.unflatten(1, (K, -1)).split([H * W, lesion_tokens], dim=2)
        overview = pool_grid(overview.unflatten(2, (H, W)), side)
        return self.out_proj(torch.cat([overview.flatten(1, 3), lesions.flatten(1, 2)], dim=1))

    def _lesion_tokens(self, normed: Tensor, places: Tensor, roi: Tensor) -> Tensor:
        """Tokens (B, K, r², W_b) around the lesions ``roi`` (B, K, 4), sampled from ``normed`` features
        (B, K, H, W, C) and their positions ``places`` (1, W_b, H, W)."""
        side, boxes = self.spec.lesion_side, roi.flatten(0, 1)
        cells = sample_roi(normed.flatten(0, 1).permute(0, 3, 1, 2), boxes, side).flatten(2)
        positions = sample_roi(places, boxes, side).flatten(2)
        tokens = self.in_proj(cells.transpose(1, 2)) + positions.transpose(1, 2)  # (B·K, r², W_b)
        return tokens.unflatten(0, normed.shape[:2]) + self.local(roi)[:, :, None] + self.local_cell


def grid_side(max_tokens: int, planes: int, available: int, lesion_tokens: int = 0) -> int:
    """Side of the largest square grid per plane within the budget: 64 → 8, 96 → 9, 32 → 5.

    ``lesion_tokens``: tokens around each plane's lesion, which the budget includes.

    Raises InputError: the budget gives a plane less than one token besides those of its lesion.
    """
    least = planes * (1 + lesion_tokens)
    if max_tokens < least:
        around = f" and {lesion_tokens} around its lesion (roi_side²)" if lesion_tokens else ""
        raise InputError(
            f"max_visual_tokens {max_tokens} is less than slices {planes} need: each slice has at least one token"
            f"{around}; raise it to {least} or more"
        )
    return min(math.isqrt(max_tokens // planes - lesion_tokens), available)


def pool_grid(grid: Tensor, side: int) -> Tensor:
    """Average (B, K, H, W, C) to (B, K, ``side``, ``side``, C)."""
    channels_first = grid.flatten(0, 1).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(channels_first, side).permute(0, 2, 3, 1).unflatten(0, grid.shape[:2])
