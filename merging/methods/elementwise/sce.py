"""SCE: select entries that vary most between experts, weigh experts by energy, erase minority signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergeline.merging.algebra import combine, quantiles, sums
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share

if TYPE_CHECKING:
    from torch import Tensor


_SMALL = 1e-6  # of sums of weights, as in the official code


def _variance(x: Slot) -> Tensor:
    """Population variance over the experts: (X)."""
    tau_TX = x.task_vectors
    mean_X = sums.total(tau_TX).div_(len(tau_TX))
    variance_X = torch.zeros_like(mean_X)
    for tau_X in tau_TX:
        apart_X = tau_X - mean_X
        variance_X.addcmul_(apart_X, apart_X)
    return variance_X.div_(len(tau_TX))


def selection(views: Views, *, density: float) -> dict[str, Any]:
    """The smallest variance that is selected, and the experts' weights: their share of the selected energy."""
    threshold = 0.0
    if density < 1:

        def place(nonzero: list[int]) -> list[list[int]] | None:
            count = int(nonzero[0] * density)
            return [[views.elements - count + 1]] if count else None

        found = quantiles.kth_smallest_of(views.total, lambda x: [x.once(_variance)], "element", place)
        if found is None:
            return {"threshold": None, "weights": None}
        [[threshold]] = found
    energy_T = sums.added(
        torch.stack([_selected(x, tau_X, threshold).double().square().sum() for tau_X in x.task_vectors])
        for view in views.views
        for x in view.blocks("element")
    )
    energy_T = energy_T / views.elements
    small = float(energy_T.sum()) < _SMALL
    weights_T = torch.full_like(energy_T, 1 / len(energy_T)) if small else energy_T / energy_T.sum()
    return {"threshold": threshold, "weights": weights_T.tolist()}


@method(
    paper="2408.07990",
    code="arcee-ai/mergekit@a6e40288",
    experts=(2, None),
    needs=("base",),
    measure=selection,
)
def sce(x: Slot, *, density: Share = 1.0, scope: Literal["tensor"] = "tensor") -> Tensor | None:
    """base + energy-weighted mean of the entries that vary most between experts and agree with the elected sign.

    As in the official code, sums of weights are not smaller than 1e-6.

    Formula:
        τ̂ₜ = the entries of τₜ whose variance over the experts is among the density largest of the tensor
        wₜ = ‖τ̂ₜ‖² / Σₛ ‖τ̂ₛ‖²;  s = sign(Σₜ τ̂ₜ)
        θ₀ + (sum of the wₜ τ̂ₜ that have the sign s) / (sum of their wₜ)
    Parameters:
        density: share of a tensor's varying entries that is selected
    Trap:
        Weights become uniform where Σₜ mean(τ̂ₜ²) < 1e-6, as in the official code: small task vectors are all
        below it.
    """
    if x.found["threshold"] is None:
        return None
    tau_TX = [_selected(x, tau_X, x.found["threshold"]) for tau_X in x.task_vectors]
    sign_X = combine.elect_signs(tau_TX, None, 1.0)
    merged, count = combine.orthant_sum(tau_TX, sign_X, x.found["weights"])
    return merged / count.clamp_(min=_SMALL)


def _selected(x: Slot, tau_X: Tensor, threshold: float) -> Tensor:
    if threshold <= 0:
        return tau_X
    return tau_X * x.once(_mask, threshold)


def _mask(x: Slot, threshold: float) -> Tensor:
    """Which entries are selected, which `selection` finds and leaves for the merge: (X) of 0 and 1."""
    left_X = x.left_mask(0) if x.found else None
    if left_X is not None:
        return left_X
    chosen_X = x.once(_variance).float() >= threshold
    if not x.found:
        x.leave_mask(0, chosen_X)
    return chosen_X.to(x.task_vectors.dtype)
