"""Ways to combine stacked tensors into one.

Shape suffixes: T experts; `_TX` is T stacked tensors of any shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Sequence

from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.algebra.sums import Tensors, mean, total, weighted_sum
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def weighted_mean(x: Slot, weight: Callable[[int], Tensor]) -> Tensor:
    """Sum of weight * expert over the sum of the weights, entry by entry, in `x.precision`; where it is 0, the mean.

    `weight(t)` gives expert t's: (X).
    """
    sum_X, weights_X = (torch.zeros(x.shape, dtype=x.precision, device=x.experts[0].device) for _ in "ab")
    for t, expert_X in enumerate(x.experts):
        weight_X = weight(t).to(x.precision)
        sum_X.addcmul_(weight_X, expert_X.to(x.precision))
        weights_X += weight_X
    nothing_X = weights_X == 0
    if nothing_X.any():
        return torch.where(nothing_X, mean(x.experts, x.precision), sum_X / weights_X)
    return sum_X.div_(weights_X)


def plain_update(x: Slot, kind: str) -> Tensor:
    """Nothing (`pretrained`), or the `mean` or `sum` of the task vectors, in float64: (X)."""
    if kind == "pretrained":
        return torch.zeros_like(x.reference, dtype=torch.float64)
    if kind == "mean":
        return mean(x.experts).sub_(x.reference)
    return weighted_sum(x.experts).sub_(x.reference, alpha=len(x.experts))


def elect_signs(tau_TX: Tensors, weights: Sequence[float] | None, zero: float) -> Tensor:
    """Sign of the sum over experts, `zero` where they cancel (TIES, 2306.01708): (X)."""
    return total(tau_TX, weights).sign_().add_(zero / 2).sign_()


def orthant_sum(
    tau_TX: Tensors, sign_X: Tensor, weights: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum and total weight of the entries of each position that have the elected sign (zeros have none): (X), (X).

    With weights it is the weighted entry whose sign must agree.
    """
    sum_X, count_X = torch.zeros_like(sign_X), torch.zeros_like(sign_X)
    for t, tau_X in enumerate(tau_TX):
        weight = 1.0 if weights is None else float(weights[t])
        aligned_X = (tau_X * sign_X).mul_(weight).clamp_(min=0)
        sum_X += aligned_X
        count_X.add_(aligned_X.sign_(), alpha=weight)
    return sum_X.mul_(sign_X), count_X


def largest_aligned(tau_TX: Tensors, sign_X: Tensor) -> Tensor:
    """The entry of largest magnitude among those of the elected sign, 0 where there is none: (X)."""
    largest_X = torch.zeros_like(sign_X)
    for tau_X in tau_TX:
        largest_X = torch.maximum(largest_X, tau_X * sign_X)
    return largest_X * sign_X


def largest(tau_TX: Tensor) -> Tensor:
    """The entry of largest magnitude, of equal ones the last: (X)."""
    largest_X = tau_TX[0]
    for tau_X in tau_TX[1:]:
        largest_X = torch.where(tau_X.abs() >= largest_X.abs(), tau_X, largest_X)
    return largest_X


def merge_signed(tau_TX: Tensors, weights: Sequence[float] | None, elect: bool, normalize: bool) -> Tensor:
    """Weighted sum of task vectors, or `elect`: of those entries that agree with the elected sign; positive if none is.

    `normalize` divides by the weights that were summed, where that is not 0: (X).
    """
    if not elect:
        share = sum(weights or [1.0] * len(tau_TX)) if normalize else 1.0
        return total(tau_TX, weights) if share in (0.0, 1.0) else total(tau_TX, weights).div_(share)
    sum_X, weight_X = orthant_sum(tau_TX, elect_signs(tau_TX, weights, 1.0), weights)
    return sum_X / torch.where(weight_X == 0, 1.0, weight_X) if normalize else sum_X


def gram(tensors: Tensors) -> Tensor:
    """All inner products of T tensors of one shape, in float64, on the CPU: (T, T)."""
    stack_TN = torch.stack([tensor.reshape(-1) for tensor in tensors]).double()
    gram_TT = (stack_TN @ stack_TN.T).cpu()
    return gram_TT.tril() + gram_TT.tril(-1).T


def gram_of(views: Views, rows: Callable[[Slot], Tensors]) -> Tensor:
    """Inner products of what `rows` gives of every block of elements, over all views, float64 on the CPU: (T, T)."""
    sum_TT: Tensor | None = None
    for view in views.views:
        for x in view.blocks("element"):
            own_TT = gram(rows(x))
            sum_TT = own_TT if sum_TT is None else sum_TT + own_TT
    assert sum_TT is not None, "there is nothing to look at"
    return sum_TT


def gram_of_vectors(views: Views) -> Tensor:
    """Inner products of the task vectors or, without a base, of the experts: (T, T)."""
    return gram_of(views, vectors)


def combination(x: Slot, coefficients: Sequence[float]) -> Tensor:
    """base + sum of coefficient * task vector; without a base, the sum of coefficient * expert: (X)."""
    sum_X = weighted_sum(x.experts, coefficients, x.precision)
    return sum_X.add_(x.reference, alpha=1 - sum(coefficients)) if x.has_base else sum_X


def vectors(x: Slot) -> Tensors:
    """What a geometric mean is taken of: the task vectors or, without a base, the experts; T times (X)."""
    return list(x.task_vectors) if x.has_base else x.experts


def squared_norms(view: View) -> Tensor:
    """Squared Euclidean norms of one tensor's task vectors: (T,) float64 on the CPU."""
    norms_T = torch.zeros(len(view.experts), dtype=torch.float64)
    for x in view.blocks("element"):
        norms_T += torch.stack([tau_X.double().square().sum() for tau_X in x.task_vectors]).cpu()
    return norms_T


def arc(cosine: Tensor, t: float, straight: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of two vectors with these cosines for the point at t of their arc; of their chord where `straight`."""
    angle = cosine.arccos()
    sine = torch.where(straight, 1.0, angle.sin())
    first = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / sine)
    return first, torch.where(straight, t, (t * angle).sin() / sine)


def task_mask(tau_X: Tensor, merged_tau_X: Tensor, threshold: float) -> Tensor:
    """Where a merged task vector serves an expert: |tau| > threshold * |merged - tau| (TALL-masks, 2405.07813)."""
    return tau_X.abs() > (merged_tau_X - tau_X).abs_().mul_(threshold)


def consensus(tau_TX: Tensors, merged_tau_X: Tensor, threshold: float, min_tasks: int) -> Tensor:
    """The merged task vector, zero where it serves fewer than `min_tasks` experts: (X)."""
    count_X = torch.zeros_like(merged_tau_X)
    for tau_X in tau_TX:
        count_X += task_mask(tau_X, merged_tau_X, threshold)
    return merged_tau_X * (count_X >= min_tasks)
