"""DOGE: task vectors moved, outside of the subspace that they share, so that their sum interferes less with each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.slots import Inputs, Slot, View

if TYPE_CHECKING:
    from torch import Tensor


def trim(inputs: Inputs, *, density: float, keys: Keys, **_: Any) -> list[float]:
    """The least magnitude kept of each task vector, over all its matrices."""
    matrices = inputs.only(lambda view: is_matrix(view.name, view.shape, keys))
    return _trim(matrices.each, matrices.elements, density, len(inputs.views[0].source.experts))


def trim_tensor(view: View, *, density: float, scope: str, keys: Keys, **_: Any) -> list[float] | None:
    """The same of one matrix, unless the whole model was measured."""
    if scope == "global" or not is_matrix(view.name, view.shape, keys):
        return None
    return _trim(lambda function: [function(view)], view.elements, density, len(view.source.experts))


def _trim(each: ops.Each, elements: int, density: float, experts: int) -> list[float]:
    kth = elements - int(elements * density)  # so that one more is kept, as in ties
    if not kth:
        return [0.0] * experts
    found = ops.kth_smallest(each, lambda x: x.task_vectors, "element", lambda _: [[kth]] * experts)
    return [threshold for [threshold] in found]


@method(
    family="optimised",
    paper="2501.01230",
    code="tanganke/fusion_bench@54c9e8c9",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    prepass=trim,
    prepass_if=lambda params: params["scope"] == "global",
    measure=trim_tensor,
    spectral=True,
    beside=lambda rows, columns, experts: 2 * experts * rows * columns,
)
def doge(
    x: Slot,
    *,
    scale: float = 0.07,
    density: Annotated[float, Gt(0), Le(1)] = 0.3,
    subspace: Annotated[int, Ge(1)] = 6,
    iterations: Annotated[int, Ge(0)] = 400,
    learning_rate: Annotated[float, Gt(0)] = 1e-4,
    scope: Literal["global", "tensor"] = "global",
    keys: Keys = "block_linear",
) -> Tensor:
    """base + sum over tasks of l_t * (tau_t + D) where |tau_t| is large, l_t = scale / |tau_t|; other tensors: base.

    D comes from Adam on the sum over tasks and rows of <tau_t, tau_t - sum of l_s (tau_s + D)>^2, with gradients
    outside of the R / `subspace` leading left directions of all tasks' (R / T each).

    Formula:
        Q = the R / subspace leading left directions of [U₁ … U_T], Uₜ the R / T leading ones of τₜ
        lₜ = scale / ‖τₜ‖
        D descends on Σₜ Σ_rows ⟨τₜ, τₜ − Σₛ lₛ (τₛ + D)⟩² with gradients (1 − Q Qᵀ) g
        θ₀ + Σₜ lₜ (τₜ + D) ⊙ [|τₜ| among the density largest]
    Parameters:
        density: share of the entries of a task vector that is kept, of all matrices or each
        scale: the length that each task vector's part gets, whatever its own is
        subspace: the shared directions are this many times fewer than all
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps;
        T products a step
    Trap:
        All that is no block matrix, biases and norms as well, stays the base's. `scale` is divided by norms:
        it is not the scale of other methods.
    """
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base
    shared_MK = x.share(("doge", subspace), lambda: _shared(x, base, subspace)).to(x.dtype)
    tau_TMN = x.task_vectors
    rate_T = torch.stack([scale / size if (size := tau.double().norm()) else size for tau in tau_TMN])
    rate, rate_T = float(rate_T.sum()), rate_T.to(x.dtype)
    gap_TM = (tau_TMN * (tau_TMN - torch.einsum("t,tmn->mn", rate_T, tau_TMN))).sum(-1)

    def slope(moved_MN: Tensor) -> Tensor:
        left_TM = gap_TM - rate * torch.einsum("tmn,mn->tm", tau_TMN, moved_MN)
        slope_MN = torch.einsum("tmn,tm->mn", tau_TMN, left_TM).mul_(-2 * rate)
        return slope_MN.sub_(shared_MK @ (shared_MK.T @ slope_MN))

    moved_MN = ops.descend(
        slope, tau_TMN[0], optimizer="adam", learning_rate=learning_rate, iterations=iterations
    )
    merged_MN = base.clone()  # of a float64 model, `base` is the model's own
    for tau_MN, rate, least in zip(tau_TMN, rate_T, x.measured or x.facts):
        merged_MN += (tau_MN + moved_MN).mul_(rate).mul_(tau_MN.float().abs() >= least)
    return merged_MN


def _shared(x: Slot, base_MN: Tensor, subspace: int) -> Tensor:
    """The leading left directions of all task vectors' leading left directions: (M, K)."""
    side, count = min(x.shape), len(x.experts)
    lefts = []
    for t in range(count):
        tau_MN = spectral.task_vector(x, t, base_MN)
        lefts.append(spectral.leading_triplets(x, t, base_MN, tau_MN, "pretrained", side // count)[0])
    return spectral.singular_triplets(torch.cat(lefts, dim=-1), side // subspace)[0]
