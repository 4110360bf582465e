"""The pulmonary vessel tree: branches from the hilum that divide, thin out and reach for the pleura.

Arrays: points [P, 3] and volumes [Z, Y, X], both in the order z, y, x; millimetres.
"""

from __future__ import annotations

import numpy as np

from data.phantom_canvas import Canvas


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)


def grow_tree(
    rng: np.random.Generator, hilum: np.ndarray, targets: np.ndarray, levels: int = 6
) -> tuple[np.ndarray, np.ndarray]:
    """Sample a branching tree as dense points and radii.

    Args:
        hilum: (z, y, x) of the root, mm.
        targets: [T, 3] points within the lung that the main branches make for.
        levels: bifurcations along each branch.

    Returns:
        points [P, 3] about 2 mm apart, radii [P], mm.
    """
    # A hilum is taller than wide; roots in one plane would crowd into a single slice.
    start = hilum + rng.normal(0, 1, targets.shape) * (13.0, 5.0, 3.0)
    reach = targets - start
    direction = _unit(reach)
    # The first pieces share out the way to the target; shares shrink geometrically like the calibre.
    length = np.linalg.norm(reach, axis=1) * 0.26
    radius = rng.uniform(1.7, 3.3, len(targets))
    points, radii = [], []
    for _ in range(levels):
        steps = int(np.ceil(length.max() / 2.2)) + 1
        t = np.linspace(0, 1, steps)[None, :, None]
        bend = rng.normal(0, 0.10, start.shape) * length[:, None]
        line = start[:, None] + t * (direction * length[:, None])[:, None] + (t * (1 - t)) * bend[:, None]
        taper = radius[:, None] * (1 - 0.22 * t[..., 0])
        points.append(line.reshape(-1, 3))
        radii.append(taper.reshape(-1))
        end = line[:, -1]
        spread = rng.normal(0, 1, (len(end), 3))
        spread = _unit(spread - (spread * direction).sum(1, keepdims=True) * direction)
        angle = rng.uniform(0.25, 0.6, (len(end), 1))
        # One daughter goes on nearly straight, the other leaves at a wider angle and is thinner.
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
    """Coverage 0..1 of the union of small balls [Z, Y, X]; thinner than a voxel means fainter."""
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
        half = np.arange(-reach, reach + 1)
        dz, dy, dx = (g.ravel() for g in np.meshgrid([-1, 0, 1], half, half, indexing="ij"))
        gap_xy = (dy * grid.spacing[1] - rest[:, 1:2]) ** 2 + (dx * grid.spacing[2] - rest[:, 2:3]) ** 2
        gap_z = np.abs(dz * grid.spacing[0] - rest[:, 0:1])
        # Part of the pixel that the tube fills, and of the slice's thickness.
        strength = np.minimum(1.0, 1.45 * r / canvas.px)[:, None]
        across = np.clip((r[:, None] - np.sqrt(gap_xy)) / canvas.px + 0.85, 0, 1)
        along = np.clip((r[:, None] + 0.5 * grid.spacing[0] - gap_z) / min(3.0, grid.spacing[0]), 0, 1)
        index = ((near[:, 0:1] + dz) * grid.shape[1] + near[:, 1:2] + dy) * grid.shape[2] + near[:, 2:3] + dx
        np.maximum.at(cover, index.ravel(), (strength * across * along).ravel().astype(np.float32))
    return cover.reshape(grid.shape)
