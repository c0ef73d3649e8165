"""NearSwap: towards another model where the two are close, by a small step elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="alchemonaut/QuartetAnemoi-70B-t0.0001 (model card)",
    code="arcee-ai/mergekit@a6e40288",
    experts=(1, 1),
    needs=("base",),
)
def nearswap(x: Slot, *, threshold: NotNegative = 1e-4) -> Tensor:
    """base + (expert - base), clamped to [-threshold, threshold].

    The published form is the interpolation weight min(1, threshold / |expert - base|),
    whose official code does not divide by less than 1e-6.

    Formula:
        θ₀ + clip(θ₁ − θ₀, −threshold, threshold)
    Parameters:
        threshold: the largest step of an entry
    Needs:
        any other model in the place of the base
    Trap:
        Only close entries are taken over: far ones move by `threshold`, whatever the distance.
    """
    return x.task_vectors[0].clamp(-threshold, threshold)
