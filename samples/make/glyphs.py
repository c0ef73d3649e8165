"""Pictures of letters in many fonts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from make.catalogue import SCRIPTS
from make.drawing import IMAGE_SIZE, outline
from make.fonts import Group, font_groups

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels

_CANVAS = 64  # pixels a side, where a letter is drawn before it is moved into the picture
_FONT_SIZE = 28
_LETTER_SIZE = 27  # pixels in the picture, of a letter's longer side
_LEAST_INK = 2000  # sum of grey levels; what has less is blank


@dataclass(frozen=True)
class Geometry:
    """How all letters of a set are changed, besides the random jitter."""

    slant: float = 0.0  # horizontal shear
    scale: float = 1.0
    turn: float = 0.0  # degrees
    outlined: bool = False
    turn_jitter: float = 4.0  # degrees either way


def glyphs(
    script: str, split: str, n: int, rng: np.random.Generator, geometry: Geometry, work: Path
) -> tuple[np.ndarray, np.ndarray]:
    """n grey masks (n, 36, 36) uint8 and their classes (n), the classes in turn.

    Every picture draws a group of fonts, a family of the group, and a file of the family.
    """
    groups, letters = font_groups(work, script, split), SCRIPTS[script].letters
    masks: list[np.ndarray] = []
    while len(masks) < n:
        mask = _glyph(letters[len(masks) % len(letters)], groups, rng, geometry)
        if mask is not None and mask.sum() >= _LEAST_INK:
            masks.append(mask)
    return np.stack(masks), np.arange(n) % len(letters)


def _glyph(
    letter: str, groups: list[Group], rng: np.random.Generator, geometry: Geometry
) -> np.ndarray | None:
    group = groups[rng.integers(len(groups))]
    family = group[rng.integers(len(group))]
    file = family[rng.integers(len(family))]
    try:
        return glyph(letter, file, rng, geometry)
    except Exception:  # FreeType has many ways to refuse a font or a letter; another font is drawn then
        return None


def glyph(letter: str, file: str, rng: np.random.Generator, geometry: Geometry) -> np.ndarray | None:
    """A jittered letter, (36, 36) uint8; None if the font shows next to nothing."""
    font = _font(file)
    box = font.getbbox(letter)
    width, height = box[2] - box[0], box[3] - box[1]
    if width < 3 or height < 3:
        return None
    mask = _centred(letter, font, box)
    if geometry.outlined:
        mask = outline(mask, 3)
    matrix = _matrix(max(width, height), rng, geometry)
    middle = IMAGE_SIZE / 2 + rng.uniform(-1.2, 1.2, 2)
    x, y = np.array([_CANVAS / 2, _CANVAS / 2]) - matrix @ middle
    coefficients = (*matrix[0], x, *matrix[1], y)
    return np.asarray(mask.transform((IMAGE_SIZE, IMAGE_SIZE), Image.AFFINE, coefficients, Image.BILINEAR))


@lru_cache(maxsize=600)
def _font(file: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, _FONT_SIZE)


def _centred(letter: str, font: ImageFont.FreeTypeFont, box: Box) -> Image.Image:
    left, top, right, bottom = box
    corner = (_CANVAS / 2 - (right - left) / 2 - left, _CANVAS / 2 - (bottom - top) / 2 - top)
    mask = Image.new("L", (_CANVAS, _CANVAS))
    ImageDraw.Draw(mask).text(corner, letter, fill=255, font=font)
    return mask


def _matrix(size: float, rng: np.random.Generator, geometry: Geometry) -> np.ndarray:
    """From the picture to the canvas, (2, 2), for a letter whose longer side is `size` pixels."""
    scale = size / (_LETTER_SIZE * geometry.scale) * rng.uniform(0.93, 1.1)
    angle = math.radians(geometry.turn + rng.uniform(-geometry.turn_jitter, geometry.turn_jitter))
    slant = geometry.slant + rng.uniform(-0.06, 0.06)
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    return scale * rotation @ np.array([[1, slant], [0, 1]])
