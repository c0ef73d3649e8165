"""KnOTS: task vectors merged in the basis of their common singular vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import Factors, method
from mergeline.merging.methods.parameters import NotNegative, Rate
from mergeline.merging.methods.wrapper.dare import drop

if TYPE_CHECKING:
    from torch import Tensor


def rotate(x: Slot, *, threshold: float, drop_rate: float, **_: Any) -> Slot:
    """Each task vector in the common basis, around zero; with a random share of the entries dropped."""
    basis_MK = _basis(x, threshold)
    shape = basis_MK.shape[1], x.shape[1]
    seen = x.replaced(
        shape,
        torch.zeros(shape, dtype=x.dtype, device=basis_MK.device),
        lambda t: (basis_MK.T @ directions.task_vector(x, t)).to(x.dtype),
    )
    return drop(seen, drop_rate=drop_rate, masks="drawn", rescale=True) if drop_rate else seen


def _basis(x: Slot, threshold: float) -> Tensor:
    """The left singular vectors, of all task vectors side by side, that count: (M, K)."""
    energy_K, left_MK = x.once(directions.common_directions)
    return left_MK[:, energy_K > threshold**2]


def _factors(x: Slot, merge: Inner, *, threshold: float, **_: Any) -> tuple[Tensor, Tensor]:
    basis_MK = _basis(x, threshold)
    return basis_MK, merge.weights().double() if basis_MK.shape[1] else x.reference.double()[:0]


@method(
    paper="2410.19735",
    code="gstoica27/KnOTS@baa35e85",
    keys="block_linear",
    needs=("base",),
    transform=rotate,
    inner_defaults={"scale": 0.6},
    spectral=lambda rows, columns, experts: 12 * rows * columns + 6 * rows**2,
    factors=Factors(_factors),
)
def knots(
    x: Slot,
    merge: Inner,
    *,
    inner: Literal["ties", "task_arithmetic", "average"] = "ties",
    drop_rate: Rate = 0.0,
    threshold: NotNegative = 1e-5,
) -> Tensor | None:
    """base + U * another merge of the U^T tau_t, U S [V_1 ... V_T]^T the task vectors side by side; others: base.

    Singular values up to `threshold` are left out. The inner method sees all matrices rotated like this, and its
    parameters stand beside these; its `scale` is 0.6 unless it is given. `drop_rate` drops entries of what it sees, as
    dare does. A pre-pass of the inner method decomposes each matrix several times unless there is a factor store.

    Formula:
        U S [V₁ … V_T]ᵀ = [τ₁ … τ_T], the task vectors side by side, where S > threshold
        θ₀ + U · inner merge of the (Uᵀ τₜ)
    Parameters:
        drop_rate: share of the entries of what the inner method sees that is dropped at random, as dare does
        threshold: singular values up to it are left out
    Spectral work:
        an eigendecomposition of the M x M sum of Gram matrices, a matrix, at every look of the inner method;
        `--factors` keeps it
    Trap:
        `threshold` is absolute. With task_arithmetic inside, matrices come out as by task_arithmetic alone;
        ties inside trims over the rotated matrices of the whole model. Other tensors stay the base's.
    """
    left_MK, right_KN = _factors(x, merge, threshold=threshold)
    return left_MK @ right_KN if left_MK.shape[1] else None
