"""Twin-Merging without its router: what all experts share, merged, and what is exclusively one's, cut to low rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

from mergeline.merging.algebra import decompositions, directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share, Task
from mergeline.merging.methods.store.cart_indexing import low_rank, low_rank_parts
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


def _rank(rank: float, shape: Sequence[int]) -> int:
    return int(rank * min(shape))


def _parts(shape: Sequence[int], _experts: int, *, rank: float, **_: Any) -> Parts:
    return {"vector": Part("number", tuple(shape))}, low_rank_parts(shape, _rank(rank, shape))


def _encode(
    x: Slot, merge: Inner, tasks: Sequence[int], *, rank: float, stored: Stored | None, **_: Any
) -> Encoded:
    dtype, k = stored_dtype(x, stored), _rank(rank, x.shape)
    shared_MN = merge.update().to(dtype)
    exclusive = x.moved_by(shared_MN)

    def own(t: int) -> dict[str, Tensor]:
        tau_MN = directions.task_vector(exclusive, t)
        _, q_RK = decompositions.leading(linear.gram(tau_MN), k)
        left_MK, right_NK = decompositions.projected(tau_MN, q_RK)
        return {"left": left_MK.to(dtype).contiguous(), "right": right_NK.to(dtype).contiguous()}

    return {"vector": shared_MN}, map(own, tasks)


def _decode(
    once: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    _shape: Sequence[int],
    _dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    return once["vector"].double() + low_rank(own)


STORE = Store(_parts, _encode, _decode)


@method(
    paper="2406.15479",
    code="LZY-the-boys/Twin-Merging@f481c608",
    keys="matrices",
    other="task",
    needs=("base",),
    spectral=True,
    store=STORE,
)
def twin(
    x: Slot,
    merge: Inner,
    *,
    rank: Share = 0.1,
    inner: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    router: Literal["one_hot"] = "one_hot",
    task: Task = 0,
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
        k has no least of 1: a small `rank` leaves nothing exclusive. The official router, which is trained,
        weighs several experts for every input; `routed_by_network` is trained and takes one.
    """
    return given_back(STORE, x, merge, task=task, rank=rank, stored=stored)
