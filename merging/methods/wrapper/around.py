"""Task vectors around another reference than the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


@method(paper="2412.12153", code="david3684/AdaRank@dfa53581", reference="none")
def around(x: Slot, merge: Inner, *, inner: str = "task_arithmetic", origin: str = "mean") -> Tensor:
    """Another merge, whose base is what a third one makes of the experts: `mean`, or any method that wraps none.

    Its task vectors are expert - origin: those around the mean are centred. The parameters of the origin stand beside
    these as origin_scale, origin_rank, ..., and so do the inner method's.

    Formula:
        inner merge with θₒ in the place of θ₀: τₜ = θₜ − θₒ, θₒ = the merge `origin`
    Parameters:
        origin: mean, or a method that wraps none; its parameters stand beside these as origin_...
    Trap:
        Task vectors around the mean sum to zero: an inner method that only sums, such as the default, gives
        the mean back, and where ties keeps an entry of every expert, rounding elects its sign.
    """
    return merge.weights()
