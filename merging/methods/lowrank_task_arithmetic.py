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
    """
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, "sum")
    k = spectral.rank_of(rank, x.shape)
    update = x.share(("lowrank", k, basis), lambda: low_rank_sum(x, base, "pretrained", k, basis=basis))
    return torch.add(base, update, alpha=scale)
