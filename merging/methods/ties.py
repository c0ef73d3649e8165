"""TIES-Merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping

from annotated_types import Gt, Le

from merging import operators as ops
from merging.lazy import torch
from merging.methods import method
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Gt(0), Le(1)]


def _is_global(params: Mapping[str, Any]) -> bool:
    return params["scope"] == "global" and params["variant"] != "mergekit"


def trim(inputs: Inputs, *, density: float | list[float], scope: str, variant: str, **_: Any) -> dict[str, Any]:
    """Thresholds over all tensors of each expert, and the sign that stands in where sums cancel."""
    return _trim(inputs.each, inputs.elements, density, variant, len(inputs.views[0].source.experts))


def trim_tensor(
    view: View, *, density: float | list[float], scope: str, variant: str, **_: Any
) -> dict[str, Any] | None:
    """The same for one tensor, unless the whole model was measured."""
    if scope == "global" and variant != "mergekit":
        return None
    return _trim(lambda function: [function(view)], view.elements, density, variant, len(view.source.experts))


def _trim(
    each: ops.Each, elements: int, density: float | list[float], variant: str, experts: int
) -> dict[str, Any]:
    kth_T = [_kth(elements, share, variant) for share in ops.for_each(density, experts)]
    thresholds = ops.magnitude_thresholds(each, kth_T)
    if variant == "mergekit":  # a sum of zero counts as positive there
        return {"thresholds": thresholds, "majority": 1.0}

    def signs(view: View) -> float:
        return sum(float(ops.total(ops.trimmed(x, thresholds)).sign().sum()) for x in view.blocks("element"))

    majority = sum(each(signs))
    return {"thresholds": thresholds, "majority": float(majority > 0) - float(majority < 0)}


@method(
    family="elementwise",
    paper="2306.01708",
    code="prateeky2806/ties-merging@44e7891f",
    reference="pretrained",
    needs_base=True,
    prepass=trim,
    prepass_if=_is_global,
    measure=trim_tensor,
)
def ties(
    x: Slot,
    *,
    density: Share | list[Share] = 0.2,
    scale: float = 1.0,
    reduce: Literal["mean", "sum", "max"] = "mean",
    weights: list[float] | None = None,
    normalize: bool = True,
    scope: Literal["global", "tensor"] = "global",
    variant: Literal["official", "mergelm", "mergekit"] = "official",
) -> Tensor:
    """base + scale * merge of the task-vector entries that are large and agree with the elected sign.

    `density` is the share of entries kept, over the whole model or each tensor; a list has one an expert.

    Formula:
        τ̂ₜ = the entries of τₜ at least as large as its density threshold;  s = sign(Σₜ τ̂ₜ)
        θ₀ + scale · reduce of those τ̂ₜ that have the sign s
    Parameters:
        normalize: with `reduce: mean`, whether to divide by the number, or weights, of the entries that agree
        weights: one number an expert, in their order; the mergekit variant's alone
    Trap:
        The threshold is that of the whole model, so that tensors which no expert changed count. The official
        rule keeps one entry more than int(n · density), and all equals; mergekit trims tensor by tensor and
        finds another merge.
    """
    found = x.measured or x.facts
    weights = weights if variant == "mergekit" else None
    merged = merged_task_vector(x, found, reduce, weights, normalize, variant)
    return merged.mul_(scale).add_(x.base)


def merged_task_vector(
    x: Slot,
    found: Mapping[str, Any],
    reduce: str,
    weights: list[float] | None = None,
    normalize: bool = True,
    variant: str = "official",
) -> Tensor:
    """What trimmed task vectors have in common, by the thresholds and the majority that `trim` found: (X)."""
    tau_TX = ops.trimmed(x, found["thresholds"])
    undecided = found["majority"] or (-1.0 if variant == "official" else 0.0)
    sign_X = ops.elect_signs(tau_TX, weights, undecided)
    if reduce == "max":
        return ops.largest_aligned(tau_TX, sign_X)
    merged, count = ops.orthant_sum(tau_TX, sign_X, weights)
    if reduce == "mean" and normalize:
        return merged / (torch.where(count == 0, 1.0, count) if weights else count.clamp_(min=1))
    return merged


def _kth(elements: int, density: float, variant: str) -> int:
    """1-based rank of the threshold among ascending magnitudes; 0 keeps everything."""
    if variant == "official":
        return elements - int(elements * density)
    if variant == "mergekit":
        return ops.place_of_largest(elements, density)
    return int(elements * (1 - density))

