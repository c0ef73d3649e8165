"""Delta-guided fusion: weights from how far each expert moved each tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


def shares(views: Views) -> list[float]:
    """Each expert's share of the norms of a tensor's task vectors."""
    norms_T = sum(views.each(combine.squared_norms)).sqrt()
    return (norms_T / norms_T.sum().clamp(min=1e-300)).tolist()


@method(paper="2508.11442", reference="none", needs=("base",), measure=shares)
def delta_guided(x: Slot) -> Tensor:
    """base + sum of |tau_t| / sum of |tau| * tau_t, norms over each tensor.

    Formula:
        θ₀ + Σₜ (‖τₜ‖ / Σₛ ‖τₛ‖) τₜ, norms over each tensor
    Trap:
        Reconstructed: the paper's published code holds no merge. A tensor that no expert changed is the
        base's.
    """
    return combine.combination(x, x.found)
