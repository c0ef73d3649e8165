"""EMR-Merging: elect one unified task vector, mask it and rescale it for each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping, Sequence

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Task
from mergeline.merging.methods.stored import Encoded, Part, Parts, Store, Stored, given_back, stored_dtype

if TYPE_CHECKING:
    from torch import Tensor


def _unified(x: Slot) -> tuple[Tensor, Tensor]:
    """The elected sign, negative where the mean is 0, and the largest entry that has it: (X), (X)."""
    sign_X = combine.elect_signs(x.task_vectors, None, -1.0)
    return sign_X, combine.largest_aligned(x.task_vectors, sign_X)


def rescalers(views: Views) -> list[float]:
    """Sum over tensors of the mean |task vector|, over that of the masked unified vector; one an expert."""

    def means(view: View) -> Tensor:
        total_2T = torch.zeros(2, len(view.experts), dtype=torch.float64)
        for x in view.blocks("element"):
            sign_X, unified_X = _unified(x)
            for t, tau_X in enumerate(x.task_vectors):
                total_2T[0, t] += tau_X.abs().sum(dtype=torch.float64).cpu()
                total_2T[1, t] += unified_X[tau_X * sign_X > 0].abs().sum(dtype=torch.float64).cpu()
        return total_2T / view.elements

    whole_T, masked_T = sum(views.each(means))
    return torch.where(masked_T > 0, whole_T / masked_T, 1.0).tolist()


def _parts(shape: Sequence[int], _experts: int, **_: Any) -> Parts:
    own = {"mask": Part("bits", tuple(shape)), "rescaler": Part("fact")}
    return {"vector": Part("number", tuple(shape))}, own


def _encode(x: Slot, tasks: Sequence[int], *, stored: Stored | None, **_: Any) -> Encoded:
    sign_X, unified_X = _unified(x)
    own = ({"mask": x.task_vectors[t] * sign_X > 0, "rescaler": x.found[t]} for t in tasks)
    return {"vector": unified_X.to(stored_dtype(x, stored))}, own


def _decode(
    once: Mapping[str, Tensor], own: Mapping[str, Any], _shape: Sequence[int], dtype: torch.dtype, **_: Any
) -> Tensor:
    return (once["vector"].to(dtype) * own["mask"]).mul_(float(own["rescaler"]))


STORE = Store(_parts, _encode, _decode)


@method(
    paper="2405.17461",
    code="harveyhuang18/EMR_Merging@cc225ecb",
    experts=(2, None),
    needs=("base",),
    measure=Look(rescalers, over="model"),
    store=STORE,
)
def emr(x: Slot, *, task: Task = 0, stored: Stored | None = None) -> Tensor:
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
    return given_back(STORE, x, task=task, stored=stored)
