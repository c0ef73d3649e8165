"""Integers of few bits in 32-bit words, with a scale and a zero for a group of inputs: GPTQ, AWQ, pack-quantized.

GPTQ (AutoGPTQ, GPTQModel) packs inputs, AWQ (`gemm`) packs outputs in an order of its own, both into a matrix
(inputs, outputs) that lies across ours; compressed-tensors' pack-quantized packs inputs, in rows of outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import TensorInfo
from mergeline.merging.checkpoints.computed import Elements
from mergeline.merging.checkpoints.quantised.tensor import QuantisedTensor, bad, rows_across
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

WORD = 32
_KEPT = 1 << 24  # bytes of a stored matrix that are kept, each of whose rows holds a bit of many of ours
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word each of eight outputs lies


def bits_of(words: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """The numbers of int32 words (.., W) as int32, (.., W * 32 / bits); bits divide 32."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    if order:
        shifts = shifts[list(order)]
    return ((words[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def group_of_inputs(
    elements: Elements, index: TensorInfo | None, inputs: int, group: int, groups: int
) -> Tensor:
    """The group of each input, in order without an index (raises UserError for one that is not there)."""
    if index is None:
        return torch.arange(inputs) // group
    found = elements(index, 0, inputs).long()
    if len(found) and not 0 <= int(found.min()) <= int(found.max()) < groups:
        raise bad(index, f"names groups that are not there, of {groups}; download it again")
    return found


@dataclass(frozen=True)
class AcrossTensor(QuantisedTensor):
    """A weight (out, in) that lies as (in, out): (code - zero) * scale.

    parts: words, words of zeros (groups, ..), scales (groups, out). index: the group of each input; None: in order,
    `group` inputs each.
    """

    bits: int
    group: int
    index: TensorInfo | None = None

    @property
    def step(self) -> int:
        return rows_across(self.width)

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        words, zeros, scales = self.parts[:3]
        span = first * self.bits // WORD, -(-last * self.bits // WORD)
        code = self.codes(elements, words, first, last, span)
        zero = self.zeros(self.columns(elements, zeros, *span))[:, : last - first]
        scale = self.columns(elements, scales, first, last).float()
        of = group_of_inputs(elements, self.index, self.shape[1], self.group, len(scale))
        return ((code - zero[of]).float() * scale[of]).T

    def codes(
        self, elements: Elements, words: TensorInfo, first: int, last: int, span: tuple[int, int]
    ) -> Tensor:
        """The codes (in, last - first); span: of the words that outputs are packed in."""
        raise NotImplementedError

    def zeros(self, words: Tensor) -> Tensor:
        """The zeros (groups, outputs)."""
        raise NotImplementedError

    def columns(self, elements: Elements, info: TensorInfo, first: int, last: int) -> Tensor:
        """Columns [first, last) of a stored matrix; all of it is kept while this tensor is read, if that is little."""
        rows, width = info.shape
        if info.nbytes > _KEPT:
            return torch.stack([elements(info, r * width + first, r * width + last) for r in range(rows)])
        kept: tuple[int, Tensor] | None = vars(self._last).get(info.name)
        if kept is None:
            kept = 0, elements(info, 0, rows * width).reshape(rows, width)
            vars(self._last)[info.name] = kept
        return kept[1][:, first:last]


@dataclass(frozen=True)
class GPTQTensor(AcrossTensor):
    """https://arxiv.org/abs/2210.17323, as AutoGPTQ packs it; off: what is missing in stored zeros, 1 of format 1."""

    off: int = 1

    def codes(
        self, elements: Elements, words: TensorInfo, first: int, last: int, span: tuple[int, int]
    ) -> Tensor:
        found = self.columns(elements, words, first, last)
        return bits_of(found.T.contiguous(), self.bits).T

    def zeros(self, words: Tensor) -> Tensor:
        return bits_of(words, self.bits) + self.off


@dataclass(frozen=True)
class AWQTensor(AcrossTensor):
    """https://arxiv.org/abs/2306.00978, as AutoAWQ packs it for its `gemm` kernels."""

    def codes(
        self, elements: Elements, words: TensorInfo, first: int, last: int, span: tuple[int, int]
    ) -> Tensor:
        return bits_of(self.columns(elements, words, *span).contiguous(), self.bits, _AWQ_ORDER)[
            :, : last - first
        ]

    def zeros(self, words: Tensor) -> Tensor:
        return bits_of(words.contiguous(), self.bits, _AWQ_ORDER)


@dataclass(frozen=True)
class PackedTensor(QuantisedTensor):
    """A weight (out, in) packed in its rows: (code - zero) * scale.

    parts: words (out, in * bits / 32), scales (out, groups), then words of zeros (out * bits / 32, groups), if any.
    """

    bits: int
    group: int
    index: TensorInfo | None = None
    zeros: TensorInfo | None = None

    @property
    def step(self) -> int:
        return WORD

    def rows(self, elements: Elements, first: int, last: int) -> Tensor:
        words, scales = self.parts[:2]
        wide, groups = words.shape[1], scales.shape[1]
        found = elements(words, first * wide, last * wide).reshape(-1, wide)
        code = bits_of(found, self.bits)[:, : self.shape[1]]
        scale = elements(scales, first * groups, last * groups).float().reshape(-1, groups)
        of = group_of_inputs(elements, self.index, self.shape[1], self.group, groups)
        if self.zeros is None:
            zero = torch.full_like(scale, 1 << (self.bits - 1), dtype=torch.int32)
        else:
            span = first * self.bits // WORD, -(-last * self.bits // WORD)
            packed = elements(self.zeros, span[0] * groups, span[1] * groups).reshape(-1, groups)
            zero = bits_of(packed.T.contiguous(), self.bits).T[: last - first]
        return (code - zero[:, of]).float() * scale[:, of]
