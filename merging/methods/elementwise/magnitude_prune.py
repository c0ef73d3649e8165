"""Magnitude pruning: task arithmetic with the largest entries of the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import quantiles, sparsify, sums
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Share

if TYPE_CHECKING:
    from torch import Tensor


def thresholds(views: Views, *, density: float) -> list[float]:
    """The smallest magnitude that is kept of each task vector, over the model or a tensor."""
    place = quantiles.place_of_largest(views.elements, density)
    return quantiles.magnitude_thresholds(views.total, [place] * views.experts)


@method(
    paper="Han et al. 2015",
    scale=0.3,
    needs=("base",),
    measure=Look(thresholds, over=lambda params: "model" if params["scope"] == "global" else "tensor"),
)
def magnitude_prune(
    x: Slot, *, density: Share = 0.2, scope: Literal["global", "tensor"] = "global"
) -> Tensor:
    """base + scale * sum of the largest entries of each task vector.

    Of n entries (of the whole model, or of a tensor) the int(n * density) largest are kept, at least one; all that
    equal the smallest of them are kept too.

    Formula:
        τ̂ₜ = the int(n · density) largest entries of τₜ
        θ₀ + scale · Σₜ τ̂ₜ
    Trap:
        All entries that equal the smallest one kept are kept too: of weights in 16 bits, more than `density`
        says.
    """
    return sums.total(sparsify.trimmed(x, x.found))
