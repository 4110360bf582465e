"""Lesions of a phantom: where they may lie, what each type looks like, and how large it is as drawn.

Arrays have axes [Z, Y, X]. A lesion is drawn in a box around its centre; the mask holds the value of its type. The
size in the report is measured on that mask, so it stays true where the pleura cuts a lesion.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import ndimage

from data.phantom.anatomy import SIGN, Chest
from data.phantom.canvas import Box, Grid, blend, soft
from data.phantom.finding import ZONES, Finding

# Longest axial diameter in mm (depth for an effusion). Below 8 mm a lesion is under three pixels wide.
SIZE_RANGE = {
    "nodule": (8, 24),
    "cavity": (20, 38),
    "consolidation": (24, 46),
    "tree_in_bud": (24, 46),
    "fibrosis": (26, 44),
    "effusion": (10, 36),
    "calcification": (8, 15),
}
ZONE_MARGIN = 0.06  # of the lung's height between a lesion's centre and the border of its zone
_ATTEMPTS = 12

Drawn = tuple[Box, np.ndarray, np.ndarray | float, np.ndarray]  # box, coverage, HU, boolean mask


@dataclass(frozen=True)
class _Site:
    """The neighbourhood of a lesion: box, offsets from the centre in mm, and the lung's coverage there."""

    box: Box
    dz: np.ndarray
    dy: np.ndarray
    dx: np.ndarray
    lung: np.ndarray
    px: float
    slice_mm: float


def zone_bounds(z_range: tuple[float, float], zone: str) -> tuple[float, float]:
    """Lowest and highest z (mm) of a third of the lung."""
    index = len(ZONES) - 1 - ZONES.index(zone)
    third = (z_range[1] - z_range[0]) / len(ZONES)
    return z_range[0] + index * third, z_range[0] + (index + 1) * third


def zone_margin(z: float, z_range: tuple[float, float], zone: str) -> float:
    """Distance of z from the nearer border of its zone as a fraction of the lung's height; < 0 outside.

    The apex and the base of the lung are no borders between zones and do not count.
    """
    low, high = zone_bounds(z_range, zone)
    gaps = [z - low] * (zone != "lower") + [high - z] * (zone != "upper")
    return min(gaps) / (z_range[1] - z_range[0])


def measure(mask: np.ndarray, kind: str, grid: Grid) -> int:
    """Size in whole mm on the axial slice with the largest area of a boolean mask [Z, Y, X]; 0 if empty."""
    best = mask[mask.sum((1, 2)).argmax()]
    if not best.any():
        return 0
    if kind == "effusion":
        # The depth of a crescent is that of the widest ball that fits: twice the deepest pixel's distance
        # to the outside, which ends half a pixel before the next centre.
        inner = ndimage.distance_transform_edt(np.pad(best, 1), sampling=grid.spacing[1:]).max()
        return round(float(2 * inner) - grid.pixel)
    # The farthest pair lies on the hull; extreme points in 24 directions find it to within a percent.
    points = np.argwhere(best) * grid.spacing[1:]
    angles = np.linspace(0, np.pi, 24, endpoint=False)
    reach = points @ np.stack([np.sin(angles), np.cos(angles)])
    ends = points[np.unique(np.concatenate([reach.argmax(0), reach.argmin(0)]))]
    return round(float(np.sqrt(((ends[:, None] - ends[None]) ** 2).sum(-1)).max()) + grid.pixel)


def add_finding(
    chest: Chest, mask: np.ndarray, kind: str, side: str, zone: str, rng: np.random.Generator
) -> Finding | None:
    """Draw one lesion into ``chest.hu`` and ``mask`` (uint8 [Z, Y, X]), both in place.

    Returns:
        The finding as measured, or None if no free place was found (nothing is drawn then).
    """
    low, high = SIZE_RANGE[kind]
    size = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    for _ in range(_ATTEMPTS):
        effusion = kind == "effusion"
        drawn = _effusion(chest, side, size, rng) if effusion else _local(chest, mask, kind, side, zone, size, rng)
        got = low
        if drawn is not None:
            box, cover, value, solid = drawn
            got = measure(solid, kind, chest.canvas.grid)
            if low <= got <= high and _fits(chest, mask, drawn, side, zone):
                finding = Finding(kind, side, zone, got)
                blend(chest.hu[box], cover, value)
                mask[box][solid] = finding.mask_value
                return finding
        # A lesion cut by the pleura is drawn larger; any other is drawn smaller.
        size *= 1.15 if got < low else rng.uniform(0.85, 1.0)
    return None


