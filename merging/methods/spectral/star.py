"""STAR: task vectors cut to low rank, their singular values rescaled to the sum they had, and averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2502.10339",
    code="IBM/STAR",
    scale=1.0,
    keys="block_linear",
    other="mean",
    needs=("base",),
    spectral=lambda rows, columns, experts: 5 * rows * columns,
)
def star(x: Slot, *, energy: Share = 0.4) -> Tensor:
    """base + scale * mean over tasks of r_t P_k(tau_t), k the least that holds `energy` of the sum of singular values.

    r_t is the sum of all singular values over that of the k kept. Other tensors add scale * the mean task vector.

    Formula:
        k = the least that holds `energy` of Σ S, U S Vᵀ = τₜ;  rₜ = Σ S / (the sum of the k kept)
        θ₀ + scale · (1/T) Σₜ rₜ P_k(τₜ)
    Parameters:
        energy: share of the sum of singular values that is kept
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert; `--factors` keeps it
    Trap:
        `energy` is of the singular values themselves, not of their squares as in cart.
    """
    sum_MN = torch.zeros_like(x.reference)
    for t in range(len(x.experts)):
        energy_L, left_ML, right_NL = directions.factors(x, t, None, torch.float64)
        size_L = energy_L.sqrt()
        k = linear.rank_for_energy(size_L, energy)
        kept = size_L[:k].sum()
        if kept > 0:
            sum_MN.addmm_(left_ML[:, :k], right_NL[:, :k].T, alpha=float(size_L.sum() / kept))
    return sum_MN.div_(len(x.experts))
