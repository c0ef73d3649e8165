"""CART-Indexing: one expert given back from the mean and its low-rank centred task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Sequence

from annotated_types import Ge

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.methods import Encoded, Part, Parts, Store, Stored, method, stored_dtype
from merging.methods.cart import Share
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def low_rank_parts(shape: Sequence[int], k: int) -> dict[str, Part]:
    """Two factors, (M, K) and (N, K)."""
    return {"left": Part("number", (shape[0], k)), "right": Part("number", (shape[1], k))}


def low_rank_factors(
    x: Slot, t: int, start_MN: Tensor, reference: str, k: int, stored: Stored | None
) -> dict[str, Tensor]:
    """The factors of expert t's task vector, as they are kept."""
    _, left_ML, right_NL = spectral.factors(x, t, start_MN, reference, k, stored_dtype(x, stored))
    return {"left": left_ML[:, :k].contiguous(), "right": right_NL[:, :k].contiguous()}


def low_rank(own: dict[str, Tensor]) -> Tensor:
    """The product of kept factors, in float64: (M, N)."""
    return own["left"].double() @ own["right"].double().T


def _parts(
    name: str, shape: Sequence[int], experts: int, *, rank: float, scale: float, keys: Keys, **_: Any
) -> Parts:
    mean = {"mean": Part("number", tuple(shape))}
    if is_matrix(name, shape, keys):
        return mean, low_rank_parts(shape, spectral.rank_of(rank, shape))
    return {} if scale == 1 else mean, {"whole": Part("exact", tuple(shape))}


def _encode(
    x: Slot, tasks: Sequence[int], *, rank: float, scale: float, keys: Keys, stored: Stored | None, **_: Any
) -> Encoded:
    once, _ = _parts(x.name, x.tensor_shape, len(x.experts), rank=rank, scale=scale, keys=keys)
    start_X = ops.mean(x.experts) if once else None
    mean = {"mean": start_X.to(stored_dtype(x, stored))} if once else {}
    if not is_matrix(x.name, x.shape, keys):
        return mean, ({"whole": x.experts[t]} for t in tasks)
    k = spectral.rank_of(rank, x.shape)
    return mean, (low_rank_factors(x, t, start_X, "mean", k, stored) for t in tasks)


def _decode(
    base_X: Tensor | None, once: dict[str, Tensor], own: dict[str, Tensor], *, scale: float, **_: Any
) -> Tensor:
    if not once:
        return own["whole"]
    mean_X = once["mean"].double()
    return mean_X + scale * (own["whole"].double() - mean_X if "whole" in own else low_rank(own))


@method(
    family="store",
    paper="2412.12153",
    code="JH-GEECS/CART@964cfd78",
    reference="mean",
    unit="matrix",
    minimum_experts=2,
    spectral=True,
    store=Store(_parts, _encode, _decode),
)
def cart_indexing(
    x: Slot,
    *,
    rank: Share = 0.08,
    scale: float = 1.0,
    task: Annotated[int, Ge(0)] = 0,
    keys: Keys = "block_linear",
    stored: Stored | None = None,
) -> Tensor:
    """mean + scale * the rank-k part of (expert number `task` - mean); tensors that are no block matrices in full.

    The mean and the factors are rounded to the dtype `stored`, by default float32, as a compressed store keeps them.

    Formula:
        θ̄ + scale · P_k(θₜ − θ̄), t = task;  k = max(1, int(rank · min(M, N)))
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert; `--factors` keeps it
    Trap:
        It gives one expert back and needs to know which; it is no merge for all tasks. Tensors that are no
        block matrices are stored whole for each.
    """
    once, [own] = _encode(x, [task], rank=rank, scale=scale, keys=keys, stored=stored)
    return _decode(x.base, once, own, scale=scale)