def _fits(chest: Chest, mask: np.ndarray, drawn: Drawn, side: str, zone: str) -> bool:
    """Whether a lesion as drawn touches no other, and its centre and best slice keep the margin of its zone."""
    box, _, _, solid = drawn
    if (mask[box] > 0)[solid].any():
        return False
    area = solid.sum((1, 2))
    z = chest.canvas.z[box[0], 0, 0]
    span = chest.z_range[side]
    return min(zone_margin(float(v), span, zone) for v in (z @ area / area.sum(), z[area.argmax()])) >= ZONE_MARGIN


def _local(
    chest: Chest, mask: np.ndarray, kind: str, side: str, zone: str, size: float, rng: np.random.Generator
) -> Drawn | None:
    """Choose a place for a lesion and draw it there."""
    c = chest.canvas
    need = size * (0.5 if kind in ("nodule", "cavity", "calcification") else 0.28) + 3
    low, high = zone_bounds(chest.z_range[side], zone)
    margin = ZONE_MARGIN * 1.15 * (chest.z_range[side][1] - chest.z_range[side][0])
    z = c.z[:, 0, 0]
    levels = np.flatnonzero((z > low + margin) & (z < high - margin))
    depth = chest.depth[side][levels]
    spots = np.flatnonzero(depth >= need)
    if not len(spots):
        return None
    for _ in range(20):
        iz, iy, ix = np.unravel_index(rng.choice(spots), depth.shape)
        at = (iz + levels[0], iy, ix)
        z, y, x = c.z[at[0], 0, 0], c.y[0, iy, 0], c.x[0, 0, ix]
        gap = np.hypot(y - chest.hilum[side][1], x - chest.hilum[side][2])
        near_hilum = gap < 18 + 0.35 * size and abs(z - chest.hilum[side][0]) < 30
        # At least 8 mm from any other lesion.
        if not near_hilum and not mask[_neighbourhood(c.grid, at, size / 2 + 8)].any():
            box = _neighbourhood(c.grid, at, 0.75 * size + 4)
            offsets = (axis - centre for axis, centre in zip(c.coordinates(box), (z, y, x), strict=True))
            return _DRAW[kind](_Site(box, *offsets, chest.lung[side][box], c.px, c.grid.spacing[0]), size, rng)
    return None


def _neighbourhood(grid: Grid, at: tuple[int, int, int], reach: float) -> Box:
    steps = [int(np.ceil(reach / s)) for s in grid.spacing]
    return tuple(slice(max(0, i - n), min(m, i + n + 1)) for i, n, m in zip(at, steps, grid.shape, strict=True))


def _blob(s: _Site, radius: float, rough: float, rng: np.random.Generator, flat: float = 0.8) -> np.ndarray:
    """Signed distance (mm) to a lobulated ball; ``flat`` is its height relative to its width."""
    angle = np.arctan2(s.dy, s.dx)
    wave = sum(rng.normal(0, rough / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 5))
    stretch, turn = rng.uniform(0.8, 1.0), rng.uniform(0, np.pi)
    along = s.dx * np.cos(turn) + s.dy * np.sin(turn)
    across = (s.dy * np.cos(turn) - s.dx * np.sin(turn)) / stretch
    height = np.maximum(flat * radius, 0.75 * s.slice_mm)
    r = np.sqrt(along**2 + across**2 + (s.dz * radius / height) ** 2)
    return radius * (1 + wave) - r


def _solid(s: _Site, size: float, rng: np.random.Generator, hu: tuple[float, float]) -> Drawn:
    cover = soft(_blob(s, size / 2, 0.05, rng), s.px)
    return s.box, cover, rng.uniform(*hu), cover >= 0.5


def _cavity(s: _Site, size: float, rng: np.random.Generator) -> Drawn:
    distance = _blob(s, size / 2, 0.05, rng)
    cover = soft(distance, s.px)
    wall = max(4.5, size * rng.uniform(0.13, 0.18))
    value = np.full_like(cover, rng.uniform(20, 60))
    blend(value, soft(distance - wall, s.px), -970.0)
    return s.box, cover, value, cover >= 0.5


def _consolidation(s: _Site, size: float, rng: np.random.Generator) -> Drawn:
    distance = _blob(s, size / 2 * 0.97, 0.10, rng, flat=0.6)
    grain = rng.standard_normal(distance.shape, dtype=np.float32)
    grain = (grain + np.roll(grain, 1, 1) + np.roll(grain, 1, 2) + np.roll(grain, (1, 1), (1, 2))) / 2
    cover = soft(distance + 2.2 * grain, 3.0 * s.px) * s.lung
    value = np.full_like(cover, rng.uniform(-20, 40))
    # Air bronchograms: two or three dark tubes fanning through the opacity.
    turn = rng.uniform(0, np.pi)
    for _ in range(2):
        off, angle = rng.uniform(-0.25, 0.25) * size, turn + rng.normal(0, 0.25)
        line = np.abs(s.dy * np.cos(angle) - s.dx * np.sin(angle) - off)
        blend(value, soft(1.3 - line, s.px) * (distance > 3) * (np.abs(s.dz) < 1.2 * s.slice_mm) * 0.6, -820.0)
    value += 35 * grain
    return s.box, cover, value, (distance >= 0) & (s.lung >= 0.5)


