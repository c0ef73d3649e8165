"""LoSparse: a model's weights given back from low-rank factors and a few rows of what they leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging.algebra import low_rank_sparse
from mergeline.merging.algebra.low_rank_sparse import LowRankSparse
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Rate, Share, Task
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


def _sizes(shape: Sequence[int], parameter_ratio: float, sparse_ratio: float) -> tuple[int, int]:
    rank = low_rank_sparse.rank_for_parameters(parameter_ratio, shape)
    return rank, low_rank_sparse.row_count(sparse_ratio, shape)


def _parts(
    shape: Sequence[int], _experts: int, *, parameter_ratio: float, sparse_ratio: float, **_: Any
) -> Parts:
    rank, rows = _sizes(shape, parameter_ratio, sparse_ratio)
    factors = {"left": Part("number", (shape[0], rank)), "right": Part("number", (rank, shape[1]))}
    sparse = {"kept": Part("bits", (shape[0],)), "rows": Part("number", (rows, shape[1]))} if rows else {}
    return {}, factors | sparse


def _encode(
    x: Slot,
    tasks: Sequence[int],
    *,
    parameter_ratio: float,
    sparse_ratio: float,
    stored: Stored | None,
    **_: Any,
) -> Encoded:
    rank, rows = _sizes(x.shape, parameter_ratio, sparse_ratio)

    def own(t: int) -> dict[str, Tensor]:
        found = low_rank_sparse.split(x.experts[t].double(), rank, rows, stored_dtype(x, stored))
        sparse = {"kept": found.kept_M, "rows": found.rows_PN} if rows else {}
        return {"left": found.left_MK, "right": found.right_KN, **sparse}

    return {}, map(own, tasks)


def _decode(
    _once: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    shape: Sequence[int],
    _dtype: torch.dtype,
    **_: Any,
) -> Tensor:
    left_MK, right_KN = own["left"], own["right"]
    kept_M = own["kept"] if "kept" in own else torch.zeros(shape[0], dtype=torch.bool, device=left_MK.device)
    rows_PN = own.get("rows", right_KN[:0])
    if int(kept_M.sum()) != len(rows_PN):
        raise UserError(
            f"the store was damaged: it marks {int(kept_M.sum())} rows and keeps {len(rows_PN)}; copy it again"
        )
    return LowRankSparse(left_MK, right_KN, kept_M, rows_PN).dense()


STORE = Store(_parts, _encode, _decode)


@method(
    paper="2306.11222",
    code="UNITES-Lab/MC-SMoE@4a195b17",
    reference="none",
    keys="block_linear",
    other="task",
    spectral=True,
    store=STORE,
)
def losparse(
    x: Slot,
    *,
    parameter_ratio: Share = 0.15,
    sparse_ratio: Rate = 0.1,
    task: Task = 0,
    stored: Stored | None = None,
) -> Tensor:
    """L R + S of the weights of expert number `task`: low rank, and a few rows of the rest; other tensors in full.

    The form in which MC-SMoE (2310.01334) keeps merged experts, before its training: `include: "*experts*"` makes it
    that of a mixture's experts alone. It needs no base and no data. Numbers are rounded to the dtype `stored`, by
    default float32, as a compressed store keeps them.

    Formula:
        L = U S^½, R = S^½ Vᵀ of the k leading singular triplets of θₜ, t = task;  k = ⌈parameter_ratio · MN / (M + N)⌉
        L R + the int(sparse_ratio · M) rows of θₜ − L R that have the largest mean magnitude
    Parameters:
        parameter_ratio: numbers of both factors over those of the matrix
        sparse_ratio: share of the rows of the rest that is kept
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert
    Trap:
        The official code trains factors and rest, and prunes rows by their gradients with one threshold for all
        matrices; this is where it begins, with each matrix's own rows: expect to train what comes out.
    """
    params = {"parameter_ratio": parameter_ratio, "sparse_ratio": sparse_ratio}
    return given_back(STORE, x, task=task, stored=stored, **params)
