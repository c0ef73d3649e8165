"""The Karcher mean: the point on the sphere with the least squared distance to all experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Gt

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Positive, Weights

if TYPE_CHECKING:
    from torch import Tensor


def coordinates(
    views: Views, *, weights: list[float] | None, iterations: int, tolerance: float
) -> list[float]:
    """The mean as a combination of the experts' (or, around a base, the task vectors'): one coefficient each.

    The iteration never leaves the span of the T vectors, so it runs on their T x T Gram matrix alone.
    """
    gram_TT = combine.gram_of_vectors(views)
    norm_T = gram_TT.diagonal().sqrt()
    weight_T = torch.tensor(weights or [1 / len(norm_T)] * len(norm_T), dtype=torch.float64)
    valid_T = norm_T > tolerance
    if not valid_T.any():
        return [0.0] * len(norm_T)
    share_T = torch.where(valid_T, weight_T, 0.0) / weight_T[valid_T].sum()
    safe_T = torch.where(valid_T, norm_T, 1.0)
    unit_TT = gram_TT / (safe_T[:, None] * safe_T[None])  # inner products of unit vectors

    def norm(c_T: Tensor) -> Tensor:
        return (c_T @ unit_TT @ c_T).clamp(min=0).sqrt()

    mean_T = share_T.clone()
    if norm(mean_T) < tolerance:  # they cancel: begin at the first
        mean_T = torch.eye(len(norm_T), dtype=torch.float64)[int(valid_T.int().argmax())]
    mean_T = mean_T / norm(mean_T)
    for _ in range(iterations):
        dot_T = (unit_TT @ mean_T).clamp(-1, 1)
        angle_T = dot_T.arccos()
        pull_T = torch.where(angle_T < tolerance, 0.0, share_T * angle_T / angle_T.sin().clamp(min=1e-300))
        tangent_T = pull_T - (pull_T * dot_T).sum() * mean_T
        length = norm(tangent_T)
        if length < tolerance:
            break
        mean_T = length.cos() * mean_T + length.sin() / length * tangent_T
        mean_T = mean_T / norm(mean_T)
    scale = (weight_T * norm_T).sum()
    return torch.where(valid_T, scale * mean_T / safe_T, 0.0).tolist()


@method(
    paper="2603.04972",
    code="arcee-ai/mergekit@a6e40288",
    reference="none",
    experts=(2, None),
    measure=coordinates,
)
def karcher(
    x: Slot,
    *,
    weights: Weights | None = None,
    iterations: Annotated[int, Gt(0)] = 10,
    tolerance: Positive = 1e-5,
    scope: Literal["tensor"] = "tensor",
) -> Tensor:
    """The Karcher mean of the experts' directions, times the weighted mean of their norms.

    With a base, of the task vectors.

    Formula:
        v = θ, or τ with a base;  m = the unit vector with the least Σₜ wₜ angle(m, vₜ)²
        m · Σₜ wₜ ‖vₜ‖, plus the base if there is one
    Parameters:
        iterations: the most steps that are taken
        tolerance: the length of a step at which it stops, and the norm up to which a tensor has no direction
    Trap:
        Tensors of norm up to `tolerance` have no direction, but count in the norm. A base changes the result:
        then task vectors are merged.
    """
    return combine.combination(x, x.found)
