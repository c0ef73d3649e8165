"""Fisher-weighted averaging: every entry is averaged with the experts' diagonal Fisher information as weights."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from merging import operators as ops
from merging.methods import method
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor


def needs_fisher(_: Any) -> list[str]:
    """The statistics of methods that weigh entries by a diagonal Fisher, or by Adam's second moments."""
    return ["fisher"]


def _energies(view: View) -> list[float]:
    """Sum of squares of one tensor of each expert's Fisher."""
    energy_T = [0.0] * len(view.source.experts)
    for x in view.blocks("element"):
        for t in range(len(energy_T)):
            energy_T[t] += float(x.positive_statistic("fisher", t).double().square().sum())
    return energy_T


def norms(inputs: Inputs, *, normalize_fisher: str, **_: Any) -> list[float]:
    """The L2 norm of each expert's Fisher over the whole model."""
    return [sqrt(sum(energies)) for energies in zip(*inputs.each(_energies))]


def tensor_norms(view: View, *, normalize_fisher: str, **_: Any) -> list[float] | None:
    """The same over one tensor."""
    return list(map(sqrt, _energies(view))) if normalize_fisher == "tensor" else None


@method(
    family="statistics",
    paper="2111.09832",
    code="mmatena/model_merging@46802f98",
    reference="none",
    prepass=norms,
    prepass_if=lambda params: params["normalize_fisher"] == "global",
    measure=tensor_norms,
    statistics=needs_fisher,
)
def fisher(
    x: Slot,
    *,
    weights: list[float] | None = None,
    floor: Annotated[float, Ge(0)] = 1e-6,
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
    for t, norm in enumerate(x.measured or x.facts or ()):
        scale_T[t] /= (norm if official else norm + floor) or 1.0

    def lifted(t: int) -> Tensor:
        fisher_X = x.positive_statistic("fisher", t).to(x.precision)
        if not official:
            return fisher_X + floor
        return fisher_X.clamp(min=floor) if t == 0 or not favor_target else fisher_X

    return ops.weighted_mean(x, lambda t: lifted(t) * scale_T[t])
