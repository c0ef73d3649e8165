"""NuSLERP: along the arc between two tensors, or between each two of their rows or columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Mapping

from mergeline.merging.algebra import combine
from mergeline.merging.algebra.slots import Slot, Unit, Views
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Weights

if TYPE_CHECKING:
    from torch import Tensor


_COLLINEAR = 1e-6  # a sine; the official 1e-8 is that of a float32 cosine, which resolves none below 3e-4
_SHORT = 1e-7  # a norm, as in the official code


def _unit(params: Mapping[str, Any]) -> Unit:
    units: dict[str, Unit] = {"tensor": "element", "row": "row", "column": "tensor"}
    return units[params["scope"]]


def flat_factors(views: Views, *, weights: list[float] | None) -> list[float]:
    """The factors of the two, flattened."""
    gram_TT = combine.gram_of_vectors(views)
    return [f.item() for f in _factors(gram_TT[0, 0], gram_TT[0, 1], gram_TT[1, 1], weights)]


@method(
    paper="Shoemake 1985",
    code="arcee-ai/mergekit@a6e40288",
    unit=_unit,
    experts=(2, 2),
    measure=Look(flat_factors, over=lambda params: "tensor" if params["scope"] == "tensor" else None),
)
def nuslerp(
    x: Slot, *, weights: Weights | None = None, scope: Literal["tensor", "row", "column"] = "tensor"
) -> Tensor:
    """Spherical interpolation of two experts, or of their task vectors, by the second's share of the weights.

    `row` takes each row of the last dimension for itself, `column` each of the first, for which the official names
    are `row_wise: false` and `true`. Where two have (nearly) one line it is linear.

    Formula:
        v = θ, or τ with a base;  t = w₂ / (w₁ + w₂);  φ = the angle between v₁ and v₂
        (sin((1 − t) φ) · v₁ + sin(t φ) · v₂) / sin φ, plus the base if there is one
    Parameters:
        scope: of what the angle is taken: the whole tensor, each row (last dimension), or each column (first)
    Trap:
        The official `row_wise: true` means columns; the names here say what they do. Opposite directions
        count as collinear and are mixed linearly.
    """
    first_X, second_X = (vector_X.to(x.precision) for vector_X in combine.vectors(x))
    if scope == "tensor":
        first, second = x.found
    else:
        a, b = first_X.double(), second_X.double()
        dim = 0 if scope == "column" else -1
        aa, ab, bb = ((p * q).sum(dim, keepdim=True) for p, q in ((a, a), (a, b), (b, b)))
        first, second = (factor.to(x.precision) for factor in _factors(aa, ab, bb, weights))
    return first_X * first + second_X * second


def _factors(aa: Tensor, ab: Tensor, bb: Tensor, weights: list[float] | None) -> tuple[Tensor, Tensor]:
    weights = weights or [1.0, 1.0]
    t = 0.5 if abs(sum(weights)) < 1e-6 else weights[1] / sum(weights)
    cosine = (ab / (aa.sqrt().clamp(min=_SHORT) * bb.sqrt().clamp(min=_SHORT))).clamp(-1, 1)
    return combine.arc(cosine, t, cosine.arccos().sin() < _COLLINEAR)
