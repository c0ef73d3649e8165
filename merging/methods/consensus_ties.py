"""Consensus TIES: of a TIES merge, only what serves several experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from merging import operators as ops
from merging.methods import method
from merging.methods.ties import merged_task_vector, trim
from merging.slots import Inputs, Slot

if TYPE_CHECKING:
    from torch import Tensor


def thresholds(inputs: Inputs, *, density: float, **_: Any) -> dict[str, Any]:
    """What TIES must know of the whole model."""
    return trim(inputs, density=density, scope="global", variant="official")


@method(
    family="elementwise",
    paper="2405.07813",
    code="nik-dim/tall_masks@d10af8b2",
    reference="pretrained",
    needs_base=True,
    minimum_experts=2,
    prepass=thresholds,
)
def consensus_ties(
    x: Slot,
    *,
    threshold: Annotated[float, Ge(0)] = 0.4,
    min_tasks: Annotated[int, Ge(0)] = 2,
    scale: float = 0.4,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
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
    merged_X = merged_task_vector(x, x.facts, reduce)
    return ops.consensus(x.task_vectors, merged_X, threshold, min_tasks).mul_(scale).add_(x.base)
