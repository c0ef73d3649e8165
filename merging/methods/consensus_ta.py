"""Consensus task arithmetic: only what serves several experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from merging import operators as ops
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="elementwise",
    paper="2405.07813",
    code="nik-dim/tall_masks@d10af8b2",
    reference="pretrained",
    needs_base=True,
    minimum_experts=2,
)
def consensus_ta(
    x: Slot,
    *,
    threshold: Annotated[float, Ge(0)] = 0.4,
    min_tasks: Annotated[int, Ge(0)] = 2,
    scale: float = 0.4,
) -> Tensor:
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
    return ops.consensus(tau_TX, ops.total(tau_TX), threshold, min_tasks).mul_(scale).add_(x.base)
