"""One expert as it is, or scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


@method(paper="mergekit", code="arcee-ai/mergekit@a6e40288", reference="none", experts=(1, 1))
def passthrough(x: Slot, *, scale: float = 1.0) -> Tensor:
    """scale * the one expert.

    Formula:
        scale · θ₁
    Parameters:
        scale: what the weights themselves are multiplied by
    Trap:
        `scale` multiplies the weights, not a task vector.
    """
    return x.experts[0] * scale
