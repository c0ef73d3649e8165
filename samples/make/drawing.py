"""From grey masks to small pictures: colours, noise, outlines."""

from __future__ import annotations

from typing import Callable

import numpy as np
from PIL import Image, ImageFilter

IMAGE_SIZE = 36  # pixels a side

# Background and foreground, 0 to 255, each broadcasting to (N, 36, 36, 3).
Colours = tuple[np.ndarray, np.ndarray]


def outline(mask: Image.Image, width: int) -> Image.Image:
    """The border of a grey mask, `width` (odd) pixels wide."""
    outer, inner = mask.filter(ImageFilter.MaxFilter(width)), mask.filter(ImageFilter.MinFilter(width))
    return Image.fromarray(np.asarray(outer) - np.asarray(inner))


def shrink(mask: Image.Image) -> np.ndarray:
    """A mask drawn large, averaged down to 36 x 36 uint8: that smooths its edges."""
    return np.asarray(mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.BOX))


def blotches(n: int, rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth colours: float32 (n, 36, 36, 3), 0 to 255, from cells x cells random colours enlarged."""
    noise = rng.normal(size=(n, cells, cells, 3)).astype(np.float32)
    small = np.clip(noise * 50 + 128, 0, 255).astype(np.uint8)
    large = [Image.fromarray(a).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC) for a in small]
    return np.stack([np.asarray(image) for image in large]).astype(np.float32)


def paint(masks: np.ndarray, rng: np.random.Generator, style: str) -> np.ndarray:
    """Masks (N, 36, 36) uint8 -> coloured, noisy pictures (N, 36, 36, 3) uint8."""
    colours, noise = _STYLES[style]
    background, foreground = colours(len(masks), rng)
    ink = masks[..., None].astype(np.float32) / 255
    grain = rng.normal(size=(*masks.shape, 1)) * noise
    return np.clip(background * (1 - ink) + foreground * ink + grain, 0, 255).astype(np.uint8)


def _paper(n: int, rng: np.random.Generator) -> Colours:
    """Dark grey on white."""
    return np.full((n, 1, 1, 3), 245.0), rng.uniform(0, 70, (n, 1, 1, 1))


def _board(n: int, rng: np.random.Generator) -> Colours:
    """Light grey on black."""
    return np.full((n, 1, 1, 3), 15.0), rng.uniform(190, 255, (n, 1, 1, 1))


def _blotchy(n: int, rng: np.random.Generator) -> Colours:
    """A colour on smooth colours."""
    background = blotches(n, rng, cells=3)
    return background, _contrasting(background.mean(axis=(1, 2), keepdims=True), rng)


def _duo(n: int, rng: np.random.Generator) -> Colours:
    """A colour on a colour."""
    background = rng.uniform(0, 255, (n, 1, 1, 3))
    return background, _contrasting(background, rng)


def _mix(n: int, rng: np.random.Generator) -> Colours:
    """A colour on white (45 %), on a colour (25 %) or on black (30 %)."""
    colour, kind = rng.uniform(0, 255, (n, 1, 1, 3)), rng.random((n, 1, 1, 1))
    background = np.where(kind < 0.45, 235.0, np.where(kind > 0.7, 25.0, colour))
    return background, _contrasting(background, rng)


def _contrasting(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A dark colour for each bright background and a bright one for each dark: both (N, 1, 1, 3)."""
    dark = rng.uniform(0, 90, (len(background), 1, 1, 3))
    bright = rng.uniform(165, 255, (len(background), 1, 1, 3))
    return np.where(background.mean(-1, keepdims=True) > 128, dark, bright)


# Colours, and the noise's standard deviation in grey levels. Pre-training sees only `mix`.
_STYLES: dict[str, tuple[Callable[[int, np.random.Generator], Colours], float]] = {
    "paper": (_paper, 6),
    "board": (_board, 8),
    "blotches": (_blotchy, 10),
    "duo": (_duo, 12),
    "mix": (_mix, 8),
}
