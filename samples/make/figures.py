"""Drawn figures: twelve shapes, one to six discs to count, a needle in eight directions, regular polygons and stars.

Figures are drawn as grey masks three times too large and averaged down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from make.catalogue import CLASSNAMES
from make.drawing import IMAGE_SIZE, outline, paint, shrink

Point = tuple[float, float]

_LARGE = 3 * IMAGE_SIZE  # pixels a side of a mask before it is averaged down


def shapes(n: int, rng: np.random.Generator, pretraining: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """n pictures (n, 36, 36, 3) uint8 and their classes (n), the classes in turn.

    The task differs from pre-training: its shapes are outlines on blotches, those of pre-training are filled.
    """
    names = CLASSNAMES["shapes"]
    labels = np.arange(n) % len(names)
    masks = np.stack([shrink(_shape(names[label], rng, pretraining)) for label in labels])
    return paint(masks, rng, "mix" if pretraining else "blotches"), labels


def counts(n: int, rng: np.random.Generator, pretraining: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """n pictures (n, 36, 36, 3) uint8 of one to six discs, and their classes (n), the classes in turn.

    The task differs from pre-training: its discs are rings on blotches.
    """
    labels = np.arange(n) % len(CLASSNAMES["counts"])
    masks = np.stack([_drawn(_discs(label + 1, rng), pretraining) for label in labels])
    return paint(masks, rng, "mix" if pretraining else "blotches"), labels


def directions(n: int, rng: np.random.Generator, pretraining: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """n pictures (n, 36, 36, 3) uint8 of a needle, and their classes (n), the classes in turn.

    The task differs from pre-training: its needles are outlines in two colours.
    """
    labels = np.arange(n) % len(CLASSNAMES["directions"])
    masks = np.stack([_drawn(_needle(int(label), rng), pretraining) for label in labels])
    return paint(masks, rng, "mix" if pretraining else "duo"), labels


def polygons(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n pictures (n, 36, 36, 3) uint8 of regular polygons and stars, and their classes (n), the classes in turn.

    They are turned by any angle, light on black.
    """
    labels = np.arange(n) % len(CLASSNAMES["polygons"])
    masks = np.stack([shrink(_polygon(CLASSNAMES["polygons"][label], rng)) for label in labels])
    return paint(masks, rng, "board"), labels


def _drawn(mask: Image.Image, filled: bool) -> np.ndarray:
    return shrink(mask if filled else outline(mask, 5))


@dataclass(frozen=True)
class _Pen:
    """Draws in a figure's own coordinates: centre 0, radius 1, y downwards."""

    draw: ImageDraw.ImageDraw
    centre: Point  # pixels
    radius: float  # pixels
    angle: float  # radians

    def polygon(self, points: Sequence[Point]) -> None:
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in points]
        (cx, cy), r = self.centre, self.radius
        self.draw.polygon([(cx + r * x, cy + r * y) for x, y in turned], fill=255)

    def disc(self, x: float, y: float, radius: float, fill: int = 255) -> None:
        """Centre (x, y) is not turned."""
        (cx, cy), r = self.centre, self.radius
        cx, cy = cx + r * x, cy + r * y
        self.draw.ellipse((cx - r * radius, cy - r * radius, cx + r * radius, cy + r * radius), fill=fill)


def _shape(name: str, rng: np.random.Generator, pretraining: bool) -> Image.Image:
    mask, draw = _mask()
    radius = rng.uniform(36, 46) if pretraining else rng.uniform(26, 42)
    cx, cy = _LARGE / 2 + rng.uniform(-6, 6, 2)
    pen = _Pen(draw, (cx, cy), radius, math.radians(rng.uniform(-12, 12)))
    if name in _POLYGONS:
        pen.polygon(_POLYGONS[name])
    else:
        _ROUND[name](pen)
    return mask if pretraining else outline(mask, 5)


def _mask() -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", (_LARGE, _LARGE))
    return mask, ImageDraw.Draw(mask)


def _circle(pen: _Pen) -> None:
    pen.disc(0, 0, 1)


def _ring(pen: _Pen) -> None:
    pen.disc(0, 0, 1)
    pen.disc(0, 0, 0.6, fill=0)


