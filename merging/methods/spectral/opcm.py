"""OPCM: experts merged one after the other, each without what the merge before it already uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from mergeline.merging.algebra import combine, decompositions, directions
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.methods.contract import Look, method

if TYPE_CHECKING:
    from torch import Tensor


def rescale(views: Views, *, threshold: float) -> float:
    """The mean norm of the task vectors over that of their sum, over the whole model."""

    def energies(view: View) -> list[float]:
        found = [0.0] * (views.experts + 1)
        for x in view.blocks("tensor" if view.is_matrix else "element"):
            summed = accumulated(x, threshold) if view.is_matrix else combine.plain_update(x, "sum")
            parts = [*(expert - x.reference for expert in x.experts), summed]
            found = [all + float(part.double().square().sum()) for all, part in zip(found, parts)]
        return found

    *taus, merged = (sum(parts) ** 0.5 for parts in zip(*views.each(energies)))
    return sum(taus) / len(taus) / merged if merged else 0.0


@method(
    paper="2501.09522",
    code="tanganke/fusion_bench@54c9e8c9",
    keys="block_linear+proj",
    other=lambda x, threshold: x.found * combine.plain_update(x, "sum"),
    needs=("base",),
    measure=Look(rescale, over="model"),
    spectral=lambda rows, columns, experts: 12 * rows * columns,
)
def opcm(x: Slot, *, threshold: Annotated[float, Gt(0), Lt(1)] = 0.5) -> Tensor:
    """base + S, rescaled to the mean norm of the task vectors; S grows by each expert's part that is orthogonal to it.

    In a basis of singular vectors of S so far, the new task vector loses its diagonal, and the block of the leading
    directions that hold `threshold` of the sum of singular values; other tensors add it whole. The official code
    rescales after every expert, which cancels but for the last; it leaves parameters outside of leaf modules at the
    first expert's, here all are merged.

    Formula:
        W₁ = τ₁;  Wₜ = Wₜ₋₁ + U Z Vᵀ, where U S Vᵀ = Wₜ₋₁ and
        Z = Uᵀ τₜ V without its diagonal and its leading block, which holds threshold of the sum of S
        θ₀ + W_T · (mean of ‖τₜ‖) / ‖W_T‖, norms over the whole model
    Parameters:
        threshold: share of the sum of singular values whose directions are protected
    Spectral work:
        a full decomposition of every matrix and expert but the first, twice: the pre-pass needs all of them
        for one norm
    Trap:
        The order of the experts changes the result. `threshold` is on singular values, not on their squares.
        Where singular values are equal, what the diagonal removes depends on the basis.
    """
    return x.found * accumulated(x, threshold)


def accumulated(x: Slot, threshold: float) -> Tensor:
    """The sum of what each expert adds to a matrix, before rescaling: (M, N) float64."""
    sum_MN = directions.task_vector(x, 0)
    for t in range(1, len(x.experts)):
        tau_MN = directions.task_vector(x, t)
        u_MK, s_K, v_NK = decompositions.singular_triplets(sum_MN)
        split = int((s_K.cumsum(0) <= threshold * s_K.sum()).sum())
        core_KN = u_MK.T @ tau_MN
        diagonal_K = (core_KN * v_NK.T).sum(1)
        sum_MN.add_(tau_MN).sub_((u_MK[:, split:] * diagonal_K[split:]) @ v_NK[:, split:].T)
        sum_MN.sub_(u_MK[:, :split] @ (core_KN[:split] @ v_NK[:, :split]) @ v_NK[:, :split].T)
    return sum_MN
