"""Magnitude pruning: task arithmetic with the largest entries of the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le

from merging import operators as ops
from merging.methods import method
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor


def thresholds(inputs: Inputs, *, density: float, **_: Any) -> list[float]:
    """The smallest magnitude that is kept of each task vector, over the whole model."""
    place = ops.place_of_largest(inputs.elements, density)
    return ops.magnitude_thresholds(inputs.each, [place] * len(inputs.views[0].source.experts))


def tensor_thresholds(view: View, *, density: float, scope: str, **_: Any) -> list[float] | None:
    """The same for one tensor, unless the whole model was measured."""
    if scope == "global":
        return None
    place = ops.place_of_largest(view.elements, density)
    return ops.magnitude_thresholds(lambda function: [function(view)], [place] * len(view.source.experts))


@method(
    family="elementwise",
    paper="Han et al. 2015",
    reference="pretrained",
    needs_base=True,
    prepass=thresholds,
    prepass_if=lambda params: params["scope"] == "global",
    measure=tensor_thresholds,
)
def magnitude_prune(
    x: Slot,
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    scope: Literal["global", "tensor"] = "global",
    scale: float = 0.3,
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
    tau_TX = ops.trimmed(x, x.measured or x.facts)
    return ops.total(tau_TX).mul_(scale).add_(x.base)
