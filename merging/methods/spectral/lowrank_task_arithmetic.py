"""Task arithmetic with task vectors cut to low rank: what CART does, around the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share
from mergeline.merging.methods.spectral.cart import Basis, low_rank_sum

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2412.12153",
    code="david3684/AdaRank@dfa53581",
    scale=0.3,
    keys="block_linear",
    other="sum",
    needs=("base",),
    spectral=True,
)
def lowrank_task_arithmetic(x: Slot, *, rank: Share = 0.12, basis: Basis = "svd") -> Tensor:
    """base + scale * sum of the rank-k parts of the task vectors; tensors that are no block matrices in full.

    `basis` as in cart.

    Formula:
        θ₀ + scale · Σₜ P_k(τₜ);  k = max(1, int(rank · min(M, N)))
    Parameters:
        basis: singular vectors, or columns of cosine transforms, which are cheaper and not optimal
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert; `--factors` keeps it
    Trap:
        Tensors that are no block matrices add `scale` times their whole task vectors.
    """
    return low_rank_sum(x, linear.rank_of(rank, x.shape), basis=basis)
