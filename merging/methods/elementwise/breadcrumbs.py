"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector, add what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Iterator, Literal, Mapping, Sequence

from mergeline.merging.algebra import combine, quantiles, sparsify
from mergeline.merging.algebra.slots import Slot, Unit, Views
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import BelowOne, OneAnExpert, Share, Shares, Weights

if TYPE_CHECKING:
    from torch import Tensor


def _scope(params: Mapping[str, Any]) -> Unit:
    return "row" if params["scope"] == "row" else "element"


def _wrong(params: Mapping[str, Any], _experts: int) -> Iterator[str]:
    if params["variant"] == "mergellm" and params["bottom_rate"] is None:
        yield "the mergellm variant needs bottom_rate, the share of smallest entries that are dropped"
    if params["rescale"] and params["variant"] != "mergekit":
        yield "rescale is the mergekit variant's alone: set variant to mergekit"
    if params["variant"] != "official" and params["scope"] != "tensor":
        yield f"the {params['variant']} variant works on whole tensors: set scope to tensor"
    if params["variant"] == "mergellm":
        bottom, densities = params["bottom_rate"] or 0.0, params["density"]
        if any(share + bottom > 1 for share in (densities if isinstance(densities, list) else [densities])):
            yield f"density and bottom_rate, {bottom}, are more than all entries together; lower one"


def _places(
    n: int, density: float, outlier_rate: float, bottom_rate: float | None, remove_first: bool, variant: str
) -> tuple[int, int]:
    """First and last place (from 0, ascending magnitudes, both kept) of what is kept of n; none if last < first."""
    if variant == "mergellm":  # the two order statistics between which it keeps are kept too
        bottom = int(n * (bottom_rate or 0.0))
        top = int(n * (1 - density)) - bottom
        return max(0, bottom - 1), min(n - 1, n - top - 1)
    top = int(n * outlier_rate)
    kept = int(n * density)
    if variant == "official" and not remove_first:
        kept -= top
    if variant == "mergekit":
        return max(0, n - kept - top), max(0, n - kept - top) + kept - 1
    return max(0, n - top - kept), n - top - 1


def bounds(
    views: Views,
    *,
    density: float | list[float],
    outlier_rate: float | list[float],
    bottom_rate: float | None,
    remove_first: bool,
    variant: str,
    rescale: bool,
) -> list[list[float] | None]:
    """Smallest and largest magnitude kept, one pair an expert; None keeps nothing.

    With `rescale` a third number: what mergekit multiplies the kept entries by.
    """
    kept_T = [
        _places(views.elements, share, rate, bottom_rate, remove_first, variant)
        for share, rate in zip(
            sparsify.for_each(density, views.experts), sparsify.for_each(outlier_rate, views.experts)
        )
    ]
    places = [[first + 1, last + 1] if first <= last else [1, 1] for first, last in kept_T]
    found = quantiles.kth_smallest(views.total, lambda x: x.task_vectors, "element", places)
    limits_T = [limits if first <= last else None for limits, (first, last) in zip(found, kept_T)]
    if not rescale:
        return limits_T
    ratio_T = sparsify.l1_ratios(views, lambda x: [_kept(x, t, limits) for t, limits in enumerate(limits_T)])
    return [limits and [*limits, ratio] for limits, ratio in zip(limits_T, ratio_T)]


def _kept(x: Slot, t: int, limits: Sequence[float | Tensor] | None) -> Tensor:
    """The entries of a task vector that are kept, times the ratio that stands behind the limits: (X)."""
    tau_X = x.task_vectors[t]
    if not limits:
        return 0 * tau_X
    kept_X = sparsify.keep_between(tau_X, *limits[:2])
    return kept_X * limits[2] if len(limits) > 2 else kept_X


@method(
    paper="2312.06795",
    code="rezazzr/breadcrumbs@f89fc664",
    scale=0.2,
    unit=_scope,
    needs=("base",),
    measure=Look(bounds, over=lambda params: "tensor" if params["scope"] == "tensor" else None),
    check=_wrong,
)
def breadcrumbs(
    x: Slot,
    *,
    density: Share | Shares = 0.15,
    outlier_rate: BelowOne | Annotated[list[BelowOne], OneAnExpert()] = 0.006,
    weights: Weights | None = None,
    normalize: bool = False,
    elect: bool = False,
    rescale: bool = False,
    remove_first: bool = True,
    bottom_rate: BelowOne | None = None,
    scope: Literal["row", "tensor"] = "row",
    variant: Literal["official", "mergellm", "mergekit"] = "official",
) -> Tensor:
    """base + scale * sum of task vectors without their largest and smallest entries.

    Of every n entries (a row of the last dimension, or the tensor) the int(n * outlier_rate) largest are dropped,
    then the int(n * density) largest of the rest are kept. Without `remove_first` the dropped count as kept ones.
    Both are numbers, or lists of one an expert. `elect` adds only what agrees with the elected sign.

    Formula:
        τ̂ₜ = of τₜ without its int(n · outlier_rate) largest entries, the int(n · density) largest
        θ₀ + scale · Σₜ wₜ τ̂ₜ
    Parameters:
        weights: one number an expert, in their order, 1 by default
        outlier_rate: share of the largest entries that are dropped
        elect: add only the entries that agree with the elected sign
        rescale: give what is kept of each task vector its L1 norm back; the mergekit variant's alone
        remove_first: whether outliers are dropped before `density` is counted; else they count as kept
        bottom_rate: share of the smallest entries that are dropped; the mergellm variant's alone
    Trap:
        Of n entries, int(n · density) may be none: rows of a convolution's small kernels vanish whole with
        scope row. `density` is what is kept, not what is dropped.
    """
    tau_TX = []
    count = len(x.experts)
    share_T, rate_T = sparsify.for_each(density, count), sparsify.for_each(outlier_rate, count)
    for t, tau_X in enumerate(x.task_vectors):
        if scope == "tensor":
            limits = x.found[t]
        else:
            first, last = _places(tau_X.shape[-1], share_T[t], rate_T[t], bottom_rate, remove_first, variant)
            limits = quantiles.row_order(tau_X, [first, last]) if first <= last else None
        tau_TX.append(_kept(x, t, limits))
    return combine.merge_signed(tau_TX, weights, elect, normalize)
