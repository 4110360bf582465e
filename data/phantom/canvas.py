"""A voxel grid in millimetres and the brushes that paint soft-edged solids on it.

Arrays are float32 with axes [Z, Y, X]; +x is the patient's left, +y posterior, +z superior (LPS). Solids are implicit
functions, roughly signed distances in mm (positive inside), drawn with an edge one pixel soft, like partial volume. A
solid is a pair (box, distance); it does not extend beyond the box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Box = tuple[slice, slice, slice]
Solid = tuple[Box, np.ndarray]
Profile = float | np.ndarray  # a number, or one number per slice as [Z, 1, 1]


@dataclass(frozen=True)
class Grid:
    """Voxel grid: ``shape`` (Z, Y, X), ``spacing`` (z, y, x) in mm."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]

    @property
    def pixel(self) -> float:
        """Pixel edge in the axial plane, mm."""
        return float(np.sqrt(self.spacing[1] * self.spacing[2]))


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """Coverage 0..1 of voxels ``distance`` mm inside an edge that is ``width`` mm soft."""
    cover = distance * np.float32(1.0 / width)
    cover += np.float32(0.5)
    return np.clip(cover, 0.0, 1.0, out=cover)


def blend(hu: np.ndarray, cover: np.ndarray, value: float | np.ndarray) -> None:
    """Move ``hu`` towards ``value`` by ``cover``, in place."""
    step = np.asarray(value, np.float32) - hu
    step *= cover
    hu += step


class Canvas:
    """Coordinates of one patient on one grid.

    x and y are mm from the body's midpoint, ``u`` is 0 at the apex of the lungs and 1 at their bottom.
    """

    def __init__(self, grid: Grid, apex_z: float, lung_height: float, shift: tuple[float, float]) -> None:
        """``apex_z``: mm above the lowest slice; ``shift``: the body's (x, y) off the grid's centre."""
        self.grid, self.height, self.apex_z, self.px = grid, lung_height, apex_z, grid.pixel
        z, y, x = (np.arange(n, dtype=np.float32) * s for n, s in zip(grid.shape, grid.spacing, strict=True))
        self.z = z[:, None, None]
        self.y = (y - y[-1] / 2 - shift[1]).astype(np.float32)[None, :, None]
        self.x = (x - x[-1] / 2 - shift[0]).astype(np.float32)[None, None, :]
        self.u = ((apex_z - self.z) / lung_height).astype(np.float32)
        self.origin = np.asarray([0.0, self.y.flat[0], self.x.flat[0]])

    def box(self, low: Sequence[float], high: Sequence[float]) -> Box:
        """The voxels between two corners given as (z, y, x) in mm."""
        spacing = np.asarray(self.grid.spacing)
        first = np.clip(np.floor((np.asarray(low) - self.origin) / spacing), 0, self.grid.shape).astype(int)
        last = np.clip(np.ceil((np.asarray(high) - self.origin) / spacing) + 1, 0, self.grid.shape).astype(int)
        return tuple(slice(int(a), int(max(a, b))) for a, b in zip(first, last, strict=True))

    def coordinates(self, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """z, y, x of a box in mm, shaped to broadcast."""
        return self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]]

    def height_of(self, u: float) -> float:
        """z in mm of a fraction of the lung's height."""
        return self.apex_z - u * self.height

    def column(
        self, x: Profile, y: Profile, a: Profile, b: Profile, power: float = 2.0, u: tuple[float, float] = (-9, 9)
    ) -> Solid:
        """A super-ellipse in every slice between two levels; centre and half axes may vary with z."""
        low = (self.height_of(u[1]), np.min(y - b) - 2 * self.px, np.min(x - a) - 2 * self.px)
        high = (self.height_of(u[0]), np.max(y + b) + 2 * self.px, np.max(x + a) + 2 * self.px)
        box = self.box(low, high)
        x, y, a, b = (v[box[0]] if isinstance(v, np.ndarray) else v for v in (x, y, a, b))
        _, gy, gx = self.coordinates(box)
        distance = 1.0 - (np.abs(gx - x) / a) ** power - (np.abs(gy - y) / b) ** power
        return box, (distance * (np.sqrt(a * b) / power)).astype(np.float32, copy=False)

    def ball(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Solid:
        """An ellipsoid: centre (x mm, y mm, u), half axes (x, y, z) in mm."""
        (x, y, u), (a, b, c) = centre, radii
        z, margin = self.height_of(u), 2 * self.px
        box = self.box((z - c, y - b - margin, x - a - margin), (z + c, y + b + margin, x + a + margin))
        gz, gy, gx = self.coordinates(box)
        inside = 1.0 - ((gx - x) / a) ** 2 - ((gy - y) / b) ** 2 - ((gz - z) / c) ** 2
        return box, (inside * (min(a, b) / 2)).astype(np.float32, copy=False)

    def tube(self, path: Sequence[tuple[float, float, float]], radius: Sequence[float] | float) -> Solid:
        """A bent tube through (x mm, y mm, u); one radius, or one per point."""
        points = np.asarray([(self.height_of(u), y, x) for x, y, u in path], np.float32)
        radii = np.broadcast_to(np.asarray(radius, np.float32), len(points))
        margin = float(radii.max()) + 2 * self.px + 3
        box = self.box(points.min(0) - margin, points.max(0) + margin)
        z, y, x = self.coordinates(box)
        best = np.full(np.broadcast_shapes(z.shape, y.shape, x.shape), -1e3, np.float32)
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            d = b - a
            t = ((z - a[0]) * d[0] + (y - a[1]) * d[1] + (x - a[2]) * d[2]) / max(float(d @ d), 1e-6)
            t = np.clip(t, 0, 1)
            gap = (z - a[0] - t * d[0]) ** 2 + (y - a[1] - t * d[1]) ** 2 + (x - a[2] - t * d[2]) ** 2
            np.maximum(best, ra + t * (rb - ra) - np.sqrt(gap), out=best)
        return box, best

    def paint(self, hu: np.ndarray, solid: Solid, value: float, inset: float = 0.0, strength: float = 1.0) -> None:
        """Fill a solid, shrunk by ``inset`` mm."""
        box, distance = solid
        cover = soft(distance - np.float32(inset), self.px)
        blend(hu[box], cover if strength == 1.0 else cover * np.float32(strength), value)

    def merge(self, field: np.ndarray, solid: Solid, grow: float = 0.0) -> None:
        """Union into a full-size distance field, grown by ``grow`` mm."""
        box, distance = solid
        np.maximum(field[box], distance + np.float32(grow), out=field[box])
