"""A synthetic chest without disease: from a patient's measures to a HU volume.

Arrays are float32 with axes [Z, Y, X] as in :mod:`data.phantom.canvas`; u is the craniocaudal position in the lungs, 0
at the apex, 1 at the base. Later organs overwrite earlier ones: fat and muscle, abdomen and mediastinum, bones, lungs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from config.errors import InputError
from data.phantom.canvas import Canvas, Grid, blend, soft

AIR, LUNG, FAT, MUSCLE, BLOOD, LIVER = -1000.0, -865.0, -95.0, 50.0, 42.0, 58.0
SIGN = {"right": -1.0, "left": 1.0}
_BIFURCATIONS = 6  # along each vessel
MIN_EXTENT = (200.0, 240.0, 300.0)  # z, y, x in mm: less does not hold a chest


@dataclass(frozen=True)
class Patient:
    """Measures of a patient, mm and HU."""

    apex_z: float
    height: float  # of the lungs
    width: float  # half width of the thoracic cavity
    depth: float  # half depth of it
    fat: float
    muscle: float
    heart: float  # scale
    contrast: float  # HU that a contrast agent adds to blood; 0 for a plain scan
    shift: tuple[float, float]
    dome: dict[str, float]  # u of the top of each half of the diaphragm
    rib_phase: float
    lung_hu: float
    noise: float


@dataclass
class Chest:
    """A finished chest: HU, coverage of each lung (0..1) and depth into it (mm, negative outside)."""

    canvas: Canvas
    patient: Patient
    hu: np.ndarray
    lung: dict[str, np.ndarray]
    depth: dict[str, np.ndarray]
    cavity: dict[str, tuple[np.ndarray, ...]]  # centre x, y and half axes of each hemithorax, per slice
    hilum: dict[str, np.ndarray]  # (z, y, x) mm
    z_range: dict[str, tuple[float, float]]  # lowest and highest z of each lung, mm above the first slice


def sample_grid(rng: np.random.Generator) -> Grid:
    """The default grid: 128 × 128 at 2.6 to 2.9 mm, 34 to 39 slices of about 8 mm."""
    pixel = round(float(rng.uniform(2.62, 2.88)), 3)
    return Grid((int(rng.integers(34, 40)), 128, 128), (round(float(rng.uniform(7.5, 8.2)), 2), pixel, pixel))


def sample_patient(rng: np.random.Generator, grid: Grid) -> Patient:
    """Draw a patient that fits the field of view.

    Raises:
        InputError: the field of view is smaller than a chest.
    """
    extent = tuple(n * s for n, s in zip(grid.shape, grid.spacing, strict=True))  # field of view (z, y, x), mm
    if any(have < need for have, need in zip(extent, MIN_EXTENT, strict=True)):
        raise InputError(
            f"phantom grid {grid.shape} at {grid.spacing} mm covers {extent} mm (z, y, x); "
            f"a chest needs {MIN_EXTENT} mm: raise the shape or the spacing"
        )
    size, fat, muscle = rng.uniform(0.93, 1.04), rng.uniform(6, 19), rng.uniform(7, 12)
    top = grid.spacing[0] * (grid.shape[0] - 1)
    height = min(rng.uniform(215, 250), 0.9 * top)
    right_dome = rng.uniform(0.69, 0.75)
    return Patient(
        apex_z=top - min(top - height, rng.uniform(8, 24)),
        height=height,
        width=min(130 * size * rng.uniform(0.97, 1.03), extent[2] / 2 - fat - muscle - 14),
        depth=min(90 * size * rng.uniform(0.94, 1.06), extent[1] / 2 - fat - muscle - 14),
        fat=fat,
        muscle=muscle,
        heart=rng.uniform(0.88, 1.06),
        contrast=float(rng.uniform(90, 190) if rng.random() < 0.35 else 0.0),
        shift=(rng.uniform(-5, 5), rng.uniform(-5, 5)),
        dome={"right": right_dome, "left": right_dome + rng.uniform(0.03, 0.07)},
        rib_phase=rng.uniform(0, 1),
        lung_hu=LUNG + rng.uniform(-20, 25),
        noise=rng.uniform(8, 16),
    )


def build_chest(grid: Grid, patient: Patient, rng: np.random.Generator) -> Chest:
    """Paint a healthy chest, without noise (:func:`finish` adds it)."""
    c = Canvas(grid, patient.apex_z, patient.height, patient.shift)
    hu = _body_wall(c, patient)
    cavity = _hemithoraces(c, patient)
    inside = {side: c.column(*cavity[side], power=2.3, u=(0.0, 9.0)) for side in SIGN}
    wall = np.full(grid.shape, -1e3, np.float32)
    for solid in inside.values():
        c.merge(wall, solid)
    blend(hu, soft(wall, c.px), FAT)
    below = {side: _below_dome(c, patient, cavity[side], side) for side in SIGN}
    _abdomen(c, patient, hu, wall, below)
    middle = np.full(grid.shape, -1e3, np.float32)
    _mediastinum(c, patient, hu, middle)
    _bones(c, patient, hu, wall, middle)
    lung, depth, z_range, hilum = {}, {}, {}, {}
    for side, (box, distance) in inside.items():
        clear = np.full(grid.shape, -1e3, np.float32)
        clear[box] = distance
        np.minimum(clear, -middle, out=clear)
        cover = soft(clear, c.px) * soft(below[side], -grid.spacing[0])
        np.minimum(clear, -0.7 * below[side], out=clear)
        levels = np.flatnonzero((cover > 0.5).any((1, 2)))
        z_range[side] = (float(c.z[levels[0], 0, 0]), float(c.z[levels[-1], 0, 0]))
        lung[side], depth[side] = cover, clear
        x = SIGN[side] * 0.30 * patient.width
        hilum[side] = np.asarray([c.height_of(0.45 if side == "right" else 0.43), 8.0, x])
    chest = Chest(c, patient, hu, lung, depth, cavity, hilum, z_range)
    _parenchyma(chest, rng)
    return chest


def _body_wall(c: Canvas, p: Patient) -> np.ndarray:
    """Air, skin, fat, muscle; the shoulders widen and flatten the uppermost slices; scapulae; the table."""
    hu = np.full(c.grid.shape, AIR, np.float32)
    shoulder = np.clip(1 - c.u / 0.25, 0, 1.3)
    wall = p.fat + p.muscle + 11
    a, b = p.width + wall + 8 * shoulder, p.depth + wall - 16 * shoulder
    skin = c.column(0.0, 3 + 6 * shoulder, a, b, power=2.6)
    for inset, value in ((0.0, 10.0), (3.0, FAT), (p.fat, MUSCLE)):
        c.paint(hu, skin, value, inset)
    box, distance = c.column(0.0, p.depth + wall + 5 - 60, 190.0 + 0 * c.u, 66.0 + 0 * c.u)
    shell = 2.0 - np.abs(distance)
    shell[:, c.y[0, box[1], 0] < p.depth * 0.75] = -99
    blend(hu[box], soft(shell, c.px) * (hu[box] < -500), -650.0)
    for sign in SIGN.values():
        w, d = p.width, p.depth
        for x, y, dx, dy, radius, value in ((1.01, 0.66, -0.38, 0.36, 4.2, FAT), (0.95, 0.72, -0.34, 0.34, 3.0, 480.0)):
            top, tip = (sign * x * w, y * d), (sign * (x + dx) * w, (y + dy) * d)
            path = [(*top, -0.02), (*tip, 0.0), (*tip, 0.17), (*top, 0.12), (*tip, 0.3), (*top, 0.24)]
            c.paint(hu, c.tube(path, radius), value)
    return hu


def _hemithoraces(c: Canvas, p: Patient) -> dict[str, tuple[np.ndarray, ...]]:
    """Centre and half axes of each hemithorax per slice: narrow at the apex, wide at the base.

    The two outlines overlap in the midline; their union leaves the gutters beside the spine.
    """
    t = np.clip(c.u / 0.36, 0.03, 1.0)
    s = np.sqrt(1 - (1 - t) ** 2) * (0.95 + 0.05 * np.clip(c.u, 0, 1))
    x = 0.465 * p.width * (0.74 + 0.26 * s)
    a, b = 0.545 * p.width * s, p.depth * (0.18 + 0.82 * s)
    return {side: (sign * x, 0.20 * p.depth * (1 - s), a, b) for side, sign in SIGN.items()}


def _below_dome(c: Canvas, p: Patient, cavity: tuple[np.ndarray, ...], side: str) -> np.ndarray:
    """Distance in mm below the diaphragm [Z, Y, X]: a dome, deepest behind and at the side."""
    x, _, a, b = cavity
    q = ((c.x - x) / (1.04 * a)) ** 2 + ((c.y + 0.2 * b) / (1.22 * b)) ** 2
    surface = p.dome[side] + (1.0 - p.dome[side]) * np.minimum(q, 1.3)
    return ((c.u - surface) * p.height).astype(np.float32)


def _abdomen(c: Canvas, p: Patient, hu: np.ndarray, wall: np.ndarray, below: dict[str, np.ndarray]) -> None:
    """Liver under the right dome and across the midline, spleen and stomach under the left."""
    lift = 0.35 * p.contrast
    body = soft(wall, c.px)
    blend(hu, body * soft(below["right"], c.grid.spacing[0]) * (c.x < 0), LIVER + lift)
    under = body * soft(below["left"], c.grid.spacing[0]) * (c.x >= 0)
    edge = soft(0.42 * p.width - 0.55 * (c.y + 0.2 * p.depth) - c.x, 2 * c.px)  # left lobe, in front
    blend(hu, under * edge, LIVER + lift)
    w, d = p.width, p.depth
    for centre, radii, value in (
        ((0.62 * w, 0.42 * d, 1.0), (0.30 * w, 0.40 * d, 52.0), 48 + lift),
        ((0.50 * w, -0.20 * d, 1.0), (0.34 * w, 0.44 * d, 50.0), 25.0),
        ((0.46 * w, -0.42 * d, 0.99), (0.20 * w, 0.20 * d, 30.0), -950.0),
    ):
        box, distance = c.ball(centre, radii)
        blend(hu[box], soft(distance, c.px) * under[box], value)


def _mediastinum(c: Canvas, p: Patient, hu: np.ndarray, middle: np.ndarray) -> None:
    """Heart, great vessels, airways, oesophagus; ``middle`` is the union of what separates the lungs."""
    w, d, k = p.width, p.depth, p.heart
    blood = BLOOD + p.contrast
    waist = np.interp(c.u, [0.0, 0.12, 0.28, 0.45, 0.7, 1.0], [0.34, 0.26, 0.21, 0.19, 0.18, 0.20]) * w
    c.merge(middle, c.column(0.0, -0.08 * d, waist.astype(np.float32), 0.90 * d))
    spine_y = 0.62 * d + 6
    c.merge(middle, c.column(0.0, spine_y + 6, 23.0, 24.0))
    heart = (
        c.ball((0.24 * w, -0.22 * d, 0.67), (0.42 * w * k, 0.47 * d * k, 52 * k)),
        c.ball((-0.08 * w, -0.26 * d, 0.64), (0.34 * w * k, 0.44 * d * k, 50 * k)),
        c.ball((0.06 * w, 0.06 * d, 0.58), (0.30 * w * k, 0.26 * d * k, 34 * k)),
    )
    aorta = c.tube(
        [(-0.10 * w, -0.30 * d, 0.52), (-0.13 * w, -0.30 * d, 0.34), (-0.10 * w, -0.18 * d, 0.25)]
        + [(0.06 * w, 0.02 * d, 0.215), (0.19 * w, 0.34 * d, 0.26), (0.20 * w, 0.46 * d, 0.38)]
        + [(0.15 * w, 0.48 * d, 0.75), (0.07 * w, 0.50 * d, 1.25)],
        [16, 16, 15, 14, 13, 12.5, 12, 11],
    )
    trunk = c.tube([(0.14 * w, -0.34 * d, 0.50), (0.17 * w, -0.22 * d, 0.40), (0.30 * w, 0.04 * d, 0.40)], [14, 13, 9])
    right_artery = c.tube([(0.14 * w, -0.16 * d, 0.41), (-0.30 * w, 0.06 * d, 0.43)], [11, 9])
    cava = c.tube([(-0.20 * w, -0.14 * d, 0.06), (-0.20 * w, -0.16 * d, 0.56)], [8, 9])
    roots = [c.tube([(s * 0.27 * w, 0.06 * d, 0.38), (s * 0.31 * w, 0.10 * d, 0.52)], [8, 7]) for s in SIGN.values()]
    for solid in (*heart, aorta, trunk, right_artery, cava, *roots):
        c.merge(middle, solid, grow=2.0)
    for x, y in ((-0.12, -0.12), (0.02, -0.10), (0.14, 0.02), (-0.24, -0.14), (0.22, -0.14)):
        c.paint(hu, c.tube([(x * w, y * d, -0.12), (x * w * 0.8, y * d, 0.2)], 5.0), blood)
    for solid in heart:
        c.paint(hu, solid, BLOOD + 0.75 * p.contrast)
    for solid in (trunk, right_artery, cava, *roots, aorta):
        c.paint(hu, solid, blood, 0.5)
    c.paint(hu, c.tube([(0.02 * w, 0.34 * d, -0.1), (0.03 * w, 0.36 * d, 0.9)], 7.0), 35.0)
    airways = [
        c.tube([(0.0, 0.08 * d, -0.2), (0.0, 0.14 * d, 0.36)], 8.6),
        c.tube([(0.0, 0.14 * d, 0.355), (-0.27 * w, 0.12 * d, 0.43), (-0.34 * w, 0.22 * d, 0.54)], [8, 6, 4]),
        c.tube([(0.0, 0.14 * d, 0.355), (0.28 * w, 0.16 * d, 0.44), (0.34 * w, 0.26 * d, 0.55)], [7.5, 6, 4]),
        c.tube([(-0.22 * w, 0.12 * d, 0.40), (-0.38 * w, 0.0, 0.36)], [5, 3.2]),
        c.tube([(0.24 * w, 0.14 * d, 0.42), (0.38 * w, 0.0, 0.38)], [5, 3.2]),
    ]
    for airway in airways:
        c.paint(hu, airway, 0.0, inset=-1.8, strength=0.7)
        c.merge(middle, airway, grow=1.5)
    for airway in airways:
        c.paint(hu, airway, AIR)


def _bones(c: Canvas, p: Patient, hu: np.ndarray, wall: np.ndarray, middle: np.ndarray) -> None:
    """Ribs as tilted rings of the chest wall, sternum, and the spine with its canal."""
    near = np.flatnonzero((wall < -0.5) & (wall > -12.0) & (c.u > -0.05))
    iz, iy, ix = np.unravel_index(near, c.grid.shape)
    y, x, u = c.y[0, iy, 0], c.x[0, 0, ix], c.u[iz, 0, 0]
    centre = np.abs(-wall.flat[near] - 5.5)
    forward = np.clip(0.5 - y / (2 * p.depth), 0, 1)  # 0 behind, 1 in front
    level = (u * p.height - 88.0 * forward) / 25.0 + p.rib_phase + 0.04 * np.sign(x)
    cover = np.clip((6.5 - 25.0 * np.abs(level - np.round(level))) / 4.0 + 0.5, 0, 1)
    cover *= np.clip((4.2 - centre) / c.px + 0.5, 0, 1) * (np.abs(x) > 20)
    value = np.where(forward > 0.9, 120.0, 300.0 + 60.0 * centre)
    hu.flat[near] += (cover * (value - hu.flat[near])).astype(np.float32)
    top = 0.62 * p.depth + 6
    disc = np.abs((c.u * p.height / 25.0) % 1.0 - 0.5) > 0.38
    c.paint(hu, c.column(0.0, top + 22, 30.0, 7.0), 280.0, strength=0.8)
    c.paint(hu, c.column(0.0, top + 40, 4.0, 17.0), 330.0, strength=0.8)
    body = c.column(0.0, top, 18.0, 15.0)
    c.paint(hu, body, 430.0, inset=-1.0)
    blend(hu[body[0]], soft(body[1] - 2.5, c.px), np.where(disc, 100.0, 215.0))
    c.paint(hu, c.column(0.0, top + 22, 9.5, 7.5), 25.0)
    front = [(0.0, -0.86 * p.depth, 0.12), (0.0, -p.depth - 2, 0.6)]
    for x in (-9.0, 0.0, 9.0):
        bone = c.tube([(x + q[0], q[1], q[2]) for q in front], 5.5)
        c.paint(hu, bone, 290.0)
        c.merge(middle, bone, grow=3.0)


def _parenchyma(chest: Chest, rng: np.random.Generator) -> None:
    """Fill the lungs: aerated tissue, slightly denser posteriorly, and the vessel trees."""
    c, p = chest.canvas, chest.patient
    tissue = np.float32(p.lung_hu) + np.float32(28.0) * (c.y / np.float32(p.depth)) + np.float32(15.0) * (c.u - 0.5)
    trees = []
    for side in SIGN:
        blend(chest.hu, chest.lung[side], tissue)
        inside = np.flatnonzero(chest.depth[side] > 6.0)
        picks = rng.choice(inside, 22)
        targets = np.stack(np.unravel_index(picks, c.grid.shape), 1) * c.grid.spacing + c.origin
        trees.append(_grow_vessels(rng, chest.hilum[side], targets))
    vessels = _splat(c, *map(np.concatenate, zip(*trees, strict=True)))
    vessels *= np.maximum(chest.lung["right"], chest.lung["left"])
    blend(chest.hu, vessels, 30.0 + 0.6 * p.contrast)


def _unit(v: np.ndarray) -> np.ndarray:
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-6)


def _grow_vessels(rng: np.random.Generator, hilum: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pulmonary vessels of one lung: branches that divide and taper from the hilum towards the pleura.

    ``hilum`` (z, y, x) and ``targets`` [T, 3], at which the main branches aim, in mm. Returns points [P, 3] about 2 mm
    apart and radii [P], mm.
    """
    # A hilum is taller than wide; roots in one plane would all lie in a single slice.
    start = hilum + rng.normal(0, 1, targets.shape) * (13.0, 5.0, 3.0)
    reach = targets - start
    direction = _unit(reach)
    # The first segment is 26 % of the distance to the target; later ones shrink geometrically, as the calibre does.
    length = np.linalg.norm(reach, axis=1) * 0.26
    radius = rng.uniform(1.7, 3.3, len(targets))
    points, radii = [], []
    for _ in range(_BIFURCATIONS):
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
    return np.concatenate(points), np.concatenate(radii)


