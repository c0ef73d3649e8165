"""Digits as seven-segment displays show them."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from make.catalogue import CLASSNAMES
from make.drawing import IMAGE_SIZE, paint, shrink

_LARGE = 3 * IMAGE_SIZE  # pixels a side of a mask before it is averaged down

# The ends of the segments a to g, of a display of width 1 and height 2 around its centre.
_ENDS = (
    ((-0.5, -1), (0.5, -1)), ((0.5, -1), (0.5, 0)), ((0.5, 0), (0.5, 1)), ((-0.5, 1), (0.5, 1)),
    ((-0.5, 0), (-0.5, 1)), ((-0.5, -1), (-0.5, 0)), ((-0.5, 0), (0.5, 0)),
)  # fmt: skip
_LIT = ("abcdef", "bc", "abdeg", "abcdg", "bcfg", "acdfg", "acdefg", "abc", "abcdefg", "abcdfg")


def segments(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n pictures (n, 36, 36, 3) uint8 and their classes (n), the classes in turn: slanted, dark on white."""
    labels = np.arange(n) % len(CLASSNAMES["segments"])
    return paint(np.stack([shrink(_display(label, rng)) for label in labels]), rng, "paper"), labels


def _display(digit: int, rng: np.random.Generator) -> Image.Image:
    mask = Image.new("L", (_LARGE, _LARGE))
    draw = ImageDraw.Draw(mask)
    cx, cy = _LARGE / 2 + rng.uniform(-12, 12, 2)
    height, width = rng.uniform(24, 38), rng.uniform(26, 44)  # pixels, of half a display and of a whole one
    slant, turn, thick = rng.uniform(-0.1, 0.4), rng.uniform(-0.35, 0.35), int(rng.integers(5, 11))
    cos, sin = math.cos(turn), math.sin(turn)
    for segment in _LIT[digit]:
        ends = []
        for x, y in _shortened(*_ENDS["abcdefg".index(segment)]):
            x, y = x * width - slant * y * height, y * height
            ends.append((cx + x * cos - y * sin, cy + x * sin + y * cos))
        draw.line(ends, fill=255, width=thick)
    return mask


def _shortened(
    a: tuple[float, float], b: tuple[float, float], gap: float = 0.12
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A gap between a segment and the next."""
    (ax, ay), (bx, by) = a, b
    dx, dy = gap * (bx - ax), gap * (by - ay)
    return (ax + dx, ay + dy), (bx - dx, by - dy)
