"""EMR-Merging: elect one unified task vector, mask it and rescale it for each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Sequence

from annotated_types import Ge

from merging import operators as ops
from merging.lazy import torch
from merging.methods import Encoded, Part, Parts, Store, Stored, method, stored_dtype
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor


def _unified(x: Slot) -> tuple[Tensor, Tensor]:
    """The elected sign, negative where the mean is 0, and the largest entry that has it: (X), (X)."""
    sign_X = ops.elect_signs(x.task_vectors, None, -1.0)
    return sign_X, ops.largest_aligned(x.task_vectors, sign_X)


def rescalers(inputs: Inputs, **_: Any) -> list[float]:
    """Sum over tensors of the mean |task vector|, over that of the masked unified vector; one an expert."""

    def means(view: View) -> Tensor:
        total_2T = torch.zeros(2, len(view.source.experts), dtype=torch.float64)
        for x in view.blocks("element"):
            sign_X, unified_X = _unified(x)
            for t, tau_X in enumerate(x.task_vectors):
                total_2T[0, t] += tau_X.abs().sum(dtype=torch.float64).cpu()
                total_2T[1, t] += unified_X[tau_X * sign_X > 0].abs().sum(dtype=torch.float64).cpu()
        return total_2T / view.elements

    whole_T, masked_T = sum(inputs.each(means))
    return torch.where(masked_T > 0, whole_T / masked_T, 1.0).tolist()


def _parts(name: str, shape: Sequence[int], experts: int, **_: Any) -> Parts:
    own = {"mask": Part("bits", tuple(shape)), "rescaler": Part("fact")}
    return {"vector": Part("number", tuple(shape))}, own


def _encode(x: Slot, tasks: Sequence[int], *, stored: Stored | None, **_: Any) -> Encoded:
    sign_X, unified_X = _unified(x)
    own = ({"mask": x.task_vectors[t] * sign_X > 0, "rescaler": x.facts[t]} for t in tasks)
    return {"vector": unified_X.to(stored_dtype(x, stored))}, own


def _decode(base_X: Tensor, once: dict[str, Tensor], own: dict[str, Any], **_: Any) -> Tensor:
    return (once["vector"].to(base_X.dtype) * own["mask"]).mul_(float(own["rescaler"])).add_(base_X)


@method(
    family="store",
    paper="2405.17461",
    code="harveyhuang18/EMR_Merging@cc225ecb",
    reference="pretrained",
    needs_base=True,
    minimum_experts=2,
    prepass=rescalers,
    store=Store(_parts, _encode, _decode),
)
def emr(x: Slot, *, task: Annotated[int, Ge(0)] = 0, stored: Stored | None = None) -> Tensor:
    """base + rescaler * the entries of the unified task vector whose sign is that of expert number `task`.

    The unified vector has the sign of the mean and the largest magnitude that agrees with it. The rescaler gives an
    expert its mean magnitude back. The unified vector is rounded to the dtype `stored`, by default float32, as a
    compressed store keeps it.

    Formula:
        γ = sign(mean of the τₜ);  u = γ · (the largest |τₜ| of those that have the sign γ)
        θ₀ + rₜ · u ⊙ [τₜ ⊙ γ > 0], t = task;  rₜ = Σ_tensors mean|τₜ| / Σ_tensors mean|masked u|
    Trap:
        Every tensor counts the same in rₜ, as in the official code; the paper weighs them by size. Where the
        mean is 0 the sign is negative.
    """
    once, [own] = _encode(x, [task], stored=stored)
    return _decode(x.base, once, own)
