"""Linear merging: a weighted soup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import directions, sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import Factors, method
from mergeline.merging.methods.parameters import Weights

if TYPE_CHECKING:
    from torch import Tensor


def _factors(x: Slot, *, weights: list[float] | None, normalize: bool) -> tuple[Tensor, Tensor]:
    weights = weights or [1.0] * len(x.experts)
    return directions.weighted_factors(x, [weight / sum(weights) for weight in weights])


@method(
    paper="2203.05482",
    code="arcee-ai/mergekit@a6e40288",
    reference="none",
    # Not normalised, the base may count more or less than once.
    factors=Factors(_factors, when=lambda params: params["normalize"]),
)
def linear(x: Slot, *, weights: Weights | None = None, normalize: bool = True) -> Tensor:
    """The sum of weight * expert, by default over the sum of the weights.

    Formula:
        Σₜ wₜ θₜ / Σₜ wₜ
    Trap:
        With `normalize: false`, weights that do not sum to 1 stretch or shrink everything, the gains of norms
        too.
    """
    total = sums.weighted_sum(x.experts, weights, x.precision)
    return total / (sum(weights) if weights else len(x.experts)) if normalize else total
