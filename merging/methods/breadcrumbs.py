"""Model Breadcrumbs: drop the largest and the smallest entries of each task vector, add what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Mapping

from annotated_types import Ge, Gt, Le, Lt

from merging import operators as ops
from merging.methods import method
from merging.slots import Slot, Unit, View

if TYPE_CHECKING:
    from torch import Tensor

Share = Annotated[float, Gt(0), Le(1)]
Rate = Annotated[float, Ge(0), Lt(1)]


def _scope(params: Mapping[str, Any]) -> Unit:
    return "row" if params["scope"] == "row" else "element"


def _wrong(params: Mapping[str, Any], _experts: int) -> str | None:
    if params["variant"] == "mergellm" and params["bottom_rate"] is None:
        return "the mergellm variant needs bottom_rate, the share of smallest entries that are dropped"
    if params["variant"] != "official" and params["scope"] != "tensor":
        return f"the {params['variant']} variant works on whole tensors: set scope to tensor"
    return None


def _places(
    n: int, density: float, outlier_rate: float, bottom_rate: float | None, remove_first: bool, variant: str
) -> tuple[int, int]:
    """First and last place (from 0, ascending magnitudes, both kept) of what is kept of n; none if last < first."""
    if variant == "mergellm":  # the two order statistics between which it keeps are kept too
        bottom = int(n * bottom_rate)
        return max(0, bottom - 1), min(n - 1, bottom + int(n * density))
    top = int(n * outlier_rate)
    kept = int(n * density)
    if variant == "official" and not remove_first:
        kept -= top
    if variant == "mergekit":
        return max(0, n - kept - top), max(0, n - kept - top) + kept - 1
    return max(0, n - top - kept), n - top - 1


def bounds(
    view: View,
    *,
    density: float | list[float],
    outlier_rate: float | list[float],
    bottom_rate: float | None,
    remove_first: bool,
    scope: str,
    variant: str,
    **_: Any,
) -> Any:
    """Smallest and largest magnitude kept, one pair an expert, if the scope is the tensor; None keeps nothing."""
    if scope == "row":
        return None
    count = len(view.source.experts)
    kept_T = [
        _places(view.elements, share, rate, bottom_rate, remove_first, variant)
        for share, rate in zip(ops.for_each(density, count), ops.for_each(outlier_rate, count))
    ]
    places = [[first + 1, last + 1] if first <= last else [1, 1] for first, last in kept_T]
    found = ops.kth_smallest(lambda f: [f(view)], lambda x: x.task_vectors, "element", lambda _: places)
    return [limits if first <= last else None for limits, (first, last) in zip(found, kept_T)]


@method(
    family="elementwise",
    paper="2312.06795",
    code="rezazzr/breadcrumbs@f89fc664",
    reference="pretrained",
    unit=_scope,
    needs_base=True,
    measure=bounds,
    check=_wrong,
)
def breadcrumbs(
    x: Slot,
    *,
    density: Share | list[Share] = 0.15,
    outlier_rate: Rate | list[Rate] = 0.006,
    scale: float = 0.2,
    weights: list[float] | None = None,
    normalize: bool = False,
    elect: bool = False,
    remove_first: bool = True,
    bottom_rate: Rate | None = None,
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
        remove_first: whether outliers are dropped before `density` is counted; else they count as kept
        bottom_rate: share of the smallest entries that are dropped; the mergellm variant's alone
    Trap:
        Of n entries, int(n · density) may be none: rows of a convolution's small kernels vanish whole with
        scope row. `density` is what is kept, not what is dropped.
    """
    tau_TX = []
    count = len(x.experts)
    share_T, rate_T = ops.for_each(density, count), ops.for_each(outlier_rate, count)
    for t, tau_X in enumerate(x.task_vectors):
        if scope == "tensor":
            limits = x.measured[t]
        else:
            columns = tau_X.shape[-1]
            first, last = _places(columns, share_T[t], rate_T[t], bottom_rate, remove_first, variant)
            limits = ops.row_order(tau_X, [first, last]) if first <= last else None
        tau_TX.append(ops.keep_between(tau_X, *limits) if limits else 0 * tau_X)
    return ops.merge_signed(tau_TX, weights, elect, normalize).mul_(scale).add_(x.base)
