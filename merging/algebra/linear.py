"""Gram matrices, cosine transforms and ranks, in float64.

Shape suffixes: M rows out, N columns in, R = min(M, N) the smaller side, K kept directions. On the CPU the steps are
SciPy's (OpenBLAS), on an accelerator torch's.
"""

from __future__ import annotations

from math import pi
from typing import TYPE_CHECKING, Sequence

from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_GPU_BLOCK = 256  # columns of a block of a Gram matrix on an accelerator


def gram(a_MN: Tensor) -> Tensor:
    """Gram matrix of the smaller side, (R, R) float64; only its lower triangle is valid. (T, M, N) gives (T, R, R)."""
    return inner(a_MN if a_MN.shape[-2] >= a_MN.shape[-1] else a_MN.mT)


def inner(a_MN: Tensor) -> Tensor:
    """A^T A, (N, N) float64; only its lower triangle is valid. (T, M, N) gives (T, N, N)."""
    a_MN = a_MN.double()
    if on_cpu(a_MN) and a_MN.numel():  # BLAS complains of empty matrices
        from scipy.linalg import blas

        if a_MN.is_contiguous():
            return torch.from_numpy(blas.dsyrk(1.0, a_MN.numpy().T, trans=0, lower=1))
        return torch.from_numpy(blas.dsyrk(1.0, a_MN.numpy(), trans=1, lower=1))
    side = a_MN.shape[-1]
    inner_NN = a_MN.new_zeros(*a_MN.shape[:-2], side, side)
    for start in range(0, side, _GPU_BLOCK):
        stop = start + _GPU_BLOCK
        inner_NN[..., start:stop, :stop] = a_MN[..., start:stop].mT @ a_MN[..., :stop]
    return inner_NN


def mirrored(lower_NN: Tensor) -> Tensor:
    """The symmetric matrix of a lower triangle, in its place."""
    return lower_NN.tril_().add_(lower_NN.tril(-1).T)


def outer(y_NN: Tensor) -> Tensor:
    """Y Y^T."""
    return mirrored(inner(y_NN.T))


def dct(a_MN: Tensor, inverse: bool = False) -> Tensor:
    """The orthonormal DCT-II of each row of a float64 matrix, or what it undoes: (M, N)."""
    if on_cpu(a_MN):
        from scipy import fft

        return torch.from_numpy((fft.idct if inverse else fft.dct)(a_MN.numpy(), norm="ortho"))
    place_N = torch.arange(a_MN.shape[1], dtype=a_MN.dtype, device=a_MN.device)
    basis_NN = torch.cos(pi / len(place_N) * (place_N[:, None] + 0.5) * place_N) * (2 / len(place_N)) ** 0.5
    basis_NN[:, 0] /= 2**0.5
    return a_MN @ (basis_NN.T if inverse else basis_NN)


def rank_of(fraction: float, shape: Sequence[int], rounding: str = "floor") -> int:
    """max(1, int(fraction * min(M, N))), truncated in double precision as the official CART code does.

    `ceil` rounds up, from a thousandth on, as the official SWUDI code does.
    """
    return max(1, int(fraction * min(shape) + (0.999 if rounding == "ceil" else 0)))


def rank_for_energy(energy_R: Tensor, share: float) -> int:
    """The smallest rank whose squared singular values hold `share` of their sum."""
    held = energy_R.cumsum(0) / energy_R.sum().clamp(min=torch.finfo(energy_R.dtype).tiny)
    return min(int((held < share).sum()) + 1, len(energy_R))
