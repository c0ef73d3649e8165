"""A tensor of the base as an adapter changes it, in blocks of rows that are computed when they are read.

Shape suffixes: M rows and N columns (all dimensions but the first) of the base's tensor, R the adapter's rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Protocol

from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.computed import ComputedTensor, Elements
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1 << 16  # elements of a block of rows, at least


class Update(Protocol):
    """What an adapter does to one tensor.

    parts: what is read for it. least_rows: how many rows are worth one reading of what all of them need.
    row_axes: how many of the first dimensions count rows: two of packed experts. rank: of a product that is added; None
    if it is none. transposed: the base's tensor is (in, out), as of an embedding or GPT-2's Conv1D. computing_bytes:
    memory that it takes beside blocks of rows.
    """

    @property
    def parts(self) -> tuple[TensorInfo, ...]: ...

    @property
    def row_axes(self) -> int: ...

    @property
    def least_rows(self) -> int: ...

    @property
    def rank(self) -> int | None: ...

    @property
    def computing_bytes(self) -> int: ...

    @property
    def transposed(self) -> bool: ...

    def rows(self, elements: Elements, base_MN: Tensor | None, first: int, last: int) -> Tensor:
        """Rows [first, last) of what becomes of the base's, both float64; alone what is added, if that is None."""

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor] | None:
        """(M, R) and (R, N) in float64, whose product is what is added; None if that is no product."""


@dataclass(frozen=True)
class AdaptedTensor(ComputedTensor):
    """A tensor of the base with an update, in float32 (float64 if the base's is).

    module: PEFT's name of the module; None of bare factors. Rows are computed in blocks that depend on the shapes
    alone, so that their bits do not depend on what is read.
    """

    base: TensorInfo | None  # None: what is added alone
    update: Update
    module: str | None = None
    is_embedding: bool = False  # PEFT has it as an embedding, not a linear layer

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        return self.bytes_in(lambda file: True)

    def bytes_in(self, counts: Callable[[Path], bool]) -> int:
        return sum(part.bytes_in(counts) for part in (self.base, *self.update.parts) if part)

    @property
    def computing_bytes(self) -> int:
        return self.update.computing_bytes

    @property
    def rank(self) -> int | None:
        """Of what is added to what the base has; None if that is no product."""
        return None if isinstance(self.base, AdaptedTensor) else self.update.rank

    @property
    def transposed(self) -> bool:
        """Whether the tensor is (in, out)."""
        return self.update.transposed

    def read(self, elements: Elements, start: int, stop: int) -> Tensor:
        width = self._width
        # as many rows as it takes to read once for them what all rows need
        step = max(self.update.least_rows, -(-_BLOCK // max(width, 1))) * width
        parts = []
        for first in range(start // step * step, stop, step) if step else ():
            block = vars(self._last).pop("block", None)
            if block is None or block[0] != first:
                last = min(first + step, prod(self.shape))
                block = (first, self._rows(elements, first // width, last // width))
            if first + step < prod(self.shape):
                self._last.block = block
            parts.append(block[1][max(start - first, 0) : stop - first])
        self._noted()
        if not parts:
            return elements(self.update.parts[0], 0, 0).to(self._dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def factors(self, elements: Elements) -> tuple[Tensor, Tensor] | None:
        """(M, R) and (R, N) in float64, whose product is what is added to the base; None if that is no product."""
        return None if self.rank is None else self.update.factors(elements)

    @property
    def _width(self) -> int:
        return prod(self.shape[self.update.row_axes :])

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "F64" else torch.float32

    def _rows(self, elements: Elements, first: int, last: int) -> Tensor:
        width, base_MN = self._width, None
        if self.base:
            read = self.base.read(elements, first * width, last * width)
            base_MN = read.to(torch.float64, copy=True).reshape(-1, width)  # updates write into it
        return self.update.rows(elements, base_MN, first, last).to(self._dtype).reshape(-1)


def adapted(
    name: str,
    base: TensorInfo | None,
    shape: tuple[int, ...],
    update: Update,
    module: str | None = None,
    is_embedding: bool = False,
) -> AdaptedTensor:
    """The tensor `name` of a base with an update; float64 if the base's is, or what is added where there is none."""
    kinds = {part.dtype for part in ([base] if base else update.parts)}
    dtype = "F64" if "F64" in kinds else "F32"
    at = update.parts[-1]
    return AdaptedTensor(name, dtype, shape, at.file, at.start, at.stop, base, update, module, is_embedding)


def added_rank(info: TensorInfo, base: TensorInfo | None) -> int | None:
    """The rank of what an adapter adds to a tensor of the base, 0 if it leaves it; None if it is no product."""
    if info is base:
        return 0
    return info.rank if isinstance(info, AdaptedTensor) else None
