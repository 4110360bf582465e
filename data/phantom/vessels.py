"""The pulmonary vessel tree: branches from the hilum that divide and taper towards the pleura.

Arrays: points [P, 3] and volumes [Z, Y, X], both in the order z, y, x; millimetres.
"""

from __future__ import annotations

import numpy as np

from data.phantom.canvas import Canvas


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)


def grow_tree(
    rng: np.random.Generator, hilum: np.ndarray, targets: np.ndarray, levels: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Sample a branching tree as dense points and radii.

    Args:
        hilum: (z, y, x) of the root, mm.
        targets: [T, 3] points within the lung at which the main branches aim.
        levels: bifurcations along each branch.

    Returns:
        points [P, 3] about 2 mm apart, radii [P], mm.
    """
    # A hilum is taller than wide; roots in one plane would all lie in a single slice.
    start = hilum + rng.normal(0, 1, targets.shape) * (13.0, 5.0, 3.0)
    reach = targets - start
    direction = _unit(reach)
    # The first segment is 26 % of the distance to the target; later ones shrink geometrically, as the calibre does.
    length = np.linalg.norm(reach, axis=1) * 0.26
    radius = rng.uniform(1.7, 3.3, len(targets))
    points, radii = [], []
    for _ in range(levels):
        steps = np.ceil(length / 2.2).astype(int)
        t = np.arange(steps.max() + 1) / steps[:, None]  # position along each branch; values above 1 are dropped
        bend = rng.normal(0, 0.10, start.shape) * length[:, None]
        end = start + direction * length[:, None]
        line = start[:, None] + t[..., None] * (end - start)[:, None] + (t * (1 - t))[..., None] * bend[:, None]
        taper = radius[:, None] * (1 - 0.22 * t)
        points.append(line[t <= 1])
        radii.append(taper[t <= 1])
        spread = rng.normal(0, 1, (len(end), 3))
        spread = _unit(spread - (spread * direction).sum(1, keepdims=True) * direction)
        angle = rng.uniform(0.25, 0.6, (len(end), 1))
        # One daughter continues nearly straight, the other leaves at a wider angle and is thinner.
        straight, side = direction - 0.4 * angle * spread, direction + 1.6 * angle * spread
        start = np.concatenate([end, end])
        direction = _unit(np.concatenate([straight, side]))
        length = np.concatenate([length * rng.uniform(0.8, 1.0, len(end)), length * rng.uniform(0.55, 0.85, len(end))])
        radius = np.concatenate([radius * 0.84, radius * 0.64])
        keep = radius > 0.42
        start, direction, length, radius = start[keep], direction[keep], length[keep], radius[keep]
        if not len(start):
            break
    return np.concatenate(points), np.concatenate(radii)


def splat(canvas: Canvas, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Coverage 0..1 of the union of small balls [Z, Y, X]; a ball thinner than a voxel is fainter."""
    grid = canvas.grid
    cover = np.zeros(int(np.prod(grid.shape)), np.float32)
    position = (points - canvas.origin) / np.asarray(grid.spacing)
    for thin in (True, False):
        pick = (radii < 1.6) == thin
        if not pick.any():
            continue
        reach = 1 if thin else 2
        near = np.round(position[pick]).astype(np.int32)
        rest = ((position[pick] - near) * grid.spacing).astype(np.float32)
        inside = ((near >= [1, reach, reach]) & (near < np.asarray(grid.shape) - [1, reach, reach])).all(1)
        near, rest, r = near[inside], rest[inside], radii[pick][inside].astype(np.float32)
        half = np.arange(-reach, reach + 1, dtype=np.int32)
        dz, dy, dx = np.arange(-1, 2, dtype=np.int32), *(g.ravel() for g in np.meshgrid(half, half, indexing="ij"))
        sz, sy, sx = np.asarray(grid.spacing, np.float32)
        # Separable: distances across slices and within one, 3 + 25 terms a point instead of 75.
        gap_xy = np.sqrt((dy * sy - rest[:, 1:2]) ** 2 + (dx * sx - rest[:, 2:3]) ** 2)
        gap_z = np.abs(dz * sz - rest[:, 0:1])
        # Fraction of the pixel and of the slice thickness that the tube fills.
        strength = np.minimum(1, 1.45 * r / canvas.px)[:, None]
        across = strength * np.clip((r[:, None] - gap_xy) / canvas.px + 0.85, 0, 1)
        along = np.clip((r[:, None] + 0.5 * sz - gap_z) / min(3.0, sz), 0, 1)
        plane = (near[:, 1:2] + dy) * grid.shape[2] + near[:, 2:3] + dx
        for level in range(3):
            index = (near[:, 0:1] + dz[level]) * (grid.shape[1] * grid.shape[2]) + plane
            value = across * along[:, level : level + 1]
            positive = value > 0
            np.maximum.at(cover, index[positive], value[positive])
    return cover.reshape(grid.shape)
