"""4-bit floats (E2M1), two in a byte: MXFP4 with a power of two for 32 of them, NVFP4 with an FP8 scale for 16.

What compressed-tensors, ModelOpt and DeepSeek write beside a weight, and gpt-oss for its packed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.checkpoints.quantised.scaled import ScaledTensor
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor, floats, fp4_pairs
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

GROUP, PACKED = 32, 16  # of gpt-oss: numbers with one scale, and the bytes that hold them


def unpacked(packed: Tensor) -> Tensor:
    """The numbers of bytes (.., B) as float32, (.., 2B)."""
    found = fp4_pairs().index_select(0, packed.view(torch.uint8).int().flatten())
    return found.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


@dataclass(frozen=True)
class FP4Tensor(ScaledTensor):
    """code * scale, of packed codes (.., M, N/2) and scales (.., M, N/group).

    whole: a scale of all scales, which they are multiplied by, or divided by if `divides`.
    """

    whole: TensorInfo | None = None
    divides: bool = False

    def codes(self, elements: Elements, first: int, last: int) -> Tensor:
        packed = elements(self.parts[0], first * self.width // 2, last * self.width // 2)
        return unpacked(packed.reshape(-1, self.width // 2))

    def scales(self, elements: Elements, scale_MT: Tensor) -> Tensor:
        if self.whole is None:
            return scale_MT
        whole = elements(self.whole, 0, 1).float()
        return scale_MT / whole if self.divides else scale_MT * whole


@dataclass(frozen=True)
class PackedExpertsTensor(QuantisedTensor):
    """gpt-oss's experts (E, in, out), of blocks (E, out, in/32, 16) and scales (E, out, in/32).

    As `convert_moe_packed_tensors` of transformers gives them. The codes of one expert are kept while it is read.
    """

    @property
    def width(self) -> int:
        return self.shape[2]

    @property
    def step(self) -> int:
        return GROUP

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        scales = self.parts[1]
        _, inputs, outputs = self.shape
        parts, groups = [], inputs // GROUP
        while first < last:
            expert = first // inputs
            end = min(last, (expert + 1) * inputs)
            span = slice((first - expert * inputs) // GROUP, (end - expert * inputs) // GROUP)
            of = expert * outputs * groups, (expert + 1) * outputs * groups
            code = self._codes(elements, of).reshape(outputs, groups, PACKED)[:, span]
            scale = floats(elements(scales, *of).reshape(outputs, groups)[:, span], "F8_E8M0")
            values = unpacked(code) * scale[:, :, None]
            parts.append(values.reshape(outputs, -1).T)
            first = end
        return torch.cat(parts)

    def _codes(self, elements: Elements, of: tuple[int, int]) -> Tensor:
        kept: tuple[tuple[int, int], Tensor] | None = vars(self._last).get("codes")
        if kept is None or kept[0] != of:
            kept = of, elements(self.parts[0], of[0] * PACKED, of[1] * PACKED)
            self._last.codes = kept
        return kept[1]
