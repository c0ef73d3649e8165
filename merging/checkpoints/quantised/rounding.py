"""Floats rounded to the format of a quantised tensor, with new scales from the largest magnitude of each block.

For formats that are a plain rounding: FP8 with scales of the tensor, of rows, columns or blocks; MXFP8; MXFP4, also of
packed experts. Powers of two of groups of 32 are those of OCP Microscaling Formats 1.0, section 6.3: the power of the
largest magnitude over that of the largest code, which may clip; others are as large as to clip nothing.

Shape suffixes: M rows and N columns that are rounded together, S and T rows and columns of their grid of scales.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from mergeline.merging.checkpoints.checkpoint import DTYPES, TensorInfo
from mergeline.merging.checkpoints.quantised.fp4 import FP4Tensor, PackedExpertsTensor, unpacked
from mergeline.merging.checkpoints.quantised.scaled import MX_GROUP, Grid, ScaledTensor
from mergeline.merging.checkpoints.quantised.tensor import floats
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
_FP4_LARGEST = 6.0
_E2M1_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # halfway from each magnitude to the next
_AT_ONCE = 1 << 18  # elements of rows that have scales of their own


def is_plain_rounding(info: TensorInfo) -> bool:
    """Whether floats can be rounded to the format of a tensor as they come, without data or search."""
    if isinstance(info, FP4Tensor):
        return info.whole is None
    if isinstance(info, ScaledTensor):
        plain = info.zero is None and info.factor == 1.0 and info.parts[1].dtype != "F64"
        return plain and info.parts[0].dtype in _LARGEST
    return isinstance(info, PackedExpertsTensor)


def rows_together(form: TensorInfo) -> int:
    """The rows, all but the last dimension, that are rounded together: those of a block, or of a whole matrix."""
    rows = (1, 1, *form.shape)[-2]
    if isinstance(form, PackedExpertsTensor):
        return rows
    assert isinstance(form, ScaledTensor)
    down = form.grid.block[0]
    if down == 1:
        return min(max(_AT_ONCE // max(form.width, 1), 1), rows)
    if form.grid.rows == 1 and not form.grid.batched:
        return prod(form.shape[:-1])
    return down


def rounded_rows(form: TensorInfo, values_MN: Tensor) -> tuple[list[Tensor], Tensor]:
    """What is stored for rows that are rounded together, part by part, and what it stands for, float32 (M, N)."""
    if isinstance(form, PackedExpertsTensor):
        codes, scale, read = _rounded(values_MN.T.contiguous(), (1, MX_GROUP), "F4", form.parts[1].dtype)
        return [_stored(codes, form.parts[0]), _stored(scale, form.parts[1])], read.T
    assert isinstance(form, ScaledTensor)
    weight, scales = form.parts[:2]
    grid: Grid = form.grid
    down = grid.block[0] if grid.block[0] == 1 or grid.rows > 1 or grid.batched else len(values_MN)
    kind = "F4" if isinstance(form, FP4Tensor) else weight.dtype
    codes, scale, read = _rounded(values_MN, (down, grid.block[1]), kind, scales.dtype)
    return [_stored(codes, weight), _stored(scale, scales)], read


def _stored(part: Tensor, info: TensorInfo) -> Tensor:
    return part.view(getattr(torch, DTYPES[info.dtype][0])) if part.dtype.itemsize == 1 else part


def _rounded(
    values_MN: Tensor, block: tuple[int, int], kind: str, scale_dtype: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales (S, T), and what they stand for."""
    rows, columns = values_MN.shape
    down, across = block
    whole = -(-rows // down) * down, -(-columns // across) * across
    padded = torch.zeros(whole, dtype=torch.float32)
    padded[:rows, :columns] = values_MN
    blocks = padded.view(whole[0] // down, down, whole[1] // across, across)
    most = _LARGEST.get(kind, _FP4_LARGEST)
    scale_ST = _scales(blocks.abs().amax((1, 3)), most, scale_dtype, block == (1, MX_GROUP))
    factors = floats(scale_ST, scale_dtype)[:, None, :, None]
    blocks.div_(factors).clamp_(-most, most)
    if kind == "F4":
        codes = _fp4(padded)
        padded.copy_(unpacked(codes))
        codes = codes[:rows, : columns // 2].contiguous()
    else:
        codes = padded.to(getattr(torch, DTYPES[kind][0]))
        padded.copy_(codes)
        codes = codes[:rows, :columns].contiguous()
    blocks.mul_(factors)
    return codes, scale_ST, padded[:rows, :columns]


def _scales(largest_ST: Tensor, most: float, dtype: str, group: bool) -> Tensor:
    """Scales in their stored dtype; 1 where all elements are zero."""
    if dtype not in ("U8", "F8_E8M0"):
        stored = getattr(torch, DTYPES[dtype][0])
        tiny = torch.finfo(stored).tiny
        scale = (largest_ST / most).to(stored)
        return torch.where(largest_ST > 0, scale.float().clamp_min(tiny), 1.0).to(stored)
    if group:
        power = torch.frexp(largest_ST).exponent - torch.frexp(torch.tensor(most)).exponent
    else:
        mantissa, power = torch.frexp(largest_ST / most)
        power = power - (mantissa == 0.5).int()  # a power of two itself
    return torch.where(largest_ST > 0, power.clamp(-127, 127) + 127, 127).to(torch.uint8)


def _fp4(values: Tensor) -> Tensor:
    """The nearest codes of E2M1, ties to even, two in a byte."""
    between = torch.tensor(_E2M1_BETWEEN)
    size = values.abs()
    code = torch.bucketize(size, between, out_int32=True)
    tie = size == between[code.clamp(max=6)]
    code += (tie & (code % 2 == 1)).int()
    code = (code + 8 * torch.signbit(values).int()).to(torch.uint8)
    return code[:, ::2] | code[:, 1::2] << 4
