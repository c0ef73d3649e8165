"""Consensus TIES: of a TIES merge, only what serves several experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.elementwise.ties import merged_task_vector, trim
from mergeline.merging.methods.parameters import Count, NotNegative, Share

if TYPE_CHECKING:
    from torch import Tensor


def thresholds(views: Views, *, density: float) -> dict[str, Any]:
    """What TIES must know of the whole model."""
    return trim(views, density=density, variant="official")


@method(
    paper="2405.07813",
    code="nik-dim/tall_masks@d10af8b2",
    scale=0.4,
    experts=(2, None),
    needs=("base",),
    measure=Look(thresholds, over="model"),
)
def consensus_ties(
    x: Slot,
    *,
    threshold: NotNegative = 0.4,
    min_tasks: Count = 2,
    density: Share = 0.2,
    reduce: Literal["mean", "sum", "max"] = "sum",
) -> Tensor:
    """base + scale * the entries of the TIES-merged task vector that serve at least `min_tasks` experts.

    An entry serves an expert where |tau| > threshold * |merged - tau|, for the task vector before it is trimmed.

    Formula:
        m = the TIES merge of the density largest entries of the τₜ
        c = how many t have |τₜ| > threshold · |m − τₜ|, entry by entry
        θ₀ + scale · [c ≥ min_tasks] ⊙ m
    Parameters:
        threshold: how large an entry must be beside its distance from the merged one
        min_tasks: the least number of experts that an entry must serve
    Trap:
        m is the TIES sum, not its mean, which is the default of ties by itself; masks look at task vectors
        before they are trimmed.
    """
    merged_X = merged_task_vector(x, x.found, reduce)
    return combine.consensus(x.task_vectors, merged_X, threshold, min_tasks)
