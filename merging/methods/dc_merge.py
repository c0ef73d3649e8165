"""DC-Merge: task vectors merged by sign in one orthonormal basis that covers the leading directions of all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

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
    paper="2603.06242",
    code="Tobeginwith/DC-Merge@3c443e4d",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    beside=lambda rows, columns, experts: 2 * experts * rows * columns,
)
def dc_merge(
    x: Slot,
    *,
    scale: float = 1.0,
    density: Annotated[float, Gt(0), Le(1)] = 0.001,
    rank: Annotated[float, Gt(0), Le(1)] | Literal["1/T"] = "1/T",
    keys: Keys = "matrices",
) -> Tensor:
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
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "mean")
    update = x.share(("dc_merge", density, rank), lambda: _update(x, base, density, rank))
    return torch.add(base, update, alpha=scale)


def _update(x: Slot, base_MN: Tensor, density: float, rank: float | str) -> Tensor:
    k, parts = spectral.rank_for_task(rank, x), []
    for t in range(len(x.experts)):
        tau_MN = spectral.task_vector(x, t, base_MN)
        parts.append(spectral.leading_triplets(x, t, base_MN, tau_MN, "pretrained", k))
    us, _, vs = zip(*parts)
    left_MK, right_NK = (torch.cat(kind, dim=-1) for kind in (us, vs))
    side = left_MK.shape[1]
    if not side:
        return torch.zeros_like(base_MN)
    left_MK, right_NK = spectral.partial_polar(left_MK), spectral.partial_polar(right_NK)
    kept = min(max(1, int(density * max(min(x.shape), side) ** 2)), side**2)
    cores = []
    for u_MK, s_K, v_NK in parts:
        core_KK = (left_MK.T @ (u_MK * s_K)) @ (right_NK.T @ v_NK).T
        least = core_KK.abs().flatten().kthvalue(side**2 - kept + 1).values
        cores.append(core_KK * (core_KK.abs() >= least))
    sum_KK, count_KK = ops.orthant_sum(cores, ops.elect_signs(cores, None, 0.0))
    own_KK = torch.block_diag(*(sum_KK.new_ones(len(s_K), len(s_K)) for _, s_K, _ in parts))
    return left_MK @ (sum_KK / count_KK.clamp(min=1) * own_KK) @ right_NK.T
