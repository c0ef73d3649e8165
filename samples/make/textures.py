"""Twelve drawn patterns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import numpy as np

from make.catalogue import CLASSNAMES
from make.drawing import IMAGE_SIZE, blotches


@dataclass(frozen=True)
class Canvas:
    """Where a pattern is drawn; every array is (36, 36) and in pixels."""

    x: np.ndarray
    y: np.ndarray
    u: np.ndarray  # x and y, turned and shifted
    v: np.ndarray
    period: float  # pixels
    shift: float  # pixels, of u

    @property
    def wave(self) -> float:
        """Radians a pixel."""
        return 2 * math.pi / self.period


def textures(n: int, rng: np.random.Generator, pretraining: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """n pictures (n, 36, 36, 3) uint8 and their classes (n), the classes in turn.

    The task differs from pre-training: its patterns are finer and coloured, those of pre-training grey.
    """
    names = CLASSNAMES["textures"]
    labels = np.arange(n) % len(names)
    return np.stack([_texture(names[label], rng, pretraining) for label in labels]), labels


def _texture(name: str, rng: np.random.Generator, pretraining: bool) -> np.ndarray:
    pattern = np.clip(_PATTERNS[name](_canvas(name, rng, pretraining), rng), -1, 1)[..., None] * 0.5 + 0.5
    first, second = _greys(rng) if pretraining else _colours(rng)
    if rng.random() < 0.5:
        first, second = second, first
    grain = rng.normal(size=(IMAGE_SIZE, IMAGE_SIZE, 1)) * (20 if pretraining else 10)
    return np.clip(first * pattern + second * (1 - pattern) + grain, 0, 255).astype(np.uint8)


def _canvas(name: str, rng: np.random.Generator, pretraining: bool) -> Canvas:
    y, x = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32)
    period = rng.uniform(9, 13) if pretraining else rng.uniform(5, 9)
    angle = rng.uniform(-0.15, 0.15) + _ANGLES.get(name, 0)
    shift = rng.uniform(0, 12, 2)
    u = x * math.cos(angle) + y * math.sin(angle) + shift[0]
    v = -x * math.sin(angle) + y * math.cos(angle) + shift[1]
    return Canvas(x, y, u, v, period, shift[0])


def _greys(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A bright and a dark grey: (3) each."""
    return rng.uniform(180, 255) * np.ones(3), rng.uniform(0, 75) * np.ones(3)


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two colours that differ in brightness: (3) each."""
    first, second = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    while abs(first.mean() - second.mean()) < 45:
        second = rng.uniform(0, 255, 3)
    return first, second


def _stripes(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    return 1.5 * np.sin(c.v * c.wave)


def _checkerboard(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    return np.sign(np.sin(c.u * c.wave) * np.sin(c.v * c.wave))


def _dots(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    square = (c.u % c.period - c.period / 2) ** 2 + (c.v % c.period - c.period / 2) ** 2
    return np.where(square < (c.period * 0.34) ** 2, 1.0, -1.0)


def _rings(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    return 1.5 * np.sin(np.hypot(c.x - rng.uniform(12, 24), c.y - rng.uniform(12, 24)) * c.wave)


def _grid(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    return np.where((c.u % c.period < 1.8) | (c.v % c.period < 1.8), 1.0, -1.0)


def _zigzag(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    teeth = np.abs(c.u % (1.5 * c.period) - 0.75 * c.period)
    return 1.5 * np.sin((c.v + 1.2 * teeth) * c.wave)


def _grain(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(IMAGE_SIZE, IMAGE_SIZE))


def _blotches(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    return blotches(1, rng, cells=5)[0, :, :, 0] / 40 - 3.2  # 3.2 x 40 = 128, the middle grey


def _bricks(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    height = c.period * 0.7
    row = c.v // height
    joint = (c.u + (row % 2) * c.period / 2) % c.period < 1.5  # every other row moved by half a brick
    return np.where((c.v % height < 1.5) | joint, -1.0, 1.0)


def _rays(c: Canvas, rng: np.random.Generator) -> np.ndarray:
    angle = np.arctan2(c.y - rng.uniform(14, 22), c.x - rng.uniform(14, 22))
    return np.sign(np.sin(angle * rng.integers(5, 9) + c.shift))


_ANGLES = {"vertical stripes": math.pi / 2, "diagonal stripes": math.pi / 4}

# Each gives (36, 36) values, cut to -1..1: where the first colour is and where the second.
_PATTERNS: dict[str, Callable[[Canvas, np.random.Generator], np.ndarray]] = {
    "horizontal stripes": _stripes,
    "vertical stripes": _stripes,
    "diagonal stripes": _stripes,
    "checkerboard": _checkerboard,
    "polka dots": _dots,
    "concentric rings": _rings,
    "grid lines": _grid,
    "zigzag": _zigzag,
    "grainy noise": _grain,
    "smooth blotches": _blotches,
    "bricks": _bricks,
    "sunburst rays": _rays,
}
