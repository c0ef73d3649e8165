"""bitsandbytes' 4 bits: a table of 16 floats (NF4 or FP4), and a largest magnitude for a block of elements.

https://arxiv.org/abs/2305.14314; as `bitsandbytes.functional.dequantize_4bit` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Nested:
    """Magnitudes that are quantised themselves: codes of a table, times that of their block, plus an offset."""

    table: TensorInfo
    largest: TensorInfo
    block: int
    offset: float


@dataclass(frozen=True)
class NormalFloatTensor(QuantisedTensor):
    """table[code] * largest, block by block of the flattened tensor.

    parts: codes, two in a byte, that of the high four bits first; magnitudes of blocks; the table (16).
    """

    block: int
    nested: Nested | None = None

    @property
    def width(self) -> int:
        return self.block

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        codes, largest, table = self.parts[:3]
        last = min(last, largest.shape[0])
        start, stop = first * self.block, min(last * self.block, prod(self.shape))
        byte = elements(codes, start // 2, -(-stop // 2)).view(torch.uint8)
        pairs = torch.stack([byte >> 4, byte & 15], dim=1).int().flatten()[: stop - start]
        values = elements(table, 0, 16).float().index_select(0, pairs)
        whole = (stop - start) // self.block
        scale = self._largest(elements, first, last)
        values[: whole * self.block].view(whole, self.block).mul_(scale[:whole, None])
        values[whole * self.block :].mul_(scale[whole:] if whole < len(scale) else 1.0)
        return values

    def _largest(self, elements: Elements, first: int, last: int) -> Tensor:
        found = elements(self.parts[1], first, last)
        if self.nested is None:
            return found.float()
        of = torch.arange(first, last) // self.nested.block
        begin = int(of[0]) if len(of) else 0
        blocks = elements(self.nested.largest, begin, int(of[-1]) + 1 if len(of) else 0).float()
        table = elements(self.nested.table, 0, 256).float()
        return table[found.view(torch.uint8).long()] * blocks[of - begin] + self.nested.offset
