"""Fast Fisher grafting: the entries of a task vector that matter to the loss, grafted onto the base."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Annotated, Any, Callable

from annotated_types import Ge, Gt, Le

from merging import operators as ops
from merging.lazy import torch
from merging.methods import method
from merging.methods.fisher import needs_fisher
from merging.slots import Inputs, Slot, Unit

if TYPE_CHECKING:
    from torch import Tensor

Density = Annotated[float, Gt(0), Le(1)]


def significance(x: Slot, t: int, moment_X: Tensor) -> Tensor:
    """The root of v * (expert - base)^2, or of v alone without a base, whose float32 does not underflow: (X)."""
    root_X = moment_X.sqrt()
    return root_X if x.base is None else root_X * (x.experts[t] - x.base).abs_()


def roots_for_density(
    inputs: Inputs, unit: Unit, moment: Callable[[Slot, int], Tensor], density: float
) -> list[float]:
    """What `significance` must reach, of each expert, for that share of the whole model's entries to be kept."""
    experts = len(inputs.views[0].source.experts)
    place = inputs.elements - max(1, int(inputs.elements * density)) + 1

    def rows(x: Slot) -> list[Tensor]:
        return [significance(x, t, moment(x, t)) for t in range(experts)]

    found = ops.kth_smallest(inputs.each, rows, unit, lambda _: [[place]] * experts)
    return [root for [root] in found]


def kept(x: Slot, t: int, moment_X: Tensor, root: float) -> Tensor:
    """Which entries are significant enough; equals are kept: (X) bool."""
    return significance(x, t, moment_X).float() >= torch.tensor(root, dtype=torch.float32).item()


def _moment(x: Slot, t: int) -> Tensor:
    return x.positive_statistic("fisher", t)


def _root(inputs: Inputs, *, density: float, **_: Any) -> list[float]:
    return roots_for_density(inputs, "element", _moment, density)


@method(
    family="statistics",
    paper="2509.11167",
    code="pmahdavi/ota-merge@eee703f5",
    reference="pretrained",
    needs_base=True,
    maximum_experts=1,
    prepass=_root,
    prepass_if=lambda params: params["threshold"] is None,
    statistics=needs_fisher,
)
def ffg(x: Slot, *, density: Density = 0.4, threshold: Annotated[float, Ge(0)] | None = None) -> Tensor:
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
    [root] = x.facts or [sqrt(threshold)]
    mask_X = kept(x, 0, _moment(x, 0), root)
    return torch.where(mask_X, x.experts[0], x.base)
