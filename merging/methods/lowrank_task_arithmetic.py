"""Task arithmetic with task vectors cut to low rank: what CART does, around the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.methods.cart import Basis, Share, low_rank_sum
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="spectral",
    paper="2412.12153",
    code="david3684/AdaRank@dfa53581",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
)
def lowrank_task_arithmetic(
    x: Slot,
    *,
    rank: Share = 0.12,
    scale: float = 0.3,
    keys: Keys = "block_linear",
    basis: Basis = "svd",
) -> Tensor:
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
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "sum")
    k = spectral.rank_of(rank, x.shape)
    update = x.share(("lowrank", k, basis), lambda: low_rank_sum(x, base, "pretrained", k, basis=basis))
    return torch.add(base, update, alpha=scale)
