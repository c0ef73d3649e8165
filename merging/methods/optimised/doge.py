"""DOGE: task vectors moved, outside of the subspace that they share, so that their sum interferes less with each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import decompositions, directions, quadratic, quantiles
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Count, Positive, PositiveCount, Share

if TYPE_CHECKING:
    from torch import Tensor


def trim(views: Views, *, density: float) -> list[float]:
    """The least magnitude kept of each task vector, over all its matrices or one of them."""
    matrices = views.only(lambda view: view.is_matrix)
    if not matrices.views:
        return [0.0] * views.experts
    kth = matrices.elements - int(matrices.elements * density)  # so that one more is kept, as in ties
    if not kth:
        return [0.0] * views.experts
    places = [[kth]] * views.experts
    found = quantiles.kth_smallest(matrices.total, lambda x: x.task_vectors, "element", places)
    return [threshold for [threshold] in found]


@method(
    paper="2501.01230",
    code="tanganke/fusion_bench@54c9e8c9",
    keys="block_linear",
    needs=("base",),
    measure=Look(trim, over=lambda params: "model" if params["scope"] == "global" else "tensor"),
    spectral=lambda rows, columns, experts: 2 * experts * rows * columns,
)
def doge(
    x: Slot,
    *,
    scale: float = 0.07,
    density: Share = 0.3,
    subspace: PositiveCount = 6,
    iterations: Count = 400,
    learning_rate: Positive = 1e-4,
    scope: Literal["global", "tensor"] = "global",
) -> Tensor:
    """base + sum over tasks of l_t * (tau_t + D) where |tau_t| is large, l_t = scale / |tau_t|; other tensors: base.

    D comes from Adam on the sum over tasks and rows of <tau_t, tau_t - sum of l_s (tau_s + D)>^2, with gradients
    outside of the R / `subspace` leading left directions of all tasks' (R / T each).

    Formula:
        Q = the R / subspace leading left directions of [U₁ … U_T], Uₜ the R / T leading ones of τₜ
        lₜ = scale / ‖τₜ‖
        D descends on Σₜ Σ_rows ⟨τₜ, τₜ − Σₛ lₛ (τₛ + D)⟩² with gradients (1 − Q Qᵀ) g
        θ₀ + Σₜ lₜ (τₜ + D) ⊙ [|τₜ| among the density largest]
    Parameters:
        density: share of the entries of a task vector that is kept, of all matrices or each
        scale: the length that each task vector's part gets, whatever its own is
        subspace: the shared directions are this many times fewer than all
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps;
        T products a step
    Trap:
        All that is no block matrix, biases and norms as well, stays the base's. `scale` is divided by norms:
        it is not the scale of other methods.
    """
    shared_MK = x.shared(_shared, subspace).to(x.dtype)
    base_MN = x.base
    assert base_MN is not None
    tau_TMN = torch.stack([expert_MN - base_MN for expert_MN in x.experts])  # as the thresholds were found
    rate_T = torch.stack([scale / size if (size := tau.double().norm()) else size for tau in tau_TMN])
    rate, rate_T = float(rate_T.sum()), rate_T.to(x.dtype)
    gap_TM = (tau_TMN * (tau_TMN - torch.einsum("t,tmn->mn", rate_T, tau_TMN))).sum(-1)

    def slope(moved_MN: Tensor) -> Tensor:
        left_TM = gap_TM - rate * torch.einsum("tmn,mn->tm", tau_TMN, moved_MN)
        slope_MN = torch.einsum("tmn,tm->mn", tau_TMN, left_TM).mul_(-2 * rate)
        return slope_MN.sub_(shared_MK @ (shared_MK.T @ slope_MN))

    moved_MN = quadratic.descend(
        slope, tau_TMN[0], optimizer="adam", learning_rate=learning_rate, iterations=iterations
    )
    merged_MN = torch.zeros_like(x.reference)
    for tau_MN, own, least in zip(tau_TMN, rate_T, x.found):
        merged_MN += (tau_MN + moved_MN).mul_(own).mul_(tau_MN.float().abs() >= least)
    return merged_MN


def _shared(x: Slot, subspace: int) -> Tensor:
    """The leading left directions of all task vectors' leading left directions: (M, K)."""
    side = min(x.shape)
    lefts = [u_MK for u_MK, _, _ in directions.triplets_of_tasks(x, side // len(x.experts))]
    return decompositions.singular_triplets(torch.cat(lefts, dim=-1), side // subspace)[0]
