"""ExPO: further in the direction in which an expert went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import spectral
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="elementwise",
    paper="2404.16792",
    reference="pretrained",
    needs_base=True,
    maximum_experts=1,
    as_factors=lambda x, scale: spectral.weighted_factors(x, [1 + scale]),
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
    return (expert - x.base).mul_(scale).add_(expert)
