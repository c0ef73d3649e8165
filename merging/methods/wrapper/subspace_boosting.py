"""Subspace boosting: raise the small singular values of what another method merged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import decompositions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Rate

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2506.16506",
    code="tanganke/fusion_bench@9c8c6a6e",
    keys="block_linear",
    other="inner",
    needs=("base",),
    inner_defaults={"scale": 1.0},
    spectral=True,
)
def subspace_boosting(
    x: Slot,
    merge: Inner,
    *,
    inner: str = "task_arithmetic",
    beta: Rate = 0.01,
    split_qkv: bool = True,
) -> Tensor:
    """What another method adds to the base, each matrix with its singular values raised to a least one.

    Directions that are numerically zero, where the published code takes arbitrary ones, stay zero. The inner method's
    parameters stand beside these; its `scale` is 1 unless it is given.

    Formula:
        U S Vᵀ = what the inner method adds
        i = the first, from the largest on, at which `beta` of Σ S is reached
        θ₀ + U · max(S, Sᵢ) · Vᵀ
    Parameters:
        beta: share of the sum of singular values at which the least one is set; 1 changes nothing
        split_qkv: take a packed attention matrix, such as `in_proj_weight`, as its three parts
    Spectral work:
        an eigendecomposition a matrix, three of a packed one
    Trap:
        A small `beta` makes all singular values nearly equal, and so lengthens what is added: `scale` wants
        to be chosen again.
    """
    tau_MN = merge.update()
    heights = [part.shape[0] for part in x.view.role.attention_parts()] if split_qkv else []
    parts = tau_MN.split(heights or [len(tau_MN)])
    return torch.cat([decompositions.raised(part_MN, beta) for part_MN in parts])
