"""TALL masks: one expert given back from the merged task vector and a mask of what of it matters to this task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative, Task
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


def _parts(shape: Sequence[int], _experts: int, **_: Any) -> Parts:
    return {"vector": Part("number", tuple(shape))}, {"mask": Part("bits", tuple(shape))}


def _encode(
    x: Slot, merge: Inner, tasks: Sequence[int], *, threshold: float, stored: Stored | None, **_: Any
) -> Encoded:
    merged_X = merge.update().to(x.dtype)
    masks = ({"mask": combine.task_mask(x.task_vectors[t], merged_X, threshold)} for t in tasks)
    return {"vector": merged_X.to(stored_dtype(x, stored))}, masks


def _decode(
    once: Mapping[str, Tensor], own: Mapping[str, Tensor], _shape: Sequence[int], dtype: torch.dtype, **_: Any
) -> Tensor:
    return once["vector"].to(dtype) * own["mask"]


STORE = Store(_parts, _encode, _decode)


@method(
    paper="2405.07813",
    code="nik-dim/tall_masks@d10af8b2",
    scale=1.0,
    needs=("base",),
    inner_defaults={"scale": 1.0, "reduce": "sum"},
    store=STORE,
)
def tall_mask(
    x: Slot,
    merge: Inner,
    *,
    inner: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    threshold: NotNegative = 0.4,
    task: Task = 0,
    stored: Stored | None = None,
) -> Tensor:
    """base + scale * the entries of the merged task vector m with |tau| > threshold * |m - tau|, tau of expert `task`.

    m is what the inner method adds to the base, whose parameters stand beside these; its scale (`inner_scale`) is 1,
    and ties sums. It is rounded to the dtype `stored`, by default float32, as a compressed store keeps it.

    Formula:
        m = what the inner method adds to the base
        θ₀ + scale · m ⊙ [|τₜ| > threshold · |m − τₜ|], t = task
    Parameters:
        threshold: how large an entry must be beside its distance from the merged one
    Trap:
        Masks are made from the merged task vector as it is stored, so inner_scale stays 1; the comparison is
        strict, and an unchanged entry is never taken.
    """
    return given_back(STORE, x, merge, task=task, threshold=threshold, stored=stored)
