"""STAR: task vectors cut to low rank, their singular values rescaled to the sum they had, and averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="spectral",
    paper="2502.10339",
    code="IBM/STAR",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    beside=lambda rows, columns, experts: 5 * rows * columns,
)
def star(
    x: Slot,
    *,
    energy: Annotated[float, Gt(0), Le(1)] = 0.4,
    scale: float = 1.0,
    keys: Keys = "block_linear",
) -> Tensor:
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
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "mean")

    def update() -> Tensor:
        sum_MN = torch.zeros_like(base)
        for t in range(len(x.experts)):
            energy_L, left_ML, right_NL = spectral.factors(x, t, base, "pretrained", None, torch.float64)
            size_L = energy_L.sqrt()
            k = spectral.rank_for_energy(size_L, energy)
            kept = size_L[:k].sum()
            if kept > 0:
                sum_MN.addmm_(left_ML[:, :k], right_NL[:, :k].T, alpha=float(size_L.sum() / kept))
        return sum_MN.div_(len(x.experts))

    return torch.add(base, x.share(("star", energy), update), alpha=scale)
