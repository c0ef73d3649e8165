"""WIDEN: columns that an expert turned or stretched more than its others count more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra.slots import Slot, View, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative

if TYPE_CHECKING:
    from torch import Tensor


def _is_turned(name: str, embeddings: list[str]) -> bool:
    """Whether the columns that are scored are the rows of the stored tensor."""
    return any(name == end or name.endswith("." + end) for end in embeddings)


def scores(
    views: Views, *, threshold: float, calibration: float, embeddings: list[str]
) -> Tensor | list[float]:
    """Of a matrix the score of every column, (T, N); of other tensors the mean of |tau| of each expert."""
    [view] = views.views
    if len(view.shape) != 2:
        totals = [0.0] * views.experts
        for x in view.blocks("row"):
            for t, tau_X in enumerate(x.task_vectors):
                totals[t] += float(tau_X.abs().sum(dtype=torch.float64))
        return [total / view.elements for total in totals]
    base_N, own_TN, mixed_TN = _column_products(view, _is_turned(view.name, embeddings))
    base_N, own_TN = base_N.sqrt(), own_TN.sqrt()
    longer_TN = (own_TN - base_N).abs()
    cosine_TN = mixed_TN / (own_TN * base_N).clamp(min=torch.finfo(torch.float64).tiny)
    turned_TN = torch.where((own_TN == 0) & (base_N == 0), 0.0, 1 - cosine_TN)
    found = [_scores(_shares(change), threshold, calibration) for change in (longer_TN, turned_TN)]
    return (found[0] + found[1]) / 2


def _column_products(view: View, turned: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per column, in float64: base^2 (N,), expert^2 (T, N) and expert * base (T, N), from one reading."""
    parts = []
    for x in view.blocks("row"):
        base_MN, axis = x.reference.double(), 1 if turned else 0
        experts = [expert_MN.double() for expert_MN in x.experts]
        own_TN = torch.stack([e.square().sum(axis) for e in experts])
        mixed_TN = torch.stack([(e * base_MN).sum(axis) for e in experts])
        parts.append((base_MN.square().sum(axis), own_TN, mixed_TN))
    base, own, mixed = (torch.cat(p, -1) if turned else sum(p) for p in zip(*parts))
    return base, own, mixed


def _shares(change_TN: Tensor) -> Tensor:
    """The rank of each column among the expert's, from 0 to 1; equal ones in their order: (T, N)."""
    return change_TN.argsort(dim=-1, stable=True).argsort(-1).double() / change_TN.shape[-1]


def _scores(
    significance_TX: Tensor, threshold: float, calibration: float, mean_T: Tensor | None = None
) -> Tensor:
    """Softmax over the experts; `calibration` where one is beyond threshold * its own mean: (T, *X)."""
    mean_T1 = significance_TX.mean(-1, keepdim=True) if mean_T is None else mean_T
    return torch.where(significance_TX > threshold * mean_T1, calibration, significance_TX.softmax(0))


@method(
    paper="2408.03092",
    code="yule-BUAA/MergeLLM@9178ef93",
    unit="row",
    needs=("base",),
    measure=scores,
)
def widen(
    x: Slot,
    *,
    threshold: NotNegative = 1.0,
    calibration: float = 1.0,
    embeddings: list[str] = ["embed_tokens.weight"],
) -> Tensor:
    """base + sum of score * tau; a column's score is the mean of those of its change in length and in direction.

    Changes are ranked among the columns of an expert; the softmax of the ranks over the experts is the score, or
    `calibration` where a rank is above `threshold` times the mean. Columns stand for inputs; for tensors whose names
    end like one of `embeddings` rows do. Entries of tensors that are no matrices are scored by |tau| itself, unranked.

    Formula:
        for each column: a = | ‖θₜ‖ − ‖θ₀‖ | and b = 1 − cos(θₜ, θ₀), as ranks among the columns, from 0 to 1
        s(a), s(b) = softmax over the experts; calibration where a rank exceeds threshold · its mean
        θ₀ + Σₜ ½ (s(aₜ) + s(bₜ)) ⊙ τₜ
    Parameters:
        threshold: how many times the mean a rank must be for `calibration` to take the softmax's place
        calibration: the score of what is beyond the threshold
        embeddings: ends of the names of tensors whose rows are scored in place of columns
    Trap:
        Scores do not sum to 1: with `calibration: 1` whole task vectors add up. Embeddings that `embeddings`
        does not name are scored along the wrong side. Near ties of ranks swap whole columns.
    """
    tau_TX = x.task_vectors
    if len(x.tensor_shape) != 2:
        mean_T = torch.tensor(x.found).to(tau_TX).reshape(-1, *[1] * len(x.shape))
        score_TX = _scores(tau_TX.abs(), threshold, calibration, mean_T)
    elif _is_turned(x.name, embeddings):
        first = x.start // x.tensor_shape[1]
        score_TX = x.found[:, first : first + x.shape[0], None]
    else:
        score_TX = x.found[:, None]
    return (tau_TX * score_TX.to(tau_TX)).sum(0)
