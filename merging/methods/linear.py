"""Linear merging: a weighted soup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import operators as ops
from merging import spectral
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _factors(x: Slot, *, weights: list[float] | None, normalize: bool) -> tuple[Tensor, Tensor]:
    weights = weights or [1.0] * len(x.experts)
    return spectral.weighted_factors(x, [weight / sum(weights) for weight in weights])


@method(
    family="elementwise",
    paper="2203.05482",
    code="arcee-ai/mergekit@a6e40288",
    reference="none",
    as_factors=_factors,
    as_factors_if=lambda params: params["normalize"],  # else the base may count more or less than once
)
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
