"""Weight averaging, the uniform soup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import directions, sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import Factors, method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2203.05482",
    code="yule-BUAA/MergeLM@6d49ad96",
    reference="none",
    factors=Factors(lambda x: directions.weighted_factors(x, [1 / len(x.experts)] * len(x.experts))),
)
def average(x: Slot) -> Tensor:
    """The mean of the experts.

    Formula:
        (1/T) Σₜ θₜ
    Trap:
        Integer buffers are copied and must agree; experts of different bases average to nothing useful.
    """
    return sums.mean(x.experts, x.precision)
