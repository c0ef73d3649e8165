"""Model Stock: from the average towards the base, as far as the angle between the experts says."""

from __future__ import annotations

from math import acos, cos
from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine, sums
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method

if TYPE_CHECKING:
    from torch import Tensor


def ratio(views: Views, *, variant: str) -> float:
    """How far to go from the base towards the average, for the whole tensor."""
    gram_TT = combine.gram_of_vectors(views)
    if variant == "fusion_bench":  # averages the angles
        norm_T = gram_TT.diagonal().sqrt()
        cosine_TT = (gram_TT / (norm_T[:, None] * norm_T[None] + 1e-8)).clamp(-1, 1)
        angles = [acos(c) for c in _pairs(cosine_TT)]
        return _ratio(torch.tensor(cos(sum(angles) / len(angles)), dtype=torch.float64), len(gram_TT)).item()
    return _ratio(_mean_cosine(gram_TT), len(gram_TT)).item()


@method(
    paper="2403.19522",
    code="arcee-ai/mergekit@a6e40288",
    unit=lambda params: "row" if params["scope"] == "row" else "element",
    experts=(2, None),
    needs=("base",),
    measure=Look(ratio, over=lambda params: "tensor" if params["scope"] == "tensor" else None),
)
def model_stock(
    x: Slot,
    *,
    scope: Literal["tensor", "row"] = "tensor",
    variant: Literal["mergekit", "fusion_bench"] = "mergekit",
) -> Tensor:
    """t * average + (1 - t) * base, with t = N c / (1 + (N - 1) c) for the mean cosine c between task vectors.

    Per tensor, or per row of the last dimension. Where 1 + (N - 1) c is zero the base stays.

    Formula:
        c = the mean cosine of τᵢ and τⱼ over pairs;  t = T · c / (1 + (T − 1) · c)
        t · θ̄ + (1 − t) · θ₀
    Parameters:
        variant: mergekit averages the cosines, fusion_bench the angles
    Trap:
        t is not clamped: it is negative for c < 0, and explodes near c = −1 / (T − 1). Tiny task vectors,
        whose norms multiply to less than 1e-6, go back to the base.
    """
    t: float | Tensor = x.found
    if scope == "row":
        gram_MTT = torch.einsum("imn,jmn->mij", x.task_vectors.double(), x.task_vectors.double())
        t = _ratio(_mean_cosine(gram_MTT), len(x.experts))[:, None]
    return sums.mean(x.experts, x.precision).sub_(x.reference.to(x.precision)).mul_(t)


def _mean_cosine(gram_TT: Tensor) -> Tensor:
    """The mean cosine over pairs; products of norms are not smaller than 1e-6, as in the official code: (...)."""
    norm_T = gram_TT.diagonal(dim1=-2, dim2=-1).sqrt()
    products_TT = (norm_T[..., :, None] * norm_T[..., None, :]).clamp(min=1e-6)
    cosine_TT = (gram_TT / products_TT).clamp(-1, 1)
    i, j = torch.triu_indices(gram_TT.shape[-1], gram_TT.shape[-1], 1)
    return cosine_TT[..., i, j].mean(-1)


def _pairs(value_TT: Tensor) -> list[float]:
    i, j = torch.triu_indices(len(value_TT), len(value_TT), 1)
    return value_TT[i, j].tolist()


def _ratio(cosine: Tensor, count: int) -> Tensor:
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, denominator))
