"""DARE: drop entries of the task vectors at random, rescale the others, merge them by another method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

from mergeline.merging.algebra import draws, sparsify
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Rate, Rates

if TYPE_CHECKING:
    from torch import Tensor


def kept(x: Slot, t: int, probability: float | Tensor, masks: str) -> Tensor:
    """1 where an entry of expert t is kept, with the given probability (a number or (X)), else 0: (X) float32."""
    if masks == "given":  # a tensor that they leave out is kept whole
        given = x.has_statistic("masks", t)
        return x.statistic("masks", t).float() if given else torch.ones_like(x.experts[t])
    source, expert = x.view.source, x.view.experts[t]
    drawn_X = draws.uniform(source.seed, expert, x.name, x.start, x.elements).reshape(x.shape)
    return (drawn_X.to(source.device) < probability).float()


def wants_masks(params: Mapping[str, Any]) -> Sequence[str]:
    """What a method needs that can be given its masks."""
    return ("base", "masks") if params["masks"] == "given" else ("base",)


def l1_ratios(views: Views, *, drop_rate: float | list[float], masks: str) -> list[float]:
    """What mergekit multiplies survivors by: the ratio of L1 norms before and after, one an expert."""
    before, after = [0.0] * views.experts, [0.0] * views.experts
    rate_T = sparsify.for_each(drop_rate, views.experts)
    for view in views.views:
        for x in view.blocks("element"):
            for t, tau_X in enumerate(x.task_vectors):
                size_X = tau_X.abs()
                before[t] += float(size_X.sum(dtype=torch.float64))
                after[t] += float((size_X * kept(x, t, 1.0 - rate_T[t], masks)).sum(dtype=torch.float64))
    return [b / a if a > 0 else 1.0 for b, a in zip(before, after)]


def drop(x: Slot, *, drop_rate: float | list[float], masks: str, rescale: bool, **_: Any) -> Slot:
    """The slot with entries of the task vectors dropped and the others rescaled."""
    rate_T = sparsify.for_each(drop_rate, len(x.experts))
    ratios = x.found or [1 / (1 - rate) if rescale and rate < 1 else 1.0 for rate in rate_T]

    def survivors(t: int) -> Tensor:
        tau_X = x.experts[t] - x.reference
        return tau_X.mul_(kept(x, t, 1.0 - rate_T[t], masks)).mul_(ratios[t])

    return x.with_task_vectors(survivors)


def _rescales_by_norms(params: Mapping[str, Any]) -> Literal["tensor"] | None:
    return "tensor" if params["variant"] == "mergekit" and params["rescale"] else None


@method(
    paper="2311.03099",
    code="yule-BUAA/MergeLM@6d49ad96",
    reference="none",
    needs=wants_masks,
    measure=Look(l1_ratios, over=_rescales_by_norms),
    transform=drop,
)
def dare(
    x: Slot,
    merge: Inner,
    *,
    drop_rate: Rate | Rates = 0.1,
    rescale: bool = True,
    inner: str = "task_arithmetic",
    masks: Literal["drawn", "given"] = "drawn",
    variant: Literal["official", "mergekit"] = "official",
) -> Tensor:
    """Another merge of experts whose task vectors lost a random share of their entries.

    Survivors are divided by 1 - drop_rate (mergekit: multiplied by the ratio of L1 norms). A list of rates has one
    an expert. Draws depend on the seed, the expert's name, the tensor and the element alone. The inner method's
    parameters stand beside these.

    Formula:
        inner merge of the θ₀ + mₜ ⊙ τₜ / (1 − drop_rate), mₜ = 1 with probability 1 − drop_rate, else 0
    Parameters:
        rescale: divide survivors by 1 − `drop_rate`, so that the mean over draws is the task vector
    Trap:
        `drop_rate` is what is dropped, not kept. The mergekit variant rescales by the ratio of L1 norms,
        which is not unbiased. A rate of 1 drops all and rescales nothing.
    """
    return merge.weights()
