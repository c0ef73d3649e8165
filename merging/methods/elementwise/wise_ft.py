"""WiSE-FT: between a model and what was fine-tuned from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from mergeline.merging.algebra import directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import Factors, method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2109.01903",
    code="mlfoundations/model-soups@d5398f18",
    experts=(1, 1),
    needs=("base",),
    factors=Factors(lambda x, scale: directions.weighted_factors(x, [scale])),
)
def wise_ft(x: Slot, *, scale: Annotated[float, Ge(0), Le(1)] = 0.75) -> Tensor:
    """(1 - scale) * base + scale * expert.

    Formula:
        (1 − scale) · θ₀ + scale · θ₁
    Parameters:
        scale: the share of the fine-tuned side
    Trap:
        `scale` multiplies the fine-tuned model, not the base.
    """
    return (x.experts[0].to(x.precision) - x.reference).mul_(scale)
