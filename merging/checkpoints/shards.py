"""Tensors that lie in chunks: boxes of a tensor of N axes, each stored in a place of its own, and read as one."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Sequence

from mergeline.merging.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_MOST_COMPARED = 1000  # boxes of one tensor that are compared with each other


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, at `offsets` and of `sizes`; its storage is bytes [start, stop) of `file`.

    first: the element of the storage with which the box begins. strides: in elements, all positive.
    """

    file: Path
    start: int
    stop: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    first: int = 0

    @property
    def is_contiguous(self) -> bool:
        return all(
            size == 1 or stride == prod(self.sizes[axis + 1 :])
            for axis, (size, stride) in enumerate(zip(self.sizes, self.strides))
        )


Read = Callable[
    [Chunk, int, "Tensor"], None
]  # the elements of a storage from the second on, into all of the third


def contiguous(file: Path, start: int, stop: int, offsets: Sequence[int], sizes: Sequence[int]) -> Chunk:
    """A chunk that is stored row by row."""
    strides = tuple(prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    return Chunk(file, start, stop, tuple(offsets), tuple(sizes), strides)


def tile(shape: Sequence[int], chunks: Sequence[Chunk]) -> bool:
    """Whether chunks fill a tensor, without a hole or an overlap.

    Raises:
        UserError: they are too many, in a pattern that is no grid.
    """
    boxes = [tuple(zip(chunk.offsets, chunk.sizes)) for chunk in chunks]
    if any(len(box) != len(shape) for box in boxes):
        return False
    if _is_grid(shape, boxes):
        return True
    inside = all(0 <= at and at + size <= of for box in boxes for (at, size), of in zip(box, shape))
    if not inside or sum(prod(size for _, size in box) for box in boxes) != prod(shape):
        return False
    if len(boxes) > _MOST_COMPARED:
        raise UserError(f"{len(boxes)} chunks lie in no grid; save the checkpoint from fewer processes")
    return not any(_overlap(a, b) for i, a in enumerate(boxes) for b in boxes[:i])


_Box = tuple[tuple[int, int], ...]


def _is_grid(shape: Sequence[int], boxes: Iterable[_Box]) -> bool:
    """Whether boxes are cut along the first axis, and what lies between two cuts along the next."""
    boxes = list(boxes)
    if not shape:
        return len(boxes) == 1
    below: dict[tuple[int, int], list[_Box]] = {}
    for box in boxes:
        below.setdefault(box[0], []).append(box[1:])
    end = 0
    for at, size in sorted(below):
        if at != end or size < 1 or not _is_grid(shape[1:], below[at, size]):
            return False
        end = at + size
    return end == shape[0]


def _overlap(a: _Box, b: _Box) -> bool:
    return all(at < other + n and other < at + size for (at, size), (other, n) in zip(a, b))


def gather(out: Tensor, shape: Sequence[int], chunks: Sequence[Chunk], start: int, read: Read) -> None:
    """Elements from `start` on of a tensor of this shape, flattened, into all of `out` (n,).

    Whole rows are read together; of a chunk that is not stored row by row, all that lies between the first and the last
    element of what is asked for.
    """
    if not len(out):
        return
    if not shape:
        read(chunks[0], chunks[0].first, out)
        return
    width, at, stop = prod(shape[1:]), start, start + len(out)
    while at < stop:
        row, within = divmod(at, width)
        into = out[at - start :]
        if within or len(into) < width:  # a part of a row
            into = into[: width - within]
            holding = [c for c in chunks if c.offsets[0] <= row < c.offsets[0] + c.sizes[0]]
            gather(into, shape[1:], [_row(c, row) for c in holding], within, read)
        else:
            into = into[: len(into) // width * width]
            rows = into.view(-1, *shape[1:])
            for chunk in chunks:
                _copy(rows, row, chunk, read)
        at += len(into)


def _row(chunk: Chunk, row: int) -> Chunk:
    """What a chunk has of one row."""
    first = chunk.first + (row - chunk.offsets[0]) * chunk.strides[0]
    rest = chunk.offsets[1:], chunk.sizes[1:], chunk.strides[1:]
    return Chunk(chunk.file, chunk.start, chunk.stop, *rest, first)


def _copy(rows: Tensor, row: int, chunk: Chunk, read: Read) -> None:
    """What a chunk has of rows from `row` on, to its place among them."""
    import torch

    low, high = max(chunk.offsets[0], row), min(chunk.offsets[0] + chunk.sizes[0], row + len(rows))
    if low >= high or 0 in chunk.sizes:
        return
    into = rows[low - row : high - row]
    for axis in range(1, rows.dim()):
        into = into.narrow(axis, chunk.offsets[axis], chunk.sizes[axis])
    first = chunk.first + (low - chunk.offsets[0]) * chunk.strides[0]
    if chunk.is_contiguous and into.is_contiguous():
        read(chunk, first, into.view(-1))
        return
    span = 1 + sum((size - 1) * stride for size, stride in zip(into.shape, chunk.strides))
    stored = torch.empty(span, dtype=rows.dtype)
    read(chunk, first, stored)
    into.copy_(stored.as_strided(into.shape, chunk.strides))
