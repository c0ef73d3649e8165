"""Initial weights of the patch embedding: low frequencies of the cosine transform, grey and coloured."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from make.model import PATCH, WIDTH, channels_first, normalised

_GREY_FILTERS, _COLOUR_FILTERS = 112, 40  # 112 grey, and 40 in each of two opponent colours: 192 in all
_GAIN = 0.6
_SAMPLE = 1500  # images that the filters' responses are measured on


def patch_filters(images: np.ndarray) -> Tensor:
    """Filters (192, 3, 12, 12), half-whitened on images (N, 36, 36, 3) and mixed by a random rotation."""
    filters = _cosine_filters()
    sample = images[np.random.default_rng(3).permutation(len(images))[:_SAMPLE]]
    responses = F.conv2d(normalised(channels_first(sample)), filters, stride=PATCH)
    spread = responses.transpose(0, 1).reshape(WIDTH, -1).std(1)
    filters = filters / (spread / spread.median()).sqrt()[:, None, None, None] / spread.median()
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))[0]
    return _GAIN * torch.einsum("oi,ichw->ochw", rotation, filters)


def _cosine_filters() -> Tensor:
    """(192, 3, 12, 12), each of norm 1."""
    waves = _cosine_transform(PATCH)
    colours = np.array([[1, 1, 1], [1, -1, 0], [0.5, 0.5, -1]])  # grey, red-green, yellow-blue
    colours = colours / np.linalg.norm(colours, axis=1, keepdims=True)
    pairs = [(a, b) for a in range(PATCH) for b in range(PATCH)]
    lowest = sorted(pairs, key=lambda pair: pair[0] ** 2 + pair[1] ** 2)
    chosen = [(a, b, 0) for a, b in lowest[:_GREY_FILTERS]]
    chosen += [(a, b, colour) for a, b in lowest[:_COLOUR_FILTERS] for colour in (1, 2)]
    filters = [colours[colour][:, None, None] * np.outer(waves[a], waves[b]) for a, b, colour in chosen]
    return torch.tensor(np.stack(filters), dtype=torch.float32)


def _cosine_transform(n: int) -> np.ndarray:
    """The orthonormal DCT-II, (n, n): a row is a frequency."""
    i = np.arange(n)
    scale = np.where(i == 0, n**-0.5, (2 / n) ** 0.5)
    return np.cos(np.pi * (i[None] + 0.5) * i[:, None] / n) * scale[:, None]
