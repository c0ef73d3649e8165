"""More images than there are: copies, each shifted by a few pixels, which an expert sees anew."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Iterator

from mergeline.merging.lazy import torch
from mergeline.merging.learning.network import Batch, Examples

if TYPE_CHECKING:
    from torch import Tensor

PIXELS = 3
IMAGES = "images"


def have_images(examples: Examples) -> bool:
    """Whether batches hold "images", (B, channels, height, width)."""
    task = next(iter(examples.batches))
    found = next(iter(examples.of(task)), {}).get(IMAGES)
    return isinstance(found, torch.Tensor) and found.ndim == 4


def shifted(examples: Examples, copies: int, seed: int = 0) -> Examples:
    """Each image, and so many copies shifted by up to `PIXELS` in both directions, their borders repeated."""
    batches = {task: partial(_batches, examples, task, copies, seed) for task in examples.batches}
    counts = {task: examples.count(task) * (1 + copies) for task in examples.counts}
    return replace(examples, batches=batches, counts=counts, first=None)


def _batches(examples: Examples, task: str, copies: int, seed: int) -> Iterator[Batch]:
    yield from examples.of(task)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(copies):
        for batch in examples.of(task):
            yield {**batch, IMAGES: _moved(batch[IMAGES], generator)}


def _moved(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    (count, _, height, width), span = images_BCHW.shape, 2 * PIXELS + 1
    wide_BCHW = torch.nn.functional.pad(images_BCHW, (PIXELS,) * 4, mode="replicate")
    starts = torch.randint(span, (count, 2), generator=generator).tolist()
    parts = [
        image[:, top : top + height, left : left + width] for image, (top, left) in zip(wide_BCHW, starts)
    ]
    return torch.stack(parts)
