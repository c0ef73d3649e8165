"""TSV-Merge: the leading singular vectors of all task vectors, made orthogonal to each other before they are added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import decompositions, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import TaskRank

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2412.00081",
    code="AntoAndGar/task_singular_vectors@a6c97188",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base",),
    spectral=True,
)
def tsv_merge(
    x: Slot,
    *,
    rank: TaskRank = "1/T",
    orthogonalize: bool = True,
    variant: Literal["official", "gram_eigh"] = "official",
) -> Tensor | None:
    """base + scale * polar(U) S polar(V)^T, U S V^T the concatenated rank-k parts of the task vectors.

    k = int(min(M, N) / T) for `1/T`, else max(1, int(rank * min(M, N))). Other tensors add scale * the mean task
    vector.

    Formula:
        P_k(τₜ) = Uₜ Sₜ Vₜᵀ;  U = [U₁ … U_T], S = [S₁ … S_T], V = [V₁ … V_T];  k = int(min(M, N) / T)
        θ₀ + scale · polar(U) · diag(S) · polar(V)ᵀ
    Parameters:
        orthogonalize: without it, the low-rank parts are summed as they are
        variant: how polar factors are computed: exactly, or by an eigendecomposition of a Gram matrix in float32,
            as the official code's second way (gram_eigh)
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps;
        two polar factors a matrix
    Trap:
        `scale` multiplies the mean task vector of the other tensors too. With more experts than directions,
        `1/T` leaves matrices as in the base. gram_eigh squares the condition number in float32, and was wrong by
        13 % of the update on matrices of ViT-B/32 with 8 experts: it is there for comparison. Embeddings and
        projections are matrices too.
    """
    k = directions.rank_for_task(rank, x.shape, len(x.experts))
    if not k:
        return None
    factors = directions.triplets_of_tasks(x, k)
    if orthogonalize:
        ways = {"official": decompositions.polar, "gram_eigh": decompositions.polar_by_gram}
        return decompositions.orthogonal_sum(factors, ways[variant])
    sum_MN = torch.zeros_like(x.reference)
    for u_MK, s_K, v_NK in factors:
        sum_MN += (u_MK * s_K) @ v_NK.T
    return sum_MN
