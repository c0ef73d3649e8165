"""What all quantised tensors share: rows that are computed from stored parts, whatever stretch is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import DTYPES, TensorInfo
from mergeline.merging.checkpoints.computed import ComputedTensor, Elements
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_AT_ONCE = 1 << 19  # elements that are computed at once, about
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class QuantisedTensor(ComputedTensor):
    """Floats that are computed from stored `parts` as they are read, in float32; written, they are bfloat16.

    Every element is computed from its own code and scales alone, so that its bits do not depend on what is read.
    """

    parts: tuple[TensorInfo, ...]

    @property
    def nbytes(self) -> int:
        """What is read for it."""
        return sum(part.nbytes for part in self.parts)

    @property
    def read_as(self) -> str:
        return "F32"

    @property
    def width(self) -> int:
        """Elements of a row: what is computed together."""
        return prod(self.shape[1:])

    @property
    def step(self) -> int:
        """Rows of which so many are computed together."""
        return 1

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        """Rows [first, last), float32, flattened or not; `first` is a multiple of `step`."""
        raise NotImplementedError

    def read(self, elements: Elements, start: int, stop: int) -> Tensor:
        out = torch.empty(stop - start, dtype=torch.float32)
        unit, at, total = self.width * self.step, start, prod(self.shape)
        while at < stop:
            first, begun = at // unit * unit, vars(self._last).get("rows")
            if begun is None or not begun[0] <= at < begun[0] + len(begun[1]):
                most = max(_AT_ONCE // unit, 1) * unit
                end = min(first + most, -(-stop // unit) * unit, total)
                begun = first, self.rows(elements, first // self.width, -(-end // self.width)).flatten()
            first, values = begun
            end = min(first + len(values), stop)
            out[at - start : end - start] = values[at - first : end - first]
            at = end
            # Of rows that are computed together, the next stretch may want the rest.
            if first + len(values) > stop and self.step > 1:
                self._last.rows = begun
            else:
                vars(self._last).pop("rows", None)
        if stop == total:
            vars(self._last).clear()
        self._noted()
        return out


def rows_across(width: int) -> int:
    """Rows to compute together where the stored matrix lies across: a multiple of 32."""
    return max(-(-_AT_ONCE // max(width, 1)) // 32, 1) * 32


def bad(info: TensorInfo, what: str) -> UserError:
    """The error of a quantised tensor, by its name."""
    return UserError(f"{info.file}: tensor '{info.name}': {what}")


def floats(values: Tensor, dtype: str) -> Tensor:
    """Codes or scales of a stored dtype as float32; bytes are E8M0, powers of two."""
    if dtype not in ("U8", "F8_E8M0", "F8_E4M3", "F8_E5M2"):
        return values.float()
    return _of_bytes(dtype).index_select(0, values.view(torch.uint8).int().flatten()).reshape(values.shape)


@cache
def _of_bytes(dtype: str) -> Tensor:
    """What each byte stands for; a look into a table takes a fifth of what torch takes to convert 8-bit floats.

    E8M0: OCP Microscaling Formats 1.0, 5.4.1, where 255 is NaN.
    """
    if dtype in ("F8_E4M3", "F8_E5M2"):
        return torch.arange(256, dtype=torch.uint8).view(getattr(torch, DTYPES[dtype][0])).float()
    powers = torch.tensor([2.0 ** (e - 127) for e in range(255)] + [float("nan")], dtype=torch.float64)
    return powers.float()


@cache
def fp4_pairs() -> Tensor:
    """What each byte stands for, (256, 2): two E2M1 numbers, that of the low four bits first (the same, 5.3.3)."""
    codes = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    byte = torch.arange(256)
    return torch.stack([codes[byte & 15], codes[byte >> 4]], dim=1)
