"""DC-Merge: task vectors merged by sign in one orthonormal basis that covers the leading directions of all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine, decompositions, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share, TaskRank

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2603.06242",
    code="Tobeginwith/DC-Merge@3c443e4d",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base",),
    spectral=lambda rows, columns, experts: 2 * experts * rows * columns,
)
def dc_merge(x: Slot, *, density: Share = 0.001, rank: TaskRank = "1/T") -> Tensor | None:
    """base + scale * polar(U) C polar(V)^T, U S V^T the rank-k parts of task vectors in a row; others: the mean.

    C is the mean, over tasks that agree with the sign of the sum, of the largest max(1, int(density * R^2)) entries of
    polar(U)^T U_t S_t V_t^T polar(V), of which the diagonal blocks, one a task, are kept. k as in tsv_merge; other
    tensors add scale * the mean task vector. The version for full fine-tuning: singular values are not smoothed.

    Formula:
        P_k(τₜ) = Uₜ Sₜ Vₜᵀ;  Q = polar([U₁ … U_T]), R = polar([V₁ … V_T])
        Cₜ = the density largest entries of Qᵀ P_k(τₜ) R
        C = the mean of those with the sign of Σₜ Cₜ, in T diagonal blocks
        θ₀ + scale · Q C Rᵀ
    Parameters:
        density: share of a task's core that is kept
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps;
        two polar factors a matrix
    Trap:
        The mask on the core is discontinuous: the least change of an input may choose another entry.
        `density` is tiny and counts entries of the core, not of the matrix.
    """
    parts = list(directions.triplets_of_tasks(x, directions.rank_for_task(rank, x.shape, len(x.experts))))
    us, _, vs = zip(*parts)
    left_MK, right_NK = (torch.cat(kind, dim=-1) for kind in (us, vs))
    side = left_MK.shape[1]
    if not side:
        return None
    left_MK, right_NK = decompositions.partial_polar(left_MK), decompositions.partial_polar(right_NK)
    kept = min(max(1, int(density * max(min(x.shape), side) ** 2)), side**2)
    cores = []
    for u_MK, s_K, v_NK in parts:
        core_KK = (left_MK.T @ (u_MK * s_K)) @ (right_NK.T @ v_NK).T
        least = core_KK.abs().flatten().kthvalue(side**2 - kept + 1).values
        cores.append(core_KK * (core_KK.abs() >= least))
    sum_KK, count_KK = combine.orthant_sum(cores, combine.elect_signs(cores, None, 0.0))
    own_KK = torch.block_diag(*(sum_KK.new_ones(len(s_K), len(s_K)) for _, s_K, _ in parts))
    return left_MK @ (sum_KK / count_KK.clamp(min=1) * own_KK) @ right_NK.T
