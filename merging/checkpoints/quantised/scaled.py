"""8-bit floats and integers with scales: of the tensor, of rows or columns, of blocks, of groups of 32 (MXFP8).

What finegrained FP8 (DeepSeek, Qwen), fbgemm_fp8, compressed-tensors, ModelOpt and bitsandbytes' LLM.int8() write.
Shape suffixes: M rows and N columns, S and T rows and columns of the grid of scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Iterator, Sequence

from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor, bad, floats
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

MX_GROUP = 32
SCALES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "U8")


@dataclass(frozen=True)
class Grid:
    """How scales lie over matrices: (S, T) of blocks of rows and columns, for each matrix if `batched`, or for all."""

    rows: int
    columns: int
    block: tuple[int, int]
    batched: bool = False


def grid_of(weight: TensorInfo, scale: TensorInfo, shape: Sequence[int], block: Sequence[int] | None) -> Grid:
    """Where scales belong, by their shape and the block that the configuration names.

    shape: of the weight, when it is unpacked.

    Raises:
        UserError: a scale of another dtype, or a shape that fits neither the weight nor the block.
    """
    if scale.dtype not in SCALES:
        raise bad(scale, f"scales of dtype {scale.dtype} are not known")
    rows, columns = (1, 1, *shape)[-2:]
    of = list(scale.shape)
    if prod(of) == 1:
        return Grid(1, 1, (max(rows, 1), max(columns, 1)))
    if len(of) == 1 and of[0] == rows:
        of = [rows, 1]
    *lead, down, across = [1, *of] if len(of) == 1 else of
    if lead and list(shape[:-2]) != lead or len(of) not in (2, len(shape)) or not down or not across:
        raise bad(scale, f"its shape {list(scale.shape)} does not fit the weight's, {list(shape)}")
    if len(shape) > 2 and not lead:
        raise bad(scale, f"its shape {list(scale.shape)} does not fit the weight's, {list(shape)}")
    sides = []
    micro = scale.dtype in ("U8", "F8_E8M0") and (down, across) == (rows, -(-columns // MX_GROUP))
    for side, count, given in zip(
        (rows, columns), (down, across), (1, MX_GROUP) if micro else block or (0, 0)
    ):
        if count == 1:
            sides.append(side)
        elif count == side:
            sides.append(1)
        elif type(given) is int and given > 0 and -(-side // given) == count:
            sides.append(given)
        else:
            said = f", in blocks of {list(block)}" if block else "; config.json names no weight_block_size"
            raise bad(scale, f"its shape {list(scale.shape)} does not fit the weight's, {list(shape)}{said}")
    return Grid(down, across, (sides[0], sides[1]), bool(lead))


@dataclass(frozen=True)
class ScaledTensor(QuantisedTensor):
    """(code - zero) * scale * factor: `parts` are codes (.., M, N) and scales (.., S, T), or one scale for all."""

    grid: Grid
    factor: float = 1.0
    zero: TensorInfo | None = None  # the third of the parts, if there is one

    @property
    def width(self) -> int:
        return max(self.shape[-1], 1) if self.shape else 1

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        values_MN = self.codes(elements, first, last)
        if self.zero:
            for values, zero in by_block(
                values_MN, self._of_rows(elements, self.zero, first, last), self.grid
            ):
                values.sub_(zero)
        scale_MT = self._of_rows(elements, self.parts[1], first, last)
        for values, scale in by_block(values_MN, self.scales(elements, scale_MT), self.grid):
            values.mul_(scale)
        return values_MN

    def scales(self, elements: Elements, scale_MT: Tensor) -> Tensor:
        """What codes are multiplied by."""
        return scale_MT if self.factor == 1.0 else scale_MT * self.factor

    def codes(self, elements: Elements, first: int, last: int) -> Tensor:
        """The codes of rows as float32, (last - first, N)."""
        found = elements(self.parts[0], first * self.width, last * self.width)
        return floats(found, self.parts[0].dtype).reshape(-1, self.width)

    def _of_rows(self, elements: Elements, scale: TensorInfo, first: int, last: int) -> Tensor:
        """The scales of rows [first, last), (last - first, T)."""
        return scales_of_rows(elements, scale, self.grid, (1, 1, *self.shape)[-2], first, last)


def scales_of_rows(
    elements: Elements, scale: TensorInfo, grid: Grid, rows: int, first: int, last: int
) -> Tensor:
    """The scales of rows [first, last) of matrices of so many rows, (last - first, T)."""
    row = torch.arange(first, last)
    at = row % max(rows, 1) // grid.block[0]
    if grid.batched:
        at += row // max(rows, 1) * grid.rows
    begin, end = (int(at.min()), int(at.max()) + 1) if len(at) else (0, 0)
    found = elements(scale, begin * grid.columns, end * grid.columns)
    return floats(found, scale.dtype).reshape(-1, grid.columns)[at - begin]


def by_block(values_MN: Tensor, scale_MT: Tensor, grid: Grid) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the values beside the scales that belong to them; they are multiplied, or subtracted, in place."""
    wide = grid.block[1]
    whole = values_MN.shape[1] // wide
    if whole:
        yield values_MN[:, : whole * wide].unflatten(1, (whole, wide)), scale_MT[:, :whole, None]
    if values_MN.shape[1] > whole * wide:
        yield values_MN[:, whole * wide :], scale_MT[:, whole:]
