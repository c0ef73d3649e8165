"""Task arithmetic: adding, negating and combining task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import operators as ops
from merging import spectral
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _factors(
    x: Slot, *, scale: float, weights: list[float] | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    weights = weights or [1.0] * len(x.experts)
    total = sum(weights) if normalize else 1.0
    return spectral.weighted_factors(x, [scale / total * weight for weight in weights])


@method(
    family="elementwise",
    paper="2212.04089",
    code="mlfoundations/task_vectors@826a64c6",
    reference="pretrained",
    needs_base=True,
    as_factors=_factors,
)
def task_arithmetic(
    x: Slot, *, scale: float = 0.3, weights: list[float] | None = None, normalize: bool = False
) -> Tensor:
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
    weights = weights or [1.0] * len(x.experts)
    if normalize:
        scale = scale / sum(weights)
    base = x.base.to(x.precision)
    taus = (expert.to(x.precision) - base for expert in x.experts)  # of 16-bit weights exact, unlike sums of weights
    return ops.weighted_sum(taus, weights, x.precision).mul_(scale).add_(base)
