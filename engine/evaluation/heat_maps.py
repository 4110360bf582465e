"""Maps of the encoder's feature grid on the grid of the scan and of its file.

    map [K, T, T] → view selection (slices, padding, patch) → preprocessing (crop, resampling) → scan [z, y, x] → file

The steps are separable: along each axis a voxel has a weight for each cell. A map has the resolution of the feature
grid; between the centres of its cells it is interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.cache import CachedVolume
from data.imaging.volume import LUNG_WINDOW_HU, Volume, turned
from data.nnunet_preprocess import VoxelMap
from data.view_selection import ViewSelection


@dataclass(frozen=True)
class ViewGrid:
    """Where the cells of a feature map lie in the scan.

    Attributes:
        weights: per axis of the preprocessed volume (voxels of the scan, cells): the weight of each cell in a voxel;
            rows of zeros are voxels outside of the model's input.
        axes: of the scan, in the order of the preprocessed volume.
        orientation: that the preprocessing reads scans in. The methods take and return (z, y, x) in LPS.
    """

    weights: Sequence[np.ndarray]
    axes: tuple[int, int, int]
    orientation: str

    @classmethod
    def of(cls, selection: ViewSelection, cached: CachedVolume, grid: tuple[int, int, int]) -> ViewGrid:
        """The grid (K, T, T) of the views that ``selection`` takes of a preprocessed case."""
        voxel_map = cached.voxel_map
        starts, sizes = selection.box(cached)
        offsets = selection.offset_fractions(sizes)
        weights = [_axis(voxel_map, axis, starts[axis], sizes[axis], grid[axis], offsets[axis]) for axis in range(3)]
        if len(selection.patch_size) == 2:
            weights[0] = _chosen_slices(voxel_map, selection.chosen_slices(cached))
        return cls(weights, tuple(voxel_map.transpose_forward), cached.axcodes)

    @property
    def cells(self) -> list[np.ndarray]:
        """Per axis, the cell of each voxel: the one whose centre is nearest; -1 outside of the model's input."""
        nearest = (weight.shape[1] - 1 - weight[:, ::-1].argmax(1) for weight in self.weights)
        return [np.where(weight.any(1), cell, -1) for weight, cell in zip(self.weights, nearest, strict=True)]

    def lay_over(self, heat: np.ndarray) -> np.ndarray:
        """A map (K, T, T) as float32 (z, y, x) on the scan's grid; 0 outside of the model's input."""
        volume = heat.astype(np.float32)
        for axis, weight in enumerate(self.weights):
            volume = np.moveaxis(np.tensordot(weight.astype(np.float32), volume, (1, axis)), 0, axis)
        return np.ascontiguousarray(turned(volume.transpose(np.argsort(self.axes)), self.orientation, "LPS"))

    def cells_of(self, solid: np.ndarray) -> np.ndarray:
        """Which cells (K, T, T) hold a voxel of a boolean (z, y, x) on the scan's grid: those whose receptive field is
        centred nearest to a voxel."""
        return self.count(solid) > 0

    def count(self, solid: np.ndarray) -> np.ndarray:
        """Voxels of a boolean (z, y, x) on the scan's grid that each cell (K, T, T) holds."""
        solid = turned(solid, "LPS", self.orientation)
        found = np.zeros([weight.shape[1] for weight in self.weights], np.int64)
        voxels = np.nonzero(solid.transpose(self.axes))
        points = np.stack([cell[voxel] for cell, voxel in zip(self.cells, voxels, strict=True)])
        np.add.at(found, tuple(points[:, (points >= 0).all(0)]), 1)
        # Copies of one slice hold the same voxels.
        alike = (self.weights[0][:, :, None] == self.weights[0][:, None]).all(axis=0)  # (K, K)
        return np.einsum("kj,jyx->kyx", alike, found)


def draw_heat(
    path: Path, volume: Volume, heats: Sequence[np.ndarray], titles: Sequence[str], lesion: np.ndarray | None
) -> None:
    """Write a figure: for each map the slice of its peak, in lung window, patient's right on the left.

    Args:
        heats: at least one, each (z, y, x) on the canonical grid, with a title.
        lesion: labels (z, y, x), outlined.
    """
    from matplotlib.figure import Figure

    from engine.figures import cjk_font

    figure = Figure(figsize=(3.1 * (len(heats) + 1), 3.4), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(heats) + 1, squeeze=False)[0]
    font, aspect = cjk_font(), volume.spacing[1] / volume.spacing[2]
    slices = [int(np.abs(heat).max((1, 2)).argmax()) for heat in heats]
    panels = [(slices[0], None, ""), *zip(slices, heats, titles, strict=True)]
    for axis, (index, heat, title) in zip(axes, panels, strict=True):
        axis.imshow(volume.array[index], cmap="gray", vmin=LUNG_WINDOW_HU[0], vmax=LUNG_WINDOW_HU[1], aspect=aspect)
        if heat is not None:
            strength = np.clip(heat[index], 0, None) / (heat.max() if heat.max() > 0 else 1)
            axis.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * strength, aspect=aspect)
        if lesion is not None and lesion[index].any():
            axis.contour(lesion[index] > 0, [0.5], colors="cyan", linewidths=0.8)
        readable = "\n".join(line for line in title.split("\n") if font or line.isascii())
        axis.set_title(f"slice {index + 1}/{len(volume.array)}\n{readable}", fontsize=7, family=font)
        for place, mark, align in ((0.02, "R", "left"), (0.98, "L", "right")):
            axis.text(place, 0.5, mark, color="yellow", fontsize=8, ha=align, va="center", transform=axis.transAxes)
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _axis(voxel_map: VoxelMap, axis: int, start: int, size: int, cells: int, offset: float) -> np.ndarray:
    """Weights (voxels of the scan, cells) along one axis of the preprocessed volume.
    ``offset``: receptive-field offset of the features, as a fraction of the input."""
    inner, seen = _preprocessed(voxel_map, axis)
    at = (inner - start + 0.5) / size * cells  # k to k + 1 is cell k
    seen = seen & (at >= 0) & (at < cells)
    centre = np.clip(at + offset * cells - 0.5, 0, cells - 1)
    return np.clip(1 - np.abs(centre[:, None] - np.arange(cells)), 0, None) * seen[:, None]


def _chosen_slices(voxel_map: VoxelMap, chosen: Sequence[int]) -> np.ndarray:
    """Along z of 2-D views: the chosen slices and no others; copies of one slice share its weight."""
    inner, seen = _preprocessed(voxel_map, 0)
    nearest = np.clip(np.floor(inner + 0.5).astype(int), 0, voxel_map.shape[0] - 1)
    shown = (nearest[:, None] == np.array(chosen)) & seen[:, None]
    return shown / np.maximum(shown.sum(1, keepdims=True), 1)


def _preprocessed(voxel_map: VoxelMap, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of the scan's voxels along a preprocessed axis, and which lie inside its crop."""
    first, last = voxel_map.bbox[axis]
    index = np.arange(voxel_map.shape_before_crop[axis])
    scale = voxel_map.shape[axis] / (last - first)
    return (index - first + 0.5) * scale - 0.5, (index >= first) & (index < last)
