"""Consensus task arithmetic: only what serves several experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine, sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Count, NotNegative

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2405.07813",
    code="nik-dim/tall_masks@d10af8b2",
    scale=0.4,
    experts=(2, None),
    needs=("base",),
)
def consensus_ta(x: Slot, *, threshold: NotNegative = 0.4, min_tasks: Count = 2) -> Tensor:
    """base + scale * the entries of the sum of task vectors that serve at least `min_tasks` experts.

    An entry serves an expert where |tau| > threshold * |sum - tau|.

    Formula:
        c = how many t have |τₜ| > threshold · |Σₛ τₛ − τₜ|, entry by entry
        θ₀ + scale · [c ≥ min_tasks] ⊙ Σₜ τₜ
    Parameters:
        threshold: how large an entry must be beside what the other task vectors add to it
        min_tasks: the least number of experts that an entry must serve
    Trap:
        Masks are made from the sum before it is scaled. With `min_tasks: 0` it is task arithmetic, with more
        than there are experts the base.
    """
    tau_TX = x.task_vectors
    return combine.consensus(tau_TX, sums.total(tau_TX), threshold, min_tasks)