def _tree_in_bud(s: _Site, size: float, rng: np.random.Generator) -> Drawn:
    region = _blob(s, size / 2, 0.06, rng, flat=0.5)
    inside = (region >= 0) & (s.lung >= 0.5)
    # One dot per cell of a jittered lattice keeps dots apart and fills the region up to its edge.
    pitch, shake = 7.5, 6.5
    row, column = (((v - v.min()) // pitch).astype(int).ravel() for v in (s.dy, s.dx))
    cells = (region.shape[0], row.max() + 3, column.max() + 3)
    dot_y = rng.uniform(0, shake, cells) + pitch * (np.arange(cells[1]) - 1)[:, None] + s.dy.min()
    dot_x = rng.uniform(0, shake, cells) + pitch * (np.arange(cells[2]) - 1) + s.dx.min()
    nearest = np.full(region.shape, 99.0, np.float32)
    for i in range(3):
        for j in range(3):
            cell = np.ix_(range(cells[0]), row + i, column + j)
            np.minimum(nearest, np.hypot(s.dy - dot_y[cell], s.dx - dot_x[cell]), out=nearest)
    cover = np.clip((1.8 - nearest) / s.px + 0.7, 0, 1) * inside
    haze = soft(region, 2 * s.px) * s.lung * np.float32(0.13)
    return s.box, np.maximum(cover * np.float32(0.9), haze), 20.0, inside


def _fibrosis(s: _Site, size: float, rng: np.random.Generator) -> Drawn:
    turn, bow = rng.uniform(0, np.pi), rng.normal(0, 0.10)
    best = np.full(np.broadcast_shapes(s.dz.shape, s.dy.shape, s.dx.shape), -99.0, np.float32)
    # Strands are parallel, unlike vessels; the first and longest has the wanted size.
    width = max(size, 38.0)
    for i, offset in enumerate((0.0, -0.17, 0.17, -0.30)[: int(rng.integers(3, 5))]):
        length = size * (1.0 if i == 0 else rng.uniform(0.55, 0.85))
        angle = turn + (rng.normal(0, 0.10) if i else 0.0)
        along = s.dx * np.cos(angle) + s.dy * np.sin(angle)
        across = s.dy * np.cos(angle) - s.dx * np.sin(angle) - offset * width - bow * (size / 4 - along**2 / size)
        beyond = np.maximum(np.abs(along) - length / 2 + 1.2, 0)
        above = np.maximum(np.abs(s.dz) - 0.6 * s.slice_mm, 0)
        np.maximum(best, 1.6 - np.sqrt(across**2 + beyond**2 + above**2), out=best)
    cover = soft(best, s.px) * s.lung
    return s.box, cover, rng.uniform(10, 70), cover >= 0.5


def _effusion(chest: Chest, side: str, size: float, rng: np.random.Generator) -> Drawn:
    """A crescent behind the lung: the hemithorax minus a copy of itself, moved forward by the fluid's depth."""
    c = chest.canvas
    low, high = chest.z_range[side]
    top = low + (high - low) * rng.uniform(0.22, 0.30)
    levels = np.flatnonzero((c.z[:, 0, 0] >= low) & (c.z[:, 0, 0] < top))
    box = (slice(int(levels[0]), int(levels[-1]) + 1), slice(None), slice(None))
    z, y, x = c.coordinates(box)
    depth = size * np.clip((top - z) / (0.10 * (high - low)), 0.15, 1)
    cx, cy, a, b = (v[box[0]] for v in chest.cavity[side])
    # Also moved medially, so that the fluid rises along the lateral wall.
    aerated = 1 - np.abs((x - cx + SIGN[side] * 0.12 * depth) / a) ** 2.3 - np.abs((y - cy + depth) / b) ** 2.3
    dependent = soft(y - cy + 0.35 * b, 20.0)
    cover = soft(-aerated * np.sqrt(a * b) / 2.3, c.px) * chest.lung[side][box] * dependent
    return box, cover.astype(np.float32), rng.uniform(2, 18), cover >= 0.5


_DRAW = {
    "nodule": partial(_solid, hu=(25, 70)),
    "calcification": partial(_solid, hu=(650, 1100)),
    "cavity": _cavity,
    "consolidation": _consolidation,
    "tree_in_bud": _tree_in_bud,
    "fibrosis": _fibrosis,
}
