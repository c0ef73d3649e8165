"""TIES-Merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping

from mergeline.merging.algebra import combine, quantiles, sparsify, sums
from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Share, Shares, Weights

if TYPE_CHECKING:
    from torch import Tensor


def _over(params: Mapping[str, Any]) -> Literal["model", "tensor"]:
    return "model" if params["scope"] == "global" and params["variant"] != "mergekit" else "tensor"


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    if params["rescale"] and params["variant"] != "mergekit":
        yield "rescale is the mergekit variant's alone: set variant to mergekit"


def trim(views: Views, *, density: float | list[float], variant: str) -> dict[str, Any]:
    """Thresholds of each expert, over the model or a tensor, and the sign that stands in where sums cancel."""
    kth_T = [_kth(views.elements, share, variant) for share in sparsify.for_each(density, views.experts)]
    thresholds = quantiles.magnitude_thresholds(views.total, kth_T)
    if variant == "mergekit":  # a sum of zero counts as positive there
        return {"thresholds": thresholds, "majority": 1.0}

    def signs(view: View) -> float:
        trimmed = (sparsify.trimmed(x, thresholds) for x in view.blocks("element"))
        return sum(float(sums.total(tau_TX).sign().sum()) for tau_TX in trimmed)

    majority = sum(views.each(signs))
    return {"thresholds": thresholds, "majority": float(majority > 0) - float(majority < 0)}


def trim_to_norms(
    views: Views, *, density: float | list[float], variant: str, rescale: bool
) -> dict[str, Any]:
    """As `trim`; with `rescale` also what mergekit multiplies trimmed task vectors by, one an expert."""
    found = trim(views, density=density, variant=variant)
    if rescale:
        found["ratios"] = sparsify.l1_ratios(views, lambda x: sparsify.trimmed(x, found["thresholds"]))
    return found


@method(
    paper="2306.01708",
    code="prateeky2806/ties-merging@44e7891f",
    scale=1.0,
    needs=("base",),
    measure=Look(trim_to_norms, over=_over),
    check=_wrong,
)
def ties(
    x: Slot,
    *,
    density: Share | Shares = 0.2,
    reduce: Literal["mean", "sum", "max"] = "mean",
    weights: Weights | None = None,
    normalize: bool = True,
    rescale: bool = False,
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
        rescale: give each trimmed task vector its L1 norm back; the mergekit variant's alone
    Trap:
        The threshold is that of the whole model, so that tensors which no expert changed count. The official
        rule keeps one entry more than int(n · density), and all equals; mergekit trims tensor by tensor and
        finds another merge.
    """
    weights = weights if variant == "mergekit" else None
    return merged_task_vector(x, x.found, reduce, weights, normalize, variant)


def merged_task_vector(
    x: Slot,
    found: Mapping[str, Any],
    reduce: str,
    weights: list[float] | None = None,
    normalize: bool = True,
    variant: str = "official",
) -> Tensor:
    """What trimmed task vectors have in common, by the thresholds and the majority that `trim` found: (X)."""
    tau_TX = sparsify.trimmed(x, found["thresholds"])
    if ratio_T := found.get("ratios"):
        tau_TX = [tau_X * ratio for tau_X, ratio in zip(tau_TX, ratio_T)]
    undecided = found["majority"] or (-1.0 if variant == "official" else 0.0)
    sign_X = combine.elect_signs(tau_TX, weights, undecided)
    if reduce == "max":
        return combine.largest_aligned(tau_TX, sign_X)
    merged, count = combine.orthant_sum(tau_TX, sign_X, weights)
    if reduce == "mean" and normalize:
        return merged / (torch.where(count == 0, 1.0, count) if weights else count.clamp_(min=1))
    return merged


def _kth(elements: int, density: float, variant: str) -> int:
    """1-based rank of the threshold among ascending magnitudes; 0 keeps everything."""
    if variant == "official":
        return elements - int(elements * density)
    if variant == "mergekit":
        return quantiles.place_of_largest(elements, density)
    return int(elements * (1 - density))
