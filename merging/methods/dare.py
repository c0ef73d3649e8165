"""DARE: drop entries of the task vectors at random, rescale the others, merge them by another method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Le

from merging import draws
from merging import operators as ops
from merging.lazy import torch
from merging.methods import Inner, method
from merging.slots import Slot, View

if TYPE_CHECKING:
    from torch import Tensor

Rate = Annotated[float, Ge(0), Le(1)]


def kept(x: Slot, t: int, probability: float | Tensor, masks: str) -> Tensor:
    """1 where an entry of expert t is kept, with the given probability (a number or (X)), else 0: (X) float32."""
    if masks == "given":  # a tensor that they leave out is kept whole
        return (
            x.statistic("masks", t).float() if x.has_statistic("masks", t) else torch.ones_like(x.experts[t])
        )
    source = x.view.source
    drawn_X = draws.uniform(source.seed, source.experts[t], x.name, x.start, x.elements).reshape(x.shape)
    if isinstance(probability, float):
        return (drawn_X < probability).float()
    return (drawn_X.to(probability.device) < probability).float()


def wants_masks(params: Any) -> list[str]:
    """The statistics of a method that can be given its masks."""
    return ["masks"] if params["masks"] == "given" else []


def l1_ratios(
    view: View, *, drop_rate: float | list[float], masks: str, variant: str, rescale: bool, **_: Any
) -> list[float] | None:
    """What mergekit multiplies survivors by: the ratio of L1 norms before and after, one an expert."""
    if variant != "mergekit" or not rescale:
        return None
    before, after = [0.0] * len(view.source.experts), [0.0] * len(view.source.experts)
    rate_T = ops.for_each(drop_rate, len(before))
    for x in view.blocks("element"):
        for t, tau_X in enumerate(x.task_vectors):
            size_X = tau_X.abs()
            before[t] += float(size_X.sum(dtype=torch.float64))
            after[t] += float((size_X * kept(x, t, 1.0 - rate_T[t], masks)).sum(dtype=torch.float64))
    return [b / a if a > 0 else 1.0 for b, a in zip(before, after)]


def drop(x: Slot, *, drop_rate: float | list[float], masks: str, rescale: bool, **_: Any) -> Slot:
    """The slot with entries of the task vectors dropped and the others rescaled."""
    rate_T = ops.for_each(drop_rate, len(x.experts))
    ratios = x.measured or [1 / (1 - rate) if rescale and rate < 1 else 1.0 for rate in rate_T]

    def change(t: int, expert_X: Tensor) -> Tensor:
        return (expert_X - x.base).mul_(kept(x, t, 1.0 - rate_T[t], masks)).mul_(ratios[t]).add_(x.base)

    return x.with_experts(change)


@method(
    family="wrapper",
    paper="2311.03099",
    code="yule-BUAA/MergeLM@6d49ad96",
    reference="pretrained",
    needs_base=True,
    measure=l1_ratios,
    transform=drop,
    statistics=wants_masks,
)
def dare(
    x: Slot,
    merge: Inner,
    *,
    drop_rate: Rate | list[Rate] = 0.1,
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
    return merge(x)
