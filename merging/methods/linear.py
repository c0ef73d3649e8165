"""Linear merging: a weighted soup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import operators as ops
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(family="elementwise", paper="2203.05482", code="arcee-ai/mergekit@a6e40288", reference="none")
def linear(x: Slot, *, weights: list[float] | None = None, normalize: bool = True) -> Tensor:
    """The sum of weight * expert, by default over the sum of the weights.

    Formula:
        Σₜ wₜ θₜ / Σₜ wₜ
    Trap:
        With `normalize: false`, weights that do not sum to 1 stretch or shrink everything, the gains of norms
        too.
    """
    total = ops.weighted_sum(x.experts, weights, x.precision)
    return total / (sum(weights) if weights else len(x.experts)) if normalize else total
