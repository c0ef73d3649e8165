"""MagMax: of each entry of the task vectors, the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


@method(paper="2407.06322", code="danielm1405/magmax@4f49f18f", scale=0.5, needs=("base",))
def magmax(x: Slot) -> Tensor:
    """base + scale * the task-vector entry of largest magnitude.

    Formula:
        θ₀ + scale · τₛ, s = argmaxₜ |τₜ|, entry by entry
    Trap:
        Of equal magnitudes the later expert's counts. Made for experts that were fine-tuned one after the
        other.
    """
    return combine.largest(x.task_vectors)
