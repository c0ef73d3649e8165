"""MetaGPT: task arithmetic with weights from the norms of the task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.methods.contract import Look, method

if TYPE_CHECKING:
    from torch import Tensor


def shares(views: Views) -> list[float]:
    """Each expert's share of the squared norms, over the whole model."""
    norms_T = sum(views.each(combine.squared_norms))
    return (norms_T / norms_T.sum().clamp(min=1e-300)).tolist()


@method(paper="2406.11385", reference="none", needs=("base",), measure=Look(shares, over="model"))
def metagpt(x: Slot) -> Tensor:
    """base + sum of |tau_t|^2 / sum of |tau|^2 * tau_t, norms over the whole model.

    Formula:
        θ₀ + Σₜ (‖τₜ‖² / Σₛ ‖τₛ‖²) τₜ, norms over the whole model
    Trap:
        The weights sum to 1, and the longest task vector dominates. There is no public code; this is the
        closed form of the paper.
    """
    return combine.combination(x, x.found)
