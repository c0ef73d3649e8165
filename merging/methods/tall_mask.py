"""TALL masks: one expert given back from the merged task vector and a mask of what of it matters to this task."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Sequence

from annotated_types import Ge

from merging import operators as ops
from merging.methods import Encoded, Inner, Part, Parts, Store, Stored, method, stored_dtype
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _parts(name: str, shape: Sequence[int], experts: int, **_: Any) -> Parts:
    return {"vector": Part("number", tuple(shape))}, {"mask": Part("bits", tuple(shape))}


def _encode(
    x: Slot, merge: Inner, tasks: Sequence[int], *, threshold: float, stored: Stored | None, **_: Any
) -> Encoded:
    merged_X = (merge(x).double() - x.base).to(x.dtype)
    masks = ({"mask": ops.task_mask(x.task_vectors[t], merged_X, threshold)} for t in tasks)
    return {"vector": merged_X.to(stored_dtype(x, stored))}, masks


def _decode(
    base_X: Tensor, once: dict[str, Tensor], own: dict[str, Tensor], *, scale: float, **_: Any
) -> Tensor:
    return (once["vector"].to(base_X.dtype) * own["mask"]).mul_(scale).add_(base_X)


@method(
    family="store",
    paper="2405.07813",
    code="nik-dim/tall_masks@d10af8b2",
    reference="pretrained",
    needs_base=True,
    inner_defaults=MappingProxyType({"scale": 1.0, "reduce": "sum"}),
    store=Store(_parts, _encode, _decode),
)
def tall_mask(
    x: Slot,
    merge: Inner,
    *,
    inner: Literal["task_arithmetic", "ties"] = "task_arithmetic",
    threshold: Annotated[float, Ge(0)] = 0.4,
    scale: float = 1.0,
    task: Annotated[int, Ge(0)] = 0,
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
    once, [own] = _encode(x, merge, [task], threshold=threshold, stored=stored)
    return _decode(x.base, once, own, scale=scale)
