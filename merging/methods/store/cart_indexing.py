"""CART-Indexing: one expert given back from the mean and its low-rank centred task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging.algebra import directions, linear, sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share, Task
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


def low_rank_parts(shape: Sequence[int], k: int) -> dict[str, Part]:
    """Two factors, (M, K) and (N, K)."""
    return {"left": Part("number", (shape[0], k)), "right": Part("number", (shape[1], k))}


def low_rank_factors(x: Slot, t: int, k: int, stored: Stored | None) -> dict[str, Tensor]:
    """The factors of expert t's task vector, as they are kept."""
    _, left_ML, right_NL = directions.factors(x, t, k, stored_dtype(x, stored))
    return {"left": left_ML[:, :k].contiguous(), "right": right_NL[:, :k].contiguous()}


def low_rank(own: Mapping[str, Tensor]) -> Tensor:
    """The product of kept factors, in float64: (M, N)."""
    return own["left"].double() @ own["right"].double().T


def decode_low_rank(
    _once: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    _shape: Sequence[int],
    _dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    """`Store.decode` of methods that keep nothing but an expert's factors."""
    return low_rank(own)


def _parts(shape: Sequence[int], _experts: int, *, rank: float, **_: Any) -> Parts:
    return {"mean": Part("number", tuple(shape))}, low_rank_parts(shape, linear.rank_of(rank, shape))


def _encode(x: Slot, tasks: Sequence[int], *, rank: float, stored: Stored | None, **_: Any) -> Encoded:
    centred, k = x.from_mean(), linear.rank_of(rank, x.shape)
    mean = {"mean": centred.reference.to(stored_dtype(x, stored))}
    return mean, (low_rank_factors(centred, t, k, stored) for t in tasks)


def _decode(
    once: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    _shape: Sequence[int],
    _dtype: torch.dtype,
    *,
    scale: float,
    **_: Any,
) -> Tensor:
    return once["mean"].double() + scale * low_rank(own)


def _parts_in_full(shape: Sequence[int], _experts: int, *, scale: float, **_: Any) -> Parts:
    once = {} if scale == 1 else {"mean": Part("number", tuple(shape))}
    return once, {"whole": Part("exact", tuple(shape))}


def _encode_in_full(
    x: Slot, tasks: Sequence[int], *, scale: float, stored: Stored | None, **_: Any
) -> Encoded:
    once = {} if scale == 1 else {"mean": sums.mean(x.experts).to(stored_dtype(x, stored))}
    return once, ({"whole": x.experts[t]} for t in tasks)


def _decode_in_full(
    once: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    _shape: Sequence[int],
    dtype: torch.dtype,
    *,
    scale: float,
    **_: Any,
) -> Tensor:
    if not once:
        return own["whole"].to(dtype)
    mean_X = once["mean"].double()
    return mean_X + scale * (own["whole"].double() - mean_X)


IN_FULL = Store(_parts_in_full, _encode_in_full, _decode_in_full)
STORE = Store(_parts, _encode, _decode, IN_FULL)


@method(
    paper="2412.12153",
    code="JH-GEECS/CART@964cfd78",
    reference="none",
    keys="block_linear",
    other="task",
    experts=(2, None),
    spectral=True,
    store=STORE,
)
def cart_indexing(
    x: Slot, *, rank: Share = 0.08, scale: float = 1.0, task: Task = 0, stored: Stored | None = None
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
    return given_back(STORE, x, task=task, rank=rank, scale=scale, stored=stored)
