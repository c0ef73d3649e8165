"""Drawn scenes with what is true of every pixel: labels, distances, normals, and itself without noise.

A scene is a wall behind up to five solids that are seen from straight ahead: balls, boxes, wedges (boxes whose front
slopes) and cones that point at the eye. Colours, light and places are random, so that no task can be told from colours.

Shape suffixes: N scenes, S x S pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from make.hashing import stable_hash

SIZE = 32
LABELS = ("wall", "ball", "box", "wedge", "cone")
_SOLIDS = (2, 5)  # how many at least and at most
_WALL = 4.0  # its distance in the middle
_NOISE = 0.12  # of pixels from 0 to 1


class Scenes(NamedTuple):
    """images, noisy: uint8 (N, S, S, 3), as seen, and with noise. labels: uint8 (N, S, S).

    distances: float32 (N, S, S). normals: float32 (N, S, S, 3), toward the eye.
    """

    images: np.ndarray
    noisy: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    normals: np.ndarray


def scenes(count: int, *seed: object) -> Scenes:
    """So many scenes, the same for the same seed."""
    random = np.random.default_rng(stable_hash(":".join(("dense", *map(str, seed)))))
    return Scenes(*map(np.stack, zip(*(_scene(random) for _ in range(count)))))


def _scene(random: np.random.Generator) -> tuple[np.ndarray, ...]:
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5) / SIZE * 2 - 1
    tilt = random.uniform(-0.5, 0.5, 2)
    depth = _WALL + tilt[0] * x + tilt[1] * y
    normal = np.broadcast_to(_unit(np.array([tilt[0], tilt[1], 1.0])), (SIZE, SIZE, 3)).copy()
    label = np.zeros((SIZE, SIZE), np.uint8)
    albedo = np.broadcast_to(random.uniform(0.2, 1.0, 3), (SIZE, SIZE, 3)).copy()
    for _ in range(random.integers(_SOLIDS[0], _SOLIDS[1] + 1)):
        kind = int(random.integers(1, len(LABELS)))
        inside, own, facing = _solid(kind, x, y, random)
        nearer = inside & (own < depth)
        depth, label = np.where(nearer, own, depth), np.where(nearer, np.uint8(kind), label)
        normal = np.where(nearer[..., None], facing, normal)
        albedo = np.where(nearer[..., None], random.uniform(0.2, 1.0, 3), albedo)
    light = _unit(np.array([*random.uniform(-0.8, 0.8, 2), 1.0]))
    seen = albedo * (0.25 + 0.75 * np.clip(normal @ light, 0, None))[..., None]
    noisy = seen + random.normal(0, _NOISE, seen.shape)
    pictures = (_bytes(part) for part in (seen, noisy))
    return *pictures, label, depth.astype(np.float32), normal.astype(np.float32)


def _solid(
    kind: int, x: np.ndarray, y: np.ndarray, random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a solid is seen (S, S), how far its front is there, and which way it faces (S, S, 3)."""
    (cx, cy), far = random.uniform(-0.7, 0.7, 2), random.uniform(1.5, 3.3)
    radius = random.uniform(0.8, 0.9) / far  # all are of about one size, so that nearer ones look larger
    dx, dy = (x - cx) / radius, (y - cy) / radius
    away = np.hypot(dx, dy)
    if kind == 1:
        height = np.sqrt(np.clip(1 - away**2, 0, None))
        return away < 1, far - radius * height, np.stack([dx, dy, height + 1e-6], -1)
    if kind == 4:
        slope = 1.5
        flat = np.stack([dx, dy], -1) / np.maximum(away, 1e-6)[..., None]
        facing = np.concatenate([slope * flat, np.ones((*x.shape, 1))], -1)
        return away < 1, far - radius * slope * (1 - away), facing / np.sqrt(1 + slope**2)
    aspect = random.uniform(0.6, 1.0)
    inside = (np.abs(dx) < 1) & (np.abs(dy) < aspect)
    tilt = np.zeros(2) if kind == 2 else random.choice([-1.0, 1.0], 2) * random.uniform(0.6, 1.2, 2)
    facing = np.broadcast_to(_unit(np.array([tilt[0], tilt[1], 1.0])), (*x.shape, 3))
    return inside, far + radius * (tilt[0] * dx + tilt[1] * dy), facing


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _bytes(picture: np.ndarray) -> np.ndarray:
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
