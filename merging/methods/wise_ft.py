"""WiSE-FT: between a model and what was fine-tuned from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from merging import spectral
from merging.methods import method
from merging.methods.task_arithmetic import task_arithmetic
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="elementwise",
    paper="2109.01903",
    code="mlfoundations/model-soups@d5398f18",
    reference="pretrained",
    needs_base=True,
    maximum_experts=1,
    as_factors=lambda x, scale: spectral.weighted_factors(x, [scale]),
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
    return task_arithmetic(x, scale=scale)
