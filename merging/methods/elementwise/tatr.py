"""TATR: task arithmetic where no task is sensitive to the changes of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from mergeline.merging.algebra import quantiles, sums
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method

if TYPE_CHECKING:
    from torch import Tensor


def bound(views: Views, *, density: float, gradients: str) -> float:
    """The sensitivity below which entries are merged, over the whole model."""
    place = min(int(views.elements * density), views.elements - 1) + 1
    rows = lambda x: [_sensitivity(x, gradients)]  # noqa: E731
    [[threshold]] = quantiles.kth_smallest(views.total, rows, "element", [[place]])
    return threshold


@method(
    paper="2501.15065",
    code="tanganke/fusion_bench@54c9e8c9",
    scale=0.3,
    experts=(2, None),
    needs=lambda params: ("base", "gradients") if params["gradients"] == "given" else ("base",),
    measure=Look(bound, over="model"),
)
def tatr(
    x: Slot,
    *,
    density: Annotated[float, Ge(0), Le(1)] = 0.99,
    gradients: Literal["task_vectors", "given"] = "task_vectors",
) -> Tensor:
    """base + scale * sum of task vectors, in the trust region: where sensitivity is below its `density` quantile.

    Sensitivity: the sum over pairs i != j of |g_i| * |tau_j|, where g_i is the gradient of task i's loss at the base.

    Formula:
        Ω = Σ over i ≠ j of |gᵢ| ⊙ |τⱼ|, g the gradients at the base
        θ₀ + scale · [Ω < its density quantile] ⊙ Σₜ τₜ
    Parameters:
        density: the quantile of the sensitivity below which entries are merged
        gradients: whether task vectors stand in for the gradients, or statistics give their mean magnitudes
    Trap:
        By default task vectors stand in for the gradients of the losses; the measure that is meant is that of
        `gradients: given`.
    """
    inside_X = _sensitivity(x, gradients).float() < x.found
    return sums.total(x.task_vectors) * inside_X


def _sensitivity(x: Slot, gradients: str) -> Tensor:
    sum_X, steps_X, slopes_X = (torch.zeros_like(x.reference) for _ in range(3))
    for t, tau_X in enumerate(x.task_vectors):
        step_X = tau_X.abs()
        slope_X = x.statistic("gradients", t).to(step_X).abs() if gradients == "given" else step_X
        sum_X.addcmul_(step_X, slopes_X).addcmul_(slope_X, steps_X)
        steps_X += step_X
        slopes_X += slope_X
    return sum_X
