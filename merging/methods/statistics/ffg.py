"""Fast Fisher grafting: the entries of a task vector that matter to the loss, grafted onto the base."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Callable

from mergeline.merging.algebra import quantiles
from mergeline.merging.algebra.slots import Slot, Unit, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import NotNegative, Share

if TYPE_CHECKING:
    from torch import Tensor


def significance(x: Slot, t: int, moment_X: Tensor) -> Tensor:
    """The root of v * (expert - base)^2, or of v alone without a base, whose float32 does not underflow: (X)."""
    root_X = moment_X.sqrt()
    return root_X * (x.experts[t] - x.reference).abs_() if x.has_base else root_X


def roots_for_density(
    views: Views, unit: Unit, moment: Callable[[Slot, int], Tensor], density: float
) -> list[float]:
    """What `significance` must reach, of each expert, for that share of the whole model's entries to be kept."""
    place = views.elements - max(1, int(views.elements * density)) + 1

    def rows(x: Slot) -> list[Tensor]:
        return [significance(x, t, moment(x, t)) for t in range(len(x.experts))]

    found = quantiles.kth_smallest(views.total, rows, unit, [[place]] * views.experts)
    return [root for [root] in found]


def kept(x: Slot, t: int, moment_X: Tensor, root: float) -> Tensor:
    """Which entries are significant enough; equals are kept: (X) bool."""
    return significance(x, t, moment_X).float() >= torch.tensor(root, dtype=torch.float32).item()


def _moment(x: Slot, t: int) -> Tensor:
    return x.statistic("fisher", t)


def _root(views: Views, *, density: float) -> list[float]:
    return roots_for_density(views, "element", _moment, density)


@method(
    paper="2509.11167",
    code="pmahdavi/ota-merge@eee703f5",
    reference="none",
    experts=(1, 1),
    needs=("base", "fisher"),
    measure=Look(_root, over=lambda params: "model" if params["threshold"] is None else None),
)
def ffg(x: Slot, *, density: Share = 0.4, threshold: NotNegative | None = None) -> Tensor:
    """base + the task-vector entries with v * tau^2 >= threshold, v the second moments (statistics `fisher`).

    Without a threshold the `density` largest share of the whole model's entries is kept, and those equal to the last.

    Formula:
        θ₀ + τ ⊙ [v ⊙ τ² ≥ threshold], or the density largest v ⊙ τ² of the model; v the second moments
    Parameters:
        threshold: absolute, on v · τ²; by default what `density` makes it
    Trap:
        `density` is over the whole model: some tensors may keep nothing. v is Adam's second moment, or a
        diagonal Fisher.
    """
    [root] = x.found or [sqrt(threshold or 0.0)]
    return torch.where(kept(x, 0, _moment(x, 0), root), x.experts[0], x.reference)
