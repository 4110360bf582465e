"""Vision-Mamba bridge: encoder features to visual tokens of the language model's width.

features        [B, K, C, H, W]          K slices (or depth planes) of encoder features
  project       [B, K, H·W, W_b]         W_b = bridge width; plus 2-D position, plus slice position
  + lesion      [B, K, H·W + q, W_b]     q = n·r² more for each slice, around its lesion: r x r features, then r x r
                                         cells three times as wide, …                            (roi_policy lesion)
  VimBlock × n  [B, K·(H·W + q), W_b]    bidirectional scan over all slices' tokens, a slice's lesion after its grid
  pool          [B, K·s·s, W_b]          the grids; s = side of the largest square grid that fits the token budget;
                                         bridge_pool before: ahead of the blocks, which then scan fewer tokens
  project       [B, L, D]                grids, then squares; D = the LLM's width, scaled like the LLM's own embeddings
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.errors import InputError
from config.schema import BridgeMixer
from models.roi_crop import sample_square
from models.vim_mixer import VimBlock


def grid_side(max_tokens: int, planes: int, available: int, local: int = 0) -> int:
    """Side of the largest square grid per plane that fits the budget: 64 → 8, 96 → 9, 32 → 5.

    ``local``: tokens that each plane has around its lesion, which the budget holds too.

    Raises:
        InputError: fewer tokens than every plane needs.
    """
    least = planes * (1 + local)
    if max_tokens < least:
        around = f" and {local} around its lesion (roi_scales x roi_side²)" if local else ""
        raise InputError(
            f"max_visual_tokens {max_tokens} is less than slices {planes} need: each slice has at least one token"
            f"{around}; raise it to {least} or more"
        )
    return min(math.isqrt(max_tokens // planes - local), available)


def pooled(grid: Tensor, side: int) -> Tensor:
    """Average (B, K, H, W, C) to (B, K, ``side``, ``side``, C)."""
    channels_first = grid.flatten(0, 1).permute(0, 3, 1, 2)
    return F.adaptive_avg_pool2d(channels_first, side).permute(0, 2, 3, 1).unflatten(0, grid.shape[:2])


def sincos_2d(side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions (1, width, side, side); He et al. 2022 (MAE), appendix A.

    A quarter of the width each for sin(row), cos(row), sin(column), cos(column); a width that four
    does not divide leaves the last channels at zero.
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float32) / max(quarter, 1))
    angle = torch.arange(side, dtype=torch.float32)[:, None] * frequency[None]  # (side, quarter)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1).T  # (2·quarter, side)
    rows = wave[:, :, None].expand(-1, side, side)
    columns = wave[:, None, :].expand(-1, side, side)
    table = torch.zeros(1, width, side, side)
    table[0, : 4 * quarter] = torch.cat([rows, columns])
    return table


FREQUENCIES = 16


def harmonics(share: Tensor) -> Tensor:
    """Shares in 0…1, (…), as sines and cosines of rising frequency, (…, 2 · FREQUENCIES): a linear map can then read
    them finely; of the plain number it would see a small difference only."""
    harmonic = torch.arange(1, FREQUENCIES + 1, device=share.device, dtype=torch.float32)
    angle = share.float()[..., None] * harmonic * (math.pi / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class SlicePosition(nn.Module):
    """Where a slice lies in its scan, 0 (lowest) to 1 (highest), as an embedding (B, K) → (B, K, W_b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * FREQUENCIES, width)

    def forward(self, position: Tensor) -> Tensor:
        return self.project(harmonics(position))


