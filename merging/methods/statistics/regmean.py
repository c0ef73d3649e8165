"""RegMean: linear layers that reproduce what every expert's layer makes of its own inputs, in least squares."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping, Sequence

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Mean, method
from mergeline.merging.methods.parameters import Rate, Weights

if TYPE_CHECKING:
    from torch import Tensor


_RIDGE = 1e-10  # of the mean diagonal: what statistics in float32 leave undecided stays at the mean


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    weights = params["weights"] or [1.0]
    if not min(weights) >= 0 < sum(weights):
        yield "weights must not be negative, nor all be 0"


def _needs(params: Mapping[str, Any]) -> Sequence[str]:
    return ("gram", "usage") if params["embeddings"] == "usage" else ("gram",)


def _other(
    x: Slot, *, weights: Weights | None, exclude: list[str], embeddings: str, **_: Any
) -> Tensor | None:
    """Other tensors are averaged; rows of embeddings by their usage, if that is asked for."""
    if embeddings == "mean" or any(part in x.name for part in exclude) or not x.has_statistic("usage", 0):
        return None
    entries_X = torch.arange(x.start, x.start + x.elements, device=x.reference.device).reshape(x.shape)
    row_X = entries_X // (prod(x.tensor_shape) // x.tensor_shape[0])
    moved_X, total_X = torch.zeros_like(x.reference), torch.zeros_like(x.reference)
    for t in range(len(x.experts)):
        used_V = x.statistic("usage", t).double()
        share_X = (used_V * (weights[t] if weights else 1.0) / used_V.sum().clamp(min=1))[row_X]
        moved_X += share_X * directions.task_vector(x, t)
        total_X += share_X
    return torch.where(total_X > 0, moved_X / total_X, 0.0)


@method(
    paper="2212.09849",
    code="bloomberg/dataless-model-merging@92247aec",
    reference=lambda params: Mean(params["weights"] and tuple(params["weights"])),
    keys="block_linear",
    other=_other,
    needs=_needs,
    check=_wrong,
)
def regmean(
    x: Slot,
    *,
    nondiagonal: Rate = 0.9,
    weights: Weights | None = None,
    exclude: list[str] = [],
    embeddings: Literal["mean", "usage"] = "mean",
) -> Tensor | None:
    """(sum of W G) (sum of G)^-1, G = weight * X^T X / rows of an expert's inputs X, off-diagonals times nondiagonal.

    The statistics `gram` hold G, (N, N) for a weight (M, N), a projection (N, M) of open_clip, a weight (N, M) of
    transformers' Conv1D, and a kernel (M, I, *kernel) with N = I * prod(kernel). Tensors without one, and those whose
    names contain a part of `exclude`, are averaged with the weights over their sum. It is solved around that average by
    Cholesky factorisation in float64, so that directions without inputs keep it; the official code inverts in float32.

    Formula:
        Gₜ = wₜ XₜᵀXₜ / rows, off-diagonals times nondiagonal
        (Σₜ θₜ Gₜ) (Σₜ Gₜ)⁻¹
    Parameters:
        nondiagonal: what off-diagonal entries of Gram matrices are multiplied by
        exclude: parts of names of tensors that are averaged
        embeddings: whether rows of embeddings are averaged, or weighed by how often each expert looks them up, which
            is RegMean of inputs that are tokens (the statistics `usage`)
    Needs:
        a Gram matrix (N, N) of the inputs of every linear layer that is not to be averaged
    Trap:
        Gram matrices must be divided by their number of rows, or the expert with more data wins. Packed
        attention weights have none in the official code and are averaged there.
    """
    if any(part in x.name for part in exclude) or not x.has_statistic("gram", 0):
        return _other(x, weights=weights, exclude=exclude, embeddings=embeddings)
    from_left = x.view.inputs == 0  # applied as x @ W: the inputs are its rows
    side = x.shape[0 if from_left else 1]
    gram_NN = torch.zeros((side, side), dtype=torch.float64, device=x.reference.device)
    moved_MN = torch.zeros_like(x.reference.T if from_left else x.reference)
    for t in range(len(x.experts)):
        own_NN = x.statistic("gram", t).double()
        own_NN = own_NN.mul(nondiagonal).diagonal_scatter(own_NN.diagonal())
        own_NN *= weights[t] / sum(weights) if weights else 1.0
        gram_NN += own_NN
        tau = directions.task_vector(x, t)
        moved_MN.addmm_(tau.T if from_left else tau, own_NN)
    lower_NN = _cholesky(gram_NN)
    if lower_NN is None:
        return None
    solved_NM = torch.cholesky_solve(moved_MN.T, lower_NN)
    return solved_NM if from_left else solved_NM.T


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
