"""Multi-SLERP: the weighted mean of the experts' directions, with the mean of their norms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Positive, Weights

if TYPE_CHECKING:
    from torch import Tensor


def coordinates(views: Views, *, weights: list[float] | None, normalize: bool, epsilon: float) -> list[float]:
    """The mean as a combination of the vectors: one coefficient each, from their T x T Gram matrix."""
    gram_TT = combine.gram_of_vectors(views)
    weight_T = torch.tensor(weights or [1.0] * len(gram_TT), dtype=torch.float64)
    if normalize:
        weight_T = weight_T / weight_T.sum()
    norm_T = gram_TT.diagonal().sqrt()
    unit_T = weight_T / (norm_T + epsilon)
    length = (unit_T @ gram_TT @ unit_T).clamp(min=0).sqrt()
    if length < epsilon:  # no direction is left
        return weight_T.tolist()
    return (unit_T / length * (weight_T * norm_T).sum()).tolist()


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    if params["normalize"] and params["weights"] and abs(sum(params["weights"])) < 1e-12:
        yield "the weights sum to 0, so they cannot be normalised; change one"


@method(
    paper="Goddard, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    code="arcee-ai/mergekit@a6e40288",
    reference="none",
    experts=(2, None),
    measure=coordinates,
    check=_wrong,
)
def multislerp(
    x: Slot,
    *,
    weights: Weights | None = None,
    normalize: bool = True,
    epsilon: Positive = 1e-8,
    scope: Literal["tensor"] = "tensor",
) -> Tensor:
    """The direction of the weighted mean of unit vectors, times the weighted mean of norms.

    With a base, of the task vectors. Weights are divided by their sum, unless `normalize` is false. Where the unit
    vectors cancel it is their weighted mean, which the official code has for two only.

    Formula:
        v = θ, or τ with a base;  u = Σₜ wₜ vₜ / ‖vₜ‖, the weights summing to 1
        (u / ‖u‖) · Σₜ wₜ ‖vₜ‖, plus the base if there is one
    Parameters:
        normalize: divide the weights by their sum; else norms are summed by weight, not averaged
        epsilon: is added to norms, and is the length below which no direction is left
    Trap:
        A base changes the result: then task vectors are merged. The official step in the tangent space is
        zero by construction.
    """
    return combine.combination(x, x.found)