def _splat(c: Canvas, points: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Coverage 0..1 of the union of small balls [Z, Y, X]; a ball thinner than a voxel is fainter."""
    grid = c.grid
    cover = np.zeros(int(np.prod(grid.shape)), np.float32)
    position = (points - c.origin) / np.asarray(grid.spacing)
    for thin in (True, False):
        pick = (radii < 1.6) == thin
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
        strength = np.minimum(1, 1.45 * r / c.px)[:, None]
        across = strength * np.clip((r[:, None] - gap_xy) / c.px + 0.85, 0, 1)
        along = np.clip((r[:, None] + 0.5 * sz - gap_z) / min(3.0, sz), 0, 1)
        plane = (near[:, 1:2] + dy) * grid.shape[2] + near[:, 2:3] + dx
        for level in range(3):
            index = (near[:, 0:1] + dz[level]) * (grid.shape[1] * grid.shape[2]) + plane
            value = across * along[:, level : level + 1]
            positive = value > 0
            np.maximum.at(cover, index[positive], value[positive])
    return cover.reshape(grid.shape)


def finish(hu: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Blur by a point spread function and add correlated noise (HU). Returns a new array."""
    grain = rng.standard_normal(hu.shape, dtype=np.float32)
    texture = ndimage.uniform_filter(grain, (0, 3, 3), mode="wrap")
    grain *= np.float32(noise * 0.45)
    texture *= np.float32(noise * 3.0)
    image = ndimage.correlate1d(hu, [0.12, 0.76, 0.12], axis=1, mode="nearest")
    image = ndimage.correlate1d(image, [0.12, 0.76, 0.12], axis=2, mode="nearest")
    image += grain
    image += texture
    return image
