"""Low-rank factors of a model's weights, or of what it adds to its base, cut in the plain or in a weighted norm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

from mergeline.merging.algebra import decompositions, directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Reference, method
from mergeline.merging.methods.parameters import Share, Task
from mergeline.merging.methods.store.cart_indexing import decode_low_rank, low_rank_factors, low_rank_parts
from mergeline.merging.methods.stored import Encoded, Parts, Store, Stored, given_back, stored_dtype
from mergeline.merging.methods.wrapper.weighted_truncate import Side, weighted_squares, wrong_side

if TYPE_CHECKING:
    from torch import Tensor

Of = Literal["task_vectors", "weights"]
Norm = Literal["none", "gram", "fisher"]


def reference_of(params: Mapping[str, Any]) -> Reference:
    """What is cut is measured from, as the parameter `of` says."""
    return "pretrained" if params["of"] == "task_vectors" else "none"


def _needs(params: Mapping[str, Any]) -> Sequence[str]:
    base = ("base",) if params["of"] == "task_vectors" else ()
    return base if params["weights"] == "none" else (*base, params["weights"])


def _parts(shape: Sequence[int], _experts: int, *, rank: float, **_: Any) -> Parts:
    return {}, low_rank_parts(shape, linear.rank_of(rank, shape))


def _encode(
    x: Slot,
    tasks: Sequence[int],
    *,
    rank: float,
    of: Of,
    weights: Norm,
    side: Side,
    stored: Stored | None,
    **_: Any,
) -> Encoded:
    k, dtype = linear.rank_of(rank, x.shape), stored_dtype(x, stored)
    if of == "weights":
        zero_MN = torch.zeros(x.shape, dtype=torch.float64, device=x.experts[0].device)
        x = x.measured_from(lambda: zero_MN, ["zero"])

    def own(t: int) -> dict[str, Tensor]:
        if weights == "none" or not x.has_statistic(weights, t):
            return low_rank_factors(x, t, k, stored)
        tau_MN = directions.task_vector(x, t)
        _, q_K = decompositions.leading(weighted_squares(x, t, tau_MN, weights, side), k)
        pair = (tau_MN @ q_K, q_K) if side == "out" else (q_K, tau_MN.T @ q_K)
        return {name: factor.to(dtype).contiguous() for name, factor in zip(("left", "right"), pair)}

    return {}, map(own, tasks)


STORE = Store(_parts, _encode, decode_low_rank)


@method(
    paper="2403.07378",
    code="hahnyuan/ASVD4LLM@86304274",
    reference=reference_of,
    keys="block_linear",
    other="task",
    needs=_needs,
    check=wrong_side,
    spectral=lambda rows, columns, experts: max(rows, columns) ** 2 + rows * columns,
    store=STORE,
)
def svd_compress(
    x: Slot,
    *,
    rank: Share = 0.12,
    of: Of = "task_vectors",
    weights: Norm = "none",
    side: Side = "in",
    task: Task = 0,
    stored: Stored | None = None,
) -> Tensor:
    """base + the rank-k part of the task vector of expert number `task`, or of its weights; other tensors in full.

    The part is that of `truncate`, or with `weights` that of `weighted_truncate`, the nearest in a layer's outputs
    (`gram`, SVD-LLM) or in the loss (`fisher`, FWSVD). `of: weights` needs no base. With one expert, which may be a
    merge, the store is that model in factors. These are rounded to the dtype `stored`, by default float32, as a
    compressed store keeps them. Matrices without statistics are cut plainly.

    Formula:
        θ₀ + τ̂ₜ, t = task;  τ̂ₜ = argmin ‖(τₜ − τ̂) W‖_F over rank k = max(1, int(rank · min(M, N)))
        W = 1, W Wᵀ = Gₜ, or W² the mean of Fₜ over outputs (inputs, W from the left);  of weights: θₜ for τₜ, 0 for θ₀
    Parameters:
        of: whether what is added to the base is cut, or the weights
        weights: by which statistics loss is measured; none: in the weights themselves
        side: whether a weight is of an input or of an output
    Needs:
        the base, but `of: weights`; a Gram matrix (N, N) of every linear layer, or Fisher information (M, N), if
        `weights` says so
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, which `--factors` keeps; in a weighted norm of (M, M), of
        outputs (N, N); for every matrix and expert
    Trap:
        Factors take fewer numbers than a matrix where k < MN / (M + N), half of full rank if it is square. Weights,
        unlike task vectors, are seldom near a low rank.
    """
    params = {"rank": rank, "of": of, "weights": weights, "side": side}
    return given_back(STORE, x, task=task, stored=stored, **params)
