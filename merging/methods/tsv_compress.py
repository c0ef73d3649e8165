"""TSV-Compress: one expert given back from the base and the leading singular vectors of its task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Sequence

from annotated_types import Ge, Gt, Le

from merging import spectral
from merging.keys import Keys, is_matrix
from merging.methods import Encoded, Part, Parts, Store, Stored, method
from merging.methods.cart_indexing import low_rank, low_rank_factors, low_rank_parts
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

Rank = Annotated[float, Gt(0), Le(1)] | Literal["1/T"]


def _rank(shape: Sequence[int], rank: Rank, experts: int) -> int:
    return int(min(shape) * (1 / experts)) if rank == "1/T" else spectral.rank_of(rank, shape)


def _parts(
    name: str, shape: Sequence[int], experts: int, *, rank: Rank, keys: Keys, **_: Any
) -> Parts:
    if is_matrix(name, shape, keys):
        return {}, low_rank_parts(shape, _rank(shape, rank, experts))
    return {}, {"whole": Part("exact", tuple(shape))}


def _encode(
    x: Slot, tasks: Sequence[int], *, rank: Rank, keys: Keys, stored: Stored | None, **_: Any
) -> Encoded:
    if not is_matrix(x.name, x.shape, keys):
        return {}, ({"whole": x.experts[t]} for t in tasks)
    base_MN, k = x.base.double(), _rank(x.shape, rank, len(x.experts))
    return {}, (low_rank_factors(x, t, base_MN, "pretrained", k, stored) for t in tasks)


def _decode(base_X: Tensor, once: dict[str, Tensor], own: dict[str, Tensor], **_: Any) -> Tensor:
    return own["whole"] if "whole" in own else base_X.double() + low_rank(own)


@method(
    family="store",
    paper="2412.00081",
    code="AntoAndGar/task_singular_vectors@a6c97188",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    store=Store(_parts, _encode, _decode),
)
def tsv_compress(
    x: Slot,
    *,
    rank: Rank = "1/T",
    task: Annotated[int, Ge(0)] = 0,
    keys: Keys = "matrices",
    stored: Stored | None = None,
) -> Tensor:
    """base + the rank-k part of the task vector of expert number `task`; other tensors in full.

    k = int(min(M, N) / T) for `1/T`, else max(1, int(rank * min(M, N))). Factors are rounded to the dtype `stored`, by
    default float32, as a compressed store keeps them.

    Formula:
        θ₀ + P_k(τₜ), t = task;  k = int(min(M, N) / T)
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert; `--factors` keeps it
    Trap:
        The official code cuts a text tower's projection too. Vectors are stored whole for each task.
    """
    once, [own] = _encode(x, [task], rank=rank, keys=keys, stored=stored)
    return _decode(x.base, once, own)