def _crescent(pen: _Pen) -> None:
    pen.disc(0, 0, 1)
    pen.disc(0.45 * math.cos(pen.angle), 0.45 * math.sin(pen.angle), 0.85, fill=0)


def _star_points() -> list[Point]:
    """Five points: the corners lie on two circles in turn."""
    corners = [(1.05 if i % 2 == 0 else 0.42, i * math.pi / 5) for i in range(10)]
    return [(r * math.sin(angle), -r * math.cos(angle)) for r, angle in corners]


def _heart_points() -> list[Point]:
    """A heart curve: https://mathworld.wolfram.com/HeartCurve.html"""
    turns = np.linspace(0, 2 * math.pi, 60)
    return [(0.062 * 16 * math.sin(t) ** 3, -0.062 * _heart_height(t)) for t in turns]


def _heart_height(t: float) -> float:
    return 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)


_ROUND: dict[str, Callable[[_Pen], None]] = {"circle": _circle, "ring": _ring, "crescent": _crescent}

_POLYGONS: dict[str, list[Point]] = {
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "star": _star_points(),
    "cross": [
        (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
        (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
    ],
    "heart": _heart_points(),
    "diamond": [(0, -1.05), (0.7, 0), (0, 1.05), (-0.7, 0)],
    "arrow": [(-1, -0.25), (0.15, -0.25), (0.15, -0.75), (1, 0), (0.15, 0.75), (0.15, 0.25), (-1, 0.25)],
    "hourglass": [(-0.8, -1), (0.8, -1), (0, 0), (0.8, 1), (-0.8, 1), (0, 0)],
    "lightning bolt": [
        (0.25, -1), (-0.6, 0.15), (-0.05, 0.15), (-0.3, 1), (0.6, -0.2), (0.05, -0.2), (0.45, -1),
    ],
}  # fmt: skip


def _polygon(name: str, rng: np.random.Generator) -> Image.Image:
    mask, draw = _mask()
    cx, cy = _LARGE / 2 + rng.uniform(-6, 6, 2)
    pen = _Pen(draw, (cx, cy), rng.uniform(30, 46), rng.uniform(0, 2 * math.pi))
    corners, inner = _REGULAR[name]
    turns = np.arange(2 * corners) * math.pi / corners
    radii = np.where(np.arange(2 * corners) % 2 == 0, 1.0, inner)
    pen.polygon([(r * math.sin(turn), -r * math.cos(turn)) for r, turn in zip(radii, turns)])
    return mask


# The number of corners, and the radius of the points between them.
_REGULAR = {
    **{name: (n, math.cos(math.pi / n)) for name, n in
       (("triangle", 3), ("square", 4), ("pentagon", 5), ("hexagon", 6), ("octagon", 8))},
    "five-pointed star": (5, 0.5),
    "six-pointed star": (6, 0.6),
    "eight-pointed star": (8, 0.65),
}  # fmt: skip


def _discs(count: int, rng: np.random.Generator) -> Image.Image:
    """Discs of one radius that do not touch."""
    mask, draw = _mask()
    radius = rng.uniform(11, 14)
    for x, y in _apart(count, radius, rng):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return mask


def _apart(count: int, radius: float, rng: np.random.Generator) -> list[Point]:
    """Random centres; begun anew when a placement leaves no room."""
    centres: list[Point] = []
    tries = 0
    while len(centres) < count:
        x, y = rng.uniform(radius + 1, _LARGE - 1 - radius, 2)
        tries += 1
        if tries > 600:
            centres, tries = [], 0
        if all(math.hypot(x - a, y - b) > 2 * radius + 5 for a, b in centres):
            centres.append((x, y))
    return centres


def _needle(direction: int, rng: np.random.Generator) -> Image.Image:
    """A triangle that points in one of eight directions, clockwise from the east."""
    mask, draw = _mask()
    angle = direction * math.pi / 4 + rng.uniform(-0.25, 0.25)
    cx, cy = _LARGE / 2 + rng.uniform(-5, 5, 2)
    corners = [(44, angle), (20, angle + 2.2), (20, angle - 2.2)]  # pixels from the centre, radians
    draw.polygon([(cx + r * math.cos(turn), cy + r * math.sin(turn)) for r, turn in corners], fill=255)
    return mask
