"""SCE: select entries that vary most between experts, weigh experts by energy, erase minority signs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le

from merging import operators as ops
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot, View

if TYPE_CHECKING:
    from torch import Tensor

_SMALL = 1e-6  # of sums of weights, as in the official code


def _variance(x: Slot) -> Tensor:
    """Population variance over the experts: (X)."""

    def compute() -> Tensor:
        tau_TX = x.task_vectors
        mean_X = ops.total(tau_TX).div_(len(tau_TX))
        variance_X = torch.zeros_like(mean_X)
        for tau_X in tau_TX:
            apart_X = tau_X - mean_X
            variance_X.addcmul_(apart_X, apart_X)
        return variance_X.div_(len(tau_TX))

    return x.remember("variance", compute)


def selection(view: View, *, density: float, **_: Any) -> dict[str, Any]:
    """The smallest variance that is selected, and the experts' weights: their share of the selected energy."""
    threshold = 0.0
    if density < 1:

        def place(nonzero: list[int]) -> list[list[int]] | None:
            count = int(nonzero[0] * density)
            return [[view.elements - count + 1]] if count else None

        found = ops.kth_smallest(lambda f: [f(view)], lambda x: [_variance(x)], "element", place)
        if found is None:
            return {"threshold": None, "weights": None}
        [[threshold]] = found
    energy_T = sum(
        torch.stack([_selected(x, tau_X, threshold).double().square().sum() for tau_X in x.task_vectors])
        for x in view.blocks("element")
    )
    energy_T = energy_T / view.elements
    small = float(energy_T.sum()) < _SMALL
    weights_T = torch.full_like(energy_T, 1 / len(energy_T)) if small else energy_T / energy_T.sum()
    return {"threshold": threshold, "weights": weights_T.tolist()}


@method(
    family="elementwise",
    paper="2408.07990",
    code="arcee-ai/mergekit@a6e40288",
    reference="pretrained",
    needs_base=True,
    minimum_experts=2,
    measure=selection,
)
def sce(
    x: Slot, *, density: Annotated[float, Gt(0), Le(1)] = 1.0, scope: Literal["tensor"] = "tensor"
) -> Tensor:
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
    if x.measured["threshold"] is None:
        return x.base
    tau_TX = [_selected(x, tau_X, x.measured["threshold"]) for tau_X in x.task_vectors]
    sign_X = ops.elect_signs(tau_TX, None, 1.0)
    merged, count = ops.orthant_sum(tau_TX, sign_X, x.measured["weights"])
    return (merged / count.clamp_(min=_SMALL)).add_(x.base)


def _selected(x: Slot, tau_X: Tensor, threshold: float) -> Tensor:
    if threshold <= 0:
        return tau_X
    return tau_X * x.remember(("selected", threshold), lambda: _mask(x, threshold).to(tau_X.dtype))


def _mask(x: Slot, threshold: float) -> Tensor:
    """Which entries are selected, which `selection` finds and leaves for the merge: (X) of 0 and 1."""
    left_X = x.left_mask(threshold) if x.measured else None
    if left_X is not None:
        return left_X
    chosen_X = _variance(x).float() >= threshold
    if not x.measured:
        x.leave_mask(threshold, chosen_X)
    return chosen_X
