"""SVC: the singular values of a merge calibrated where tasks were counted more than once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import decompositions, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Positive

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2602.05536",
    code="tanganke/fusion_bench@54c9e8c9",
    keys="matrices",
    other="inner",
    needs=("base",),
    spectral=lambda rows, columns, experts: 10 * rows * columns,
)
def svc(x: Slot, merge: Inner, *, inner: str = "task_arithmetic", alpha: Positive = 0.1) -> Tensor:
    """What another method adds to the base, each singular value of it times T / sum over tasks of max(alpha, c_t).

    c_t = <u^T W, u^T tau_t> / |u^T tau_t|^2 says how much of task t's own response in the left direction u the merged
    W gives back: more than 1 where tasks add up. A task without a response there counts as alpha. Tensors that are no
    matrices stay as merged. The inner method's parameters stand beside these.

    Formula:
        U S Vᵀ = W, what the inner method adds;  cₜᵢ = ⟨uᵢᵀ W, uᵢᵀ τₜ⟩ / ‖uᵢᵀ τₜ‖²
        θ₀ + Σᵢ (T / Σₜ max(alpha, cₜᵢ)) · uᵢ uᵢᵀ W
    Parameters:
        alpha: the least response that counts
    Spectral work:
        a full decomposition a matrix
    Trap:
        The scale of the inner method cancels in matrices, but for directions where `alpha` bounds a response;
        other tensors keep it. Where `inner` makes all singular values equal, as `iso_c` does, rounding chooses the
        directions that are scaled.
    """
    update_MN = merge.update()
    u_MK, _, _ = decompositions.singular_triplets(update_MN)
    response_KN = u_MK.T @ update_MN
    counted_K = torch.zeros_like(response_KN[:, 0])
    for t in range(len(x.experts)):
        own_KN = u_MK.T @ directions.task_vector(x, t)
        share_K = (response_KN * own_KN).sum(1) / own_KN.square().sum(1)
        counted_K += share_K.nan_to_num(0.0).clamp(min=alpha)
    factor_K1 = (len(x.experts) / counted_K)[:, None]
    return update_MN + u_MK @ (response_KN * (factor_K1 - 1))
