"""RegMean: linear layers that reproduce what every expert's layer makes of its own inputs, in least squares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Mapping

from annotated_types import Ge, Le

from merging import operators as ops
from merging.errors import UserError
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

_RIDGE = 1e-10  # of the mean diagonal: what statistics in float32 leave undecided stays at the mean


def needs_gram(_: Any) -> list[str]:
    """The statistics of methods that know the inputs of a layer by their Gram matrix."""
    return ["gram"]


def _wrong(params: Mapping[str, Any], experts: int) -> str | None:
    weights = params["weights"] or [1.0]
    return None if min(weights) >= 0 < sum(weights) else "weights must not be negative, nor all be 0"


@method(
    family="statistics",
    paper="2212.09849",
    code="bloomberg/dataless-model-merging@92247aec",
    reference="mean",
    unit="matrix",
    check=_wrong,
    statistics=needs_gram,
)
def regmean(
    x: Slot,
    *,
    nondiagonal: Annotated[float, Ge(0), Le(1)] = 0.9,
    weights: list[float] | None = None,
    exclude: list[str] = [],
    keys: Keys = "block_linear",
) -> Tensor:
    """(sum of W G) (sum of G)^-1, G = weight * X^T X / rows of an expert's inputs X, off-diagonals times nondiagonal.

    The statistics `gram` hold G, (N, N) for a weight (M, N). Tensors without one, and those whose names contain a part
    of `exclude`, are averaged with the weights over their sum. It is solved around that average by Cholesky
    factorisation in float64, so that directions without inputs keep it; the official code inverts in float32.

    Formula:
        Gₜ = wₜ XₜᵀXₜ / rows, off-diagonals times nondiagonal
        (Σₜ θₜ Gₜ) (Σₜ Gₜ)⁻¹
    Parameters:
        nondiagonal: what off-diagonal entries of Gram matrices are multiplied by
        exclude: parts of names of tensors that are averaged
    Needs:
        a Gram matrix (N, N) of the inputs of every linear layer that is not to be averaged
    Trap:
        Gram matrices must be divided by their number of rows, or the expert with more data wins. Packed
        attention weights have none in the official code and are averaged there.
    """
    share_T = [w / sum(weights) for w in weights] if weights else None
    mean = ops.weighted_sum(x.experts, share_T, x.precision) if share_T else ops.mean(x.experts, x.precision)
    if any(part in x.name for part in exclude) or not x.has_statistic("gram", 0):
        return mean
    if not is_matrix(x.name, x.shape, keys):
        raise UserError(f"regmean: '{x.name}' has a Gram matrix, but is none of {keys}; set keys or exclude")
    gram_NN = x.experts[0].new_zeros((x.shape[-1],) * 2, dtype=torch.float64)
    moved_MN = torch.zeros_like(mean, dtype=torch.float64)
    for t, expert_MN in enumerate(x.experts):
        own_NN = x.statistic("gram", t).double()
        own_NN = own_NN.mul(nondiagonal).diagonal_scatter(own_NN.diagonal())
        own_NN *= share_T[t] if share_T else 1.0
        gram_NN += own_NN
        moved_MN.addmm_(expert_MN.double() - mean, own_NN)
    lower_NN = _cholesky(gram_NN)
    return mean if lower_NN is None else mean.double() + torch.cholesky_solve(moved_MN.T, lower_NN).T


def _cholesky(gram_NN: Tensor) -> Tensor | None:
    """The Cholesky factor with the smallest ridge that makes it one; None of a matrix of zeros."""
    size, ridge = float(gram_NN.diagonal().mean()), _RIDGE
    one_NN = torch.eye(len(gram_NN)).to(gram_NN)
    while 0 < size and ridge < 1:
        lower_NN, failed = torch.linalg.cholesky_ex(gram_NN + ridge * size * one_NN)
        if not failed:
            return lower_NN
        ridge *= 100
    return None
