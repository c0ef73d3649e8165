"""ExPO: further in the direction in which an expert went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import Factors, method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2404.16792",
    reference="none",
    experts=(1, 1),
    needs=("base",),
    factors=Factors(lambda x, scale: directions.weighted_factors(x, [1 + scale])),
)
def expo(x: Slot, *, scale: float = 0.5) -> Tensor:
    """expert + scale * (expert - base).

    Formula:
        θ₁ + scale · (θ₁ − θ₀)
    Parameters:
        scale: how much further than the expert
    Trap:
        It extrapolates: `scale: 0` is the expert, not the base.
    """
    expert = x.experts[0].to(x.precision)
    return (expert - x.reference).mul_(scale).add_(expert)
