"""TSV-Merge: the leading singular vectors of all task vectors, made orthogonal to each other before they are added."""

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
    paper="2412.00081",
    code="AntoAndGar/task_singular_vectors@a6c97188",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
)
def tsv_merge(
    x: Slot,
    *,
    rank: Annotated[float, Gt(0), Le(1)] | Literal["1/T"] = "1/T",
    scale: float = 1.0,
    keys: Keys = "matrices",
    orthogonalize: bool = True,
) -> Tensor:
    """base + scale * polar(U) S polar(V)^T, U S V^T the concatenated rank-k parts of the task vectors.

    k = int(min(M, N) / T) for `1/T`, else max(1, int(rank * min(M, N))). Other tensors add scale * the mean task
    vector.

    Formula:
        P_k(τₜ) = Uₜ Sₜ Vₜᵀ;  U = [U₁ … U_T], S = [S₁ … S_T], V = [V₁ … V_T];  k = int(min(M, N) / T)
        θ₀ + scale · polar(U) · diag(S) · polar(V)ᵀ
    Parameters:
        orthogonalize: without it, the low-rank parts are summed as they are
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps;
        two polar factors a matrix
    Trap:
        `scale` multiplies the mean task vector of the other tensors too. With more experts than directions,
        `1/T` leaves matrices as in the base. Embeddings and projections are matrices too.
    """
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "mean")
    k = spectral.rank_for_task(rank, x)

    def update() -> Tensor:
        factors = spectral.triplets_of_tasks(x, base, k)
        return spectral.orthogonal_sum(factors) if orthogonalize else sum((u * s) @ v.T for u, s, v in factors)

    return torch.add(base, x.share(("tsv", k, orthogonalize), update), alpha=scale) if k else base
