"""Fisher-weighted averaging: every entry is averaged with the experts' diagonal Fisher information as weights."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, Mapping

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import NotNegative, Weights

if TYPE_CHECKING:
    from torch import Tensor


def _energies(view: View) -> list[float]:
    """Sum of squares of one tensor of each expert's Fisher."""
    energy_T = [0.0] * len(view.experts)
    for x in view.blocks("element"):
        for t in range(len(energy_T)):
            energy_T[t] += float(x.statistic("fisher", t).double().square().sum())
    return energy_T


def norms(views: Views) -> list[float]:
    """The L2 norm of each expert's Fisher over the model, or a tensor."""
    return [sqrt(sum(energies)) for energies in zip(*views.each(_energies))]


def _over(params: Mapping[str, Any]) -> Literal["model", "tensor"] | None:
    over: dict[str, Literal["model", "tensor"]] = {"global": "model", "tensor": "tensor"}
    return over.get(params["normalize_fisher"])


@method(
    paper="2111.09832",
    code="mmatena/model_merging@46802f98",
    reference="none",
    needs=("fisher",),
    measure=Look(norms, over=_over),
)
def fisher(
    x: Slot,
    *,
    weights: Weights | None = None,
    floor: NotNegative = 1e-6,
    favor_target: bool = True,
    normalize_fisher: Literal["global", "tensor", "none"] = "global",
    variant: Literal["official", "mergelm", "dataless"] = "official",
) -> Tensor:
    """sum of weight * F * expert over the sum of weight * F, entry by entry, F the expert's diagonal Fisher.

    Weights are first divided by the L2 norm of F, over the model or the tensor. The official code lifts F to `floor`,
    but only the first expert's with `favor_target`, which keeps that expert where no other cares; mergelm and dataless
    add `floor` to every F and to the norms. Where all F are 0 it is the mean.

    Formula:
        Σₜ wₜ Fₜ ⊙ θₜ / Σₜ wₜ Fₜ, Fₜ the diagonal Fisher over its norm
    Parameters:
        floor: the least Fisher, or what is added to it
        favor_target: lift the first expert's Fisher alone
        normalize_fisher: over what the norm of a Fisher is taken
    Trap:
        A `floor` above real Fishers, which are often 1e-8, makes the plain average. The official code lifts
        the first expert's only, so their order matters.
    """
    official = variant == "official"
    scale_T = list(weights or [1.0] * len(x.experts))
    for t, norm in enumerate(x.found or ()):
        scale_T[t] /= (norm if official else norm + floor) or 1.0

    def lifted(t: int) -> Tensor:
        fisher_X = x.statistic("fisher", t).to(x.precision)
        if not official:
            return fisher_X + floor
        return fisher_X.clamp(min=floor) if t == 0 or not favor_target else fisher_X

    return combine.weighted_mean(x, lambda t: lifted(t) * scale_T[t])
