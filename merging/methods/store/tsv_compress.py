"""TSV-Compress: one expert given back from the base and the leading singular vectors of its task vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Task, TaskRank
from mergeline.merging.methods.store.cart_indexing import decode_low_rank, low_rank_factors, low_rank_parts
from mergeline.merging.methods.stored import Encoded, Parts, Store, Stored, given_back

if TYPE_CHECKING:
    from torch import Tensor


def _parts(shape: Sequence[int], experts: int, *, rank: TaskRank, **_: Any) -> Parts:
    return {}, low_rank_parts(shape, directions.rank_for_task(rank, shape, experts))


def _encode(x: Slot, tasks: Sequence[int], *, rank: TaskRank, stored: Stored | None, **_: Any) -> Encoded:
    k = directions.rank_for_task(rank, x.shape, len(x.experts))
    return {}, (low_rank_factors(x, t, k, stored) for t in tasks)


STORE = Store(_parts, _encode, decode_low_rank)


@method(
    paper="2412.00081",
    code="AntoAndGar/task_singular_vectors@a6c97188",
    keys="matrices",
    other="task",
    needs=("base",),
    spectral=True,
    store=STORE,
)
def tsv_compress(x: Slot, *, rank: TaskRank = "1/T", task: Task = 0, stored: Stored | None = None) -> Tensor:
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
    return given_back(STORE, x, task=task, rank=rank, stored=stored)
