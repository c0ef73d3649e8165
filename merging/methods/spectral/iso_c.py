"""Iso-C: the sum of the task vectors with all its singular values made equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine, decompositions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2502.04959",
    code="danielm1405/iso-merging@d34010af",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base",),
    spectral=True,
)
def iso_c(x: Slot) -> Tensor:
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
    return decompositions.evened(combine.plain_update(x, "sum"))
