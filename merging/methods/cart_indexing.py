"""CART-Indexing: one expert given back from the mean and its low-rank centred task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Mapping

from annotated_types import Ge

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.methods.cart import Share
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _wrong(params: Mapping[str, Any], experts: int) -> str | None:
    return (
        f"task {params['task']} is none of {experts} experts, counted from 0"
        if params["task"] >= experts
        else None
    )


@method(
    paper="2412.12153",
    code="JH-GEECS/CART@964cfd78",
    reference="mean",
    unit="matrix",
    minimum_experts=2,
    check=_wrong,
    spectral=True,
)
def cart_indexing(
    x: Slot,
    *,
    rank: Share = 0.08,
    scale: float = 1.0,
    task: Annotated[int, Ge(0)] = 0,
    keys: Keys = "block_linear",
) -> Tensor:
    """mean + scale * the rank-k part of (expert number `task` - mean); tensors that are no block matrices in full."""
    start = ops.mean(x.experts)
    if not is_matrix(x.name, x.shape, keys):
        return start + scale * spectral.task_vector(x, task, start)
    k = spectral.rank_of(rank, x.shape)
    _, left_ML, right_NL = spectral.factors(x, task, start, "mean", k, torch.float64)
    return start + scale * left_ML[:, :k] @ right_NL[:, :k].T