class SquarePosition(nn.Module):
    """Where a lesion lies and how large it is, as an embedding (B, K, 4) → (B, K, W_b).

    Row and column of its core, its size, and 1; of a row of zeros (no lesion) nothing but the bias is left.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(3 * 2 * FREQUENCIES, width)

    def forward(self, roi: Tensor) -> Tensor:
        return self.project(harmonics(roi[..., :3]).flatten(-2) * roi[..., 3:])


class VimBridge(nn.Module):
    """Positions, bidirectional Mamba blocks (Zhu et al. 2024, Vim), pooling to the token budget."""

    def __init__(
        self,
        in_channels: int,
        out_width: int,
        *,
        width: int = 512,
        depth: int = 2,
        grid: int = 28,
        max_visual_tokens: int = 64,
        output_std: float = 0.1,
        local_side: int = 0,
        local_scales: int = 1,
        mixer: BridgeMixer = "vim",
        pool_first: bool = False,
    ) -> None:
        """
        Args:
            in_channels: C of the encoder features.
            out_width: D, the language model's width.
            grid: side of the full token grid; a RoI crop keeps the positions it was cut from.
            output_std: standard deviation of a token at initialisation; the LLM's embeddings have one
                too, and tokens far from it would be strangers to the frozen model.
            local_side: r, side of each grid of tokens around a slice's lesion; 0: none.
            local_scales: n, how many such grids: of the features themselves, of three, of nine in one, …
            mixer: ``vim`` reads the tokens from both ends, ``one_way`` from the first to the last, ``linear`` has no
                blocks: each token stays alone.
            pool_first: pool to the budget before the blocks, which then scan s·s tokens a slice and not H·W; squares
                are still sampled from all features.
        """
        super().__init__()
        self.max_visual_tokens = max_visual_tokens
        self.local_side = local_side
        self.local_scales = local_scales
        self.local_tokens = local_scales * local_side**2
        self.pool_first = pool_first
        self.output_std = output_std
        self.in_norm = nn.LayerNorm(in_channels)
        self.in_proj = nn.Linear(in_channels, width)
        self.position = nn.Parameter(sincos_2d(grid, width))
        self.slice_position = SlicePosition(width)
        blocks = 0 if mixer == "linear" else depth
        self.blocks = nn.ModuleList(VimBlock(width, one_way=mixer == "one_way") for _ in range(blocks))
        self.out_norm = nn.RMSNorm(width, eps=1e-5)
        self.out_proj = nn.Linear(width, out_width)
        nn.init.normal_(self.out_proj.weight, std=output_std / math.sqrt(width))
        nn.init.zeros_(self.out_proj.bias)
        self.position._no_weight_decay = True
        if local_side:
            self.local = SquarePosition(width)
            # Each place around a lesion is a token of its own kind, so that one can come to stand for what the
            # lesion is, another for where it is or how large.
            self.local_cell = nn.Parameter(0.5 * torch.randn(self.local_tokens, width))
            self.local_cell._no_weight_decay = True

    def forward(
        self, features: Tensor, slice_position: Tensor, corner: tuple[int, int] = (0, 0), roi: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            features: (B, K, C, H, W).
            slice_position: (B, K), 0 lowest to 1 highest.
            corner: row and column of the full grid where a RoI crop begins.
            roi: (B, K, 4) squares around the lesions, as :func:`models.roi_crop.sample_square` takes them; needed
                with ``local_side``.

        Returns:
            (B, L, D) with L = K·(s² + n·r²), s from :func:`grid_side`: the overview of all slices, then the lesions.
        """
        _, K, _, H, W = features.shape
        row, column = corner
        side = grid_side(self.max_visual_tokens, K, min(H, W), self.local_tokens)
        normed = self.in_norm(features.permute(0, 1, 3, 4, 2))  # (B, K, H, W, C)
        places = self.position[:, :, row : row + H, column : column + W]
        where = places.permute(0, 2, 3, 1)[:, None]  # (1, 1, H, W, W_b)
        if self.pool_first:  # projecting is linear, and costs less of a mean than of all it is the mean of
            scanned = self.in_proj(pooled(normed, side)) + pooled(where, side)
        else:
            scanned = self.in_proj(normed) + where  # (B, K, H, W, W_b)
        height = self.slice_position(slice_position)[:, :, None]  # (B, K, 1, W_b)
        hidden = scanned.flatten(2, 3) + height  # (B, K, H·W, W_b)
        if self.local_side:
            if roi is None:
                raise ValueError("this bridge looks around lesions: roi (B, K, 4) is needed")
            hidden = torch.cat([hidden, self._around_lesions(normed, places, roi) + height], dim=2)
        hidden = hidden.flatten(1, 2)
        residual = None
        for block in self.blocks:
            hidden, residual = block(hidden, residual)
        hidden = self.out_norm(hidden if residual is None else hidden + residual)

        cells = scanned.shape[2] * scanned.shape[3]
        overview, local = hidden.unflatten(1, (K, -1)).split([cells, self.local_tokens], dim=2)
        overview = pooled(overview.unflatten(2, scanned.shape[2:4]), side)
        return self.out_proj(torch.cat([overview.flatten(1, 3), local.flatten(1, 2)], dim=1))

    def _around_lesions(self, normed: Tensor, places: Tensor, roi: Tensor) -> Tensor:
        """Tokens (B, K, n·r², W_b) around the squares ``roi`` (B, K, 4) in ``normed`` features (B, K, H, W, C), whose
        positions are ``places`` (1, W_b, H, W)."""
        channels_first, squares = normed.flatten(0, 1).permute(0, 3, 1, 2), roi.flatten(0, 1)
        scales = [(self.local_side, 3**level) for level in range(self.local_scales)]
        seen = torch.cat([sample_square(channels_first, squares, *scale).flatten(2) for scale in scales], dim=2)
        there = torch.cat([sample_square(places, squares, *scale).flatten(2) for scale in scales], dim=2)
        tokens = self.in_proj(seen.transpose(1, 2)) + there.transpose(1, 2)  # (B·K, n·r², W_b)
        return tokens.unflatten(0, normed.shape[:2]) + self.local(roi)[:, :, None] + self.local_cell
