"""TATR: task arithmetic where no task is sensitive to the changes of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from merging import operators as ops
from merging.lazy import torch
from merging.methods import method
from merging.slots import Inputs, Slot

if TYPE_CHECKING:
    from torch import Tensor


def bound(inputs: Inputs, *, density: float, gradients: str, **_: Any) -> float:
    """The sensitivity below which entries are merged, over the whole model."""
    place = min(int(inputs.elements * density), inputs.elements - 1) + 1
    found = ops.kth_smallest(
        inputs.each, lambda x: [_sensitivity(x, gradients)], "element", lambda _: [[place]]
    )
    [[threshold]] = found
    return threshold


@method(
    family="elementwise",
    paper="2501.15065",
    code="tanganke/fusion_bench@54c9e8c9",
    reference="pretrained",
    needs_base=True,
    minimum_experts=2,
    prepass=bound,
    statistics=lambda params: ["gradients"] if params["gradients"] == "given" else [],
)
def tatr(
    x: Slot,
    *,
    density: Annotated[float, Ge(0), Le(1)] = 0.99,
    scale: float = 0.3,
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
    inside_X = _sensitivity(x, gradients).float() < x.facts
    return (ops.total(x.task_vectors) * inside_X).mul_(scale).add_(x.base)


def _sensitivity(x: Slot, gradients: str) -> Tensor:
    sum_X, steps_X, slopes_X = (torch.zeros_like(x.base) for _ in range(3))
    for t, tau_X in enumerate(x.task_vectors):
        step_X = tau_X.abs()
        slope_X = x.statistic("gradients", t).to(step_X).abs() if gradients == "given" else step_X
        sum_X.addcmul_(step_X, slopes_X).addcmul_(slope_X, steps_X)
        steps_X += step_X
        slopes_X += slope_X
    return sum_X
