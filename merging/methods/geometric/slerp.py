"""SLERP: along the arc between two checkpoints."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine, sums
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Rate, Share

if TYPE_CHECKING:
    from torch import Tensor


def arc(views: Views, *, t: float, dot_threshold: float) -> tuple[float, float]:
    """The factors of the two tensors: sines of the angles, or linear where they are nearly collinear."""
    gram_TT = combine.gram_of(views, lambda x: x.experts)
    norms = [sqrt(n) if sqrt(n) > 1e-8 else 1.0 for n in gram_TT.diagonal().tolist()]
    cosine = max(-1.0, min(1.0, float(gram_TT[0, 1]) / (norms[0] * norms[1])))
    straight = torch.tensor(abs(cosine) >= dot_threshold)
    first, second = combine.arc(torch.tensor(cosine, dtype=torch.float64), t, straight)
    return first.item(), second.item()


@method(
    paper="Shoemake 1985",
    code="arcee-ai/mergekit@a6e40288",
    reference="none",
    experts=(2, 2),
    measure=arc,
)
def slerp(
    x: Slot,
    *,
    t: Rate = 0.5,
    dot_threshold: Share = 0.9995,
    scope: Literal["tensor"] = "tensor",
) -> Tensor:
    """Spherical interpolation of two experts: the first at t = 0, the second at t = 1.

    Formula:
        φ = the angle between θ₁ and θ₂, flattened
        (sin((1 − t) φ) · θ₁ + sin(t φ) · θ₂) / sin φ
    Parameters:
        t: where on the arc: 0 is the first, 1 the second expert
        dot_threshold: the cosine from which on the way is straight
    Trap:
        The sines multiply the tensors as they are, not unit vectors. Nearly collinear tensors, such as gains
        of norms, are interpolated linearly.
    """
    return sums.weighted_sum(x.experts, x.found, x.precision)
