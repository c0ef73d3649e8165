"""Iso-C: the sum of the task vectors with all its singular values made equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
    paper="2502.04959",
    code="danielm1405/iso-merging@d34010af",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
)
def iso_c(x: Slot, *, scale: float = 1.0, keys: Keys = "matrices") -> Tensor:
    """base + scale * (mean singular value) * U V^T of the sum of the task vectors; other tensors: + scale * mean.

    U V^T is the polar factor P, and the nuclear norm is <P, sum>: no SVD is needed.

    Formula:
        U S Vᵀ = Σₜ τₜ;  θ₀ + scale · mean(S) · U Vᵀ
    Spectral work:
        the polar factor of the sum, by one eigendecomposition a matrix
    Trap:
        Where the sum is rank-deficient, as of LoRA experts, the official code gives arbitrary directions full
        weight; here they get none. `scale` multiplies the mean task vector of the other tensors too.
    """
    base = x.base.double()

    def update() -> Tensor:
        total_X = ops.weighted_sum(x.experts).sub_(base, alpha=len(x.experts))
        if not is_matrix(x.name, x.shape, keys):
            return total_X / len(x.experts)
        return spectral.evened(total_X)

    return torch.add(base, x.share(("iso_c", keys), update), alpha=scale)
