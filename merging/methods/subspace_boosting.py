"""Subspace boosting: raise the small singular values of what another method merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import Inner, method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="wrapper",
    paper="2506.16506",
    code="tanganke/fusion_bench@9c8c6a6e",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    inner_defaults={"scale": 1.0},
    spectral=True,
)
def subspace_boosting(
    x: Slot,
    merge: Inner,
    *,
    inner: str = "task_arithmetic",
    beta: Annotated[float, Ge(0), Le(1)] = 0.01,
    split_qkv: bool = True,
    keys: Keys = "block_linear",
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
        split_qkv: take a packed attention matrix, `in_proj_weight`, as its three parts
    Spectral work:
        an eigendecomposition a matrix, three of a packed one
    Trap:
        A small `beta` makes all singular values nearly equal, and so lengthens what is added: `scale` wants
        to be chosen again.
    """
    merged_X = merge(x)
    if not is_matrix(x.name, x.shape, keys):
        return merged_X
    base = x.base.double()
    tau_MN = merged_X.double() - base
    packed = split_qkv and x.name.endswith("in_proj_weight") and x.shape[0] % 3 == 0
    parts = tau_MN.chunk(3) if packed else [tau_MN]
    return torch.cat([spectral.raised(part_MN, beta) for part_MN in parts]).add_(base)
