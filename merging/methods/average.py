"""Weight averaging, the uniform soup."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import operators as ops
from merging import spectral
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="elementwise",
    paper="2203.05482",
    code="yule-BUAA/MergeLM@6d49ad96",
    reference="mean",
    as_factors=lambda x: spectral.weighted_factors(x, [1 / len(x.experts)] * len(x.experts)),
)
def average(x: Slot) -> Tensor:
    """The mean of the experts.

    Formula:
        (1/T) Σₜ θₜ
    Trap:
        Integer buffers are copied and must agree; experts of different bases average to nothing useful.
    """
    return ops.mean(x.experts, x.precision)
