"""EMA: an exponential moving average of the checkpoints of one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Lt

from mergeline.merging.algebra import sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import PositiveCount

if TYPE_CHECKING:
    from torch import Tensor


@method(paper="Polyak & Juditsky 1992", reference="none")
def ema(
    x: Slot, *, decay: Annotated[float, Gt(0), Lt(1)] = 0.9, window: PositiveCount | None = None
) -> Tensor:
    """decay * average so far + (1 - decay) * expert, from the first expert to the last.

    Formula:
        aₜ = decay · aₜ₋₁ + (1 − decay) · θₜ, from a₁ = θ₁; the result is a_T
    Parameters:
        decay: what the average so far keeps of itself at every step
        window: how many of the last checkpoints count; by default all
    Needs:
        checkpoints of one run
    Trap:
        The order of the experts is that of time, and changes the result.
    """
    count = min(window or len(x.experts), len(x.experts))
    weights = [decay ** (count - 1)] + [(1 - decay) * decay ** (count - 1 - i) for i in range(1, count)]
    last = (x.experts[t] for t in range(len(x.experts) - count, len(x.experts)))
    return sums.weighted_sum(last, weights, x.precision)
