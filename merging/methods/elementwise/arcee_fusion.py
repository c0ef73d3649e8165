"""Arcee Fusion: take over what changed much where the distribution of a row changed much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import quantiles
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.methods.contract import method

if TYPE_CHECKING:
    from torch import Tensor


_SMALL = 1e-8  # added to probabilities, as in the official code


def threshold(views: Views) -> float:
    """The importance from which entries are taken over: median + 1.5 * interquartile range over the tensor."""
    places = [int((views.elements - 1) * q) + 1 for q in (0.25, 0.5, 0.75)]
    [[low, median, high]] = quantiles.kth_smallest(views.total, lambda x: [_importance(x)], "row", [places])
    return median + 1.5 * (high - low)


@method(
    paper="arcee.ai (Arcee Fusion)",
    code="arcee-ai/mergekit@a6e40288",
    unit="row",
    experts=(1, 1),
    needs=("base",),
    measure=threshold,
)
def arcee_fusion(x: Slot) -> Tensor:
    """base + the task-vector entries whose importance reaches median + 1.5 * interquartile range of the tensor's.

    Importance: |tau| * KL(softmax of the expert's row, softmax of the base's), rows of the last dimension.

    Formula:
        I = |τ| ⊙ KL(softmax of the row of θ₁ ‖ softmax of the row of θ₀)
        θ₀ + τ ⊙ [I ≥ median(I) + 1.5 · (Q₃(I) − Q₁(I))]
    Trap:
        The official code estimates quantiles of more than a million entries from a random sample; here they
        are exact, so a few entries of large tensors differ.
    """
    return x.task_vectors[0] * (_importance(x).float() >= x.found)


def _importance(x: Slot) -> Tensor:
    p, q = (row.double().softmax(-1) + _SMALL for row in (x.experts[0], x.reference))
    divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    return x.task_vectors[0].abs() * divergence
