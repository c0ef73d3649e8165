"""TIES-Merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le

from merging import operators as ops
from merging.lazy import torch
from merging.methods import Inputs, Slot, method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Trim:
    """What global TIES must know of the whole model: (T,) magnitude thresholds, and the majority sign."""

    threshold_T: Tensor | None
    majority: float


def trim(inputs: Inputs, *, density: float, scope: str, variant: str, **_: Any) -> Trim | None:
    """Thresholds over all tensors of each expert, and the sign that stands in where sums cancel."""
    if scope != "global" or variant == "mergekit":
        return None
    kth = _kth(inputs.elements, density, variant)
    threshold_T = ops.kth_magnitudes(lambda: (x.task_vectors for x in inputs.slots()), kth) if kth else None
    signs = 0.0
    for x in inputs.slots():
        signs += float(_trimmed(x.task_vectors, threshold_T).sum(0).sign().sum())
    return Trim(threshold_T, float(signs > 0) - float(signs < 0))


@method(
    paper="2306.01708",
    code="prateeky2806/ties-merging@44e7891f",
    reference="pretrained",
    needs_base=True,
    prepass=trim,
)
def ties(
    x: Slot,
    *,
    density: Annotated[float, Gt(0), Le(1)] = 0.2,
    scale: float = 1.0,
    reduce: Literal["mean", "sum", "max"] = "mean",
    weights: list[float] | None = None,
    normalize: bool = True,
    scope: Literal["global", "tensor"] = "global",
    variant: Literal["official", "mergelm", "mergekit"] = "official",
) -> Tensor:
    """base + scale * merge of the task-vector entries that are large and agree with the elected sign.

    `density` is the share of entries kept (ties at the threshold are all kept), over the whole model or each tensor.
    `weights` and `normalize` belong to the mergekit variant, which also trims tensor by tensor.
    """
    tau_TX = x.task_vectors
    if variant == "mergekit":
        return x.base + scale * _mergekit(tau_TX, density, weights, normalize)
    if scope == "global":
        threshold_T, majority = x.facts.threshold_T, x.facts.majority
    else:
        kth = _kth(tau_TX[0].numel(), density, variant)
        threshold_T = ops.kth_magnitudes(lambda: [tau_TX], kth) if kth else None
        majority = float(_trimmed(tau_TX, threshold_T).sum(0).sign().sum().sign())
    tau_TX = _trimmed(tau_TX, threshold_T)
    sign_X = ops.elect_signs(tau_TX, majority)
    if variant == "official":  # an undecided sign counts as negative there
        sign_X = torch.where(sign_X > 0, 1.0, -1.0)
    agreeing_TX = tau_TX * (tau_TX.sign() == sign_X)
    return x.base + scale * ops.disjoint_merge(agreeing_TX.double(), reduce)


def _kth(elements: int, density: float, variant: str) -> int:
    """1-based rank of the threshold among ascending magnitudes; 0 keeps everything."""
    return elements - int(elements * density) if variant == "official" else int(elements * (1 - density))


def _trimmed(tau_TX: Tensor, threshold_T: Tensor | None) -> Tensor:
    return tau_TX if threshold_T is None else ops.keep_at_least(tau_TX, threshold_T)


def _mergekit(tau_TX: Tensor, density: float, weights: list[float] | None, normalize: bool) -> Tensor:
    w_T = torch.tensor(weights or [1.0] * len(tau_TX), dtype=torch.float64).view(-1, *[1] * (tau_TX.ndim - 1))
    weighted_TX = ops.keep_largest(tau_TX, density).double() * w_T
    sign_X = torch.where(weighted_TX.sum(0) >= 0, 1.0, -1.0)
    agree_TX = weighted_TX.sign() == sign_X
    total = (weighted_TX * agree_TX).sum(0)
    if not normalize:
        return total
    divisor = (w_T * agree_TX).sum(0)
    return total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
