"""Twin-Merging without its router: what all experts share, merged, and what is exclusively one's, cut to low rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Sequence

from annotated_types import Ge, Gt, Le

from merging import spectral
from merging.keys import Keys, is_matrix
from merging.methods import Encoded, Inner, Part, Parts, Store, Stored, method, stored_dtype
from merging.methods.cart_indexing import low_rank, low_rank_parts
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _rank(rank: float, shape: Sequence[int]) -> int:
    return int(rank * min(shape))


def _parts(
    name: str, shape: Sequence[int], experts: int, *, rank: float, keys: Keys, **_: Any
) -> Parts:
    if is_matrix(name, shape, keys):
        return {"vector": Part("number", tuple(shape))}, low_rank_parts(shape, _rank(rank, shape))
    return {}, {"whole": Part("exact", tuple(shape))}


def _encode(
    x: Slot, merge: Inner, tasks: Sequence[int], *, rank: float, keys: Keys, stored: Stored | None, **_: Any
) -> Encoded:
    if not is_matrix(x.name, x.shape, keys):
        return {}, ({"whole": x.experts[t]} for t in tasks)
    base_MN, dtype = x.base.double(), stored_dtype(x, stored)
    shared_MN = (merge(x).double() - base_MN).to(dtype)
    start_MN, k = base_MN + shared_MN.double(), _rank(rank, x.shape)

    def own(t: int) -> dict[str, Tensor]:
        tau_MN = spectral.task_vector(x, t, start_MN)
        left_MK, right_NK = spectral.projected(tau_MN, spectral.leading(spectral.gram(tau_MN), k)[1])
        return {"left": left_MK.to(dtype).contiguous(), "right": right_NK.to(dtype).contiguous()}

    return {"vector": shared_MN}, map(own, tasks)


def _decode(base_X: Tensor, once: dict[str, Tensor], own: dict[str, Tensor], **_: Any) -> Tensor:
    return own["whole"] if "whole" in own else base_X.double() + once["vector"].double() + low_rank(own)


@method(
    family="store",
    paper="2406.15479",
    code="LZY-the-boys/Twin-Merging@f481c608",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    store=Store(_parts, _encode, _decode),
)
def twin(
    x: Slot,
    merge: Inner,
    *,
    rank: Annotated[float, Gt(0), Le(1)] = 0.1,
    inner: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    router: Literal["one_hot"] = "one_hot",
    task: Annotated[int, Ge(0)] = 0,
    keys: Keys = "matrices",
    stored: Stored | None = None,
) -> Tensor:
    """shared + the rank-k part of (expert number `task` - shared), shared the inner merge; other tensors in full.

    The shared task vector and the factors are rounded to the dtype `stored`, by default float32, as a compressed store
    keeps them. The inner method's parameters stand beside these.

    Formula:
        θₛ = the inner merge;  θₛ + P_k(θₜ − θₛ), t = task;  k = int(rank · min(M, N))
    Parameters:
        rank: share of full rank that is kept of what is exclusively one's
        router: one_hot takes one expert's exclusive part
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert
    Trap:
        k has no least of 1: a small `rank` leaves nothing exclusive. The official router, which is trained
        and weighs several experts for every input, is not included.
    """
    once, [own] = _encode(x, merge, [task], rank=rank, keys=keys, stored=stored)
    return _decode(x.base, once, own)
