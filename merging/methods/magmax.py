"""MagMax: of each entry of the task vectors, the largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import operators as ops
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="elementwise",
    paper="2407.06322",
    code="danielm1405/magmax@4f49f18f",
    reference="pretrained",
    needs_base=True,
)
def magmax(x: Slot, *, scale: float = 0.5) -> Tensor:
    """base + scale * the task-vector entry of largest magnitude.

    Formula:
        θ₀ + scale · τₛ, s = argmaxₜ |τₜ|, entry by entry
    Trap:
        Of equal magnitudes the later expert's counts. Made for experts that were fine-tuned one after the
        other.
    """
    return (ops.largest(x.task_vectors) * scale).add_(x.base)
