"""Task arithmetic: adding, negating and combining task vectors."""

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
    total = sum(weights) if normalize else 1.0
    return directions.weighted_factors(x, [weight / total for weight in weights])


@method(
    paper="2212.04089",
    code="mlfoundations/task_vectors@826a64c6",
    scale=0.3,
    needs=("base",),
    factors=Factors(_factors),
)
def task_arithmetic(x: Slot, *, weights: Weights | None = None, normalize: bool = False) -> Tensor:
    """base + scale * sum of weight * task vector.

    One weight an expert, 1 by default: [-1] negates, [-1, 1, 1] on (A, B, C) is the analogy C + (B - A).
    `normalize` divides by the sum of the weights.

    Formula:
        θ₀ + scale · Σₜ wₜ τₜ
    Parameters:
        weights: one number an expert, in their order, 1 by default; negative ones negate
    Trap:
        It is the sum, not the mean: at a fixed `scale` more experts move the model further from the base.
    """
    base = x.reference.to(x.precision)
    taus = (
        expert.to(x.precision) - base for expert in x.experts
    )  # of 16-bit weights exact, unlike sums of weights
    sum_X = sums.weighted_sum(taus, weights, x.precision)
    return sum_X.mul_(1 / (sum(weights) if weights else len(x.experts))) if normalize else sum_X
