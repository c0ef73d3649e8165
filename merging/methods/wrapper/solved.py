"""Tensors that were solved for, in the place of what another method makes of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="Mergeline's own, of 2212.09849 (RegMean) and 2508.03121 (RegMean++)",
    reference="none",
    needs=("solved",),
)
def solved(x: Slot, merge: Inner, *, inner: str = "task_arithmetic") -> Tensor:
    """Tensors that the statistics hold, as they are; the others as another method merges them.

    The statistics `solved` are merged tensors by name, float32, which `progressive_least_squares` and `regmean_pp`
    write. The inner method's parameters stand beside these.

    Formula:
        θ as the statistics have it; where they have none, the inner merge
    Needs:
        a file of solved tensors, of the same model
    Trap:
        They were solved around what the inner method makes of all other tensors: with another inner method, or other
        parameters, the parts no longer fit one another.
    """
    if x.has_statistic("solved"):
        return x.statistic("solved").to(x.dtype)
    return merge.weights()
