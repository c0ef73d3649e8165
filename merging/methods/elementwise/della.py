"""DELLA: drop entries with a probability that falls with their rank in the row, elect signs, merge what agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Iterator, Literal, Mapping

from mergeline.merging.algebra import combine, quantiles, sparsify
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import BelowOne, OneAnExpert, Share, Shares, Weights
from mergeline.merging.methods.wrapper.dare import kept, wants_masks

if TYPE_CHECKING:
    from torch import Tensor


def _window(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    for density, epsilon in _windows(params["density"], params["epsilon"], experts):
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            yield f"density {density} +/- epsilon {epsilon} leaves (0, 1); narrow the window"


def _windows(
    density: float | list[float], epsilon: float | list[float], experts: int
) -> list[tuple[float, float]]:
    """Density and epsilon of each expert."""
    return list(zip(sparsify.for_each(density, experts), sparsify.for_each(epsilon, experts)))


def keep_probability(tau_MN: Tensor, density: float, epsilon: float) -> Tensor:
    """density - epsilon for the smallest magnitude of a row, up to density + epsilon for the largest: (M, N).

    A density of 1 keeps everything.
    """
    last = tau_MN.shape[-1] - 1
    if last == 0 or density == 1:
        return torch.full_like(tau_MN, density)
    return quantiles.row_ranks(tau_MN).mul_(2 * epsilon / last).add_(density - epsilon)


def l1_ratios(
    views: Views, *, density: float | list[float], epsilon: float | list[float], masks: str
) -> list[float]:
    """What mergekit multiplies survivors by: the ratio of L1 norms before and after, one an expert."""
    before, after = [0.0] * views.experts, [0.0] * views.experts
    window_T = _windows(density, epsilon, views.experts)
    for view in views.views:
        for x in view.blocks("row"):
            for t, tau_MN in enumerate(x.task_vectors):
                size_MN = tau_MN.abs()
                before[t] += float(size_MN.sum(dtype=torch.float64))
                kept_MN = kept(x, t, keep_probability(tau_MN, *window_T[t]), masks)
                x.leave_mask(t, kept_MN)
                size_MN *= kept_MN
                after[t] += float(size_MN.sum(dtype=torch.float64))
    return [b / a if a > 0 else 1.0 for b, a in zip(before, after)]


def _rescales_by_norms(params: Mapping[str, Any]) -> Literal["tensor"] | None:
    return "tensor" if params["variant"] == "mergekit" and params["rescale"] else None


@method(
    paper="2406.11617",
    code="declare-lab/della@80675156",
    scale=1.1,
    unit="row",
    needs=wants_masks,
    measure=Look(l1_ratios, over=_rescales_by_norms),
    check=_window,
)
def della(
    x: Slot,
    *,
    density: Share | Shares = 0.3,
    epsilon: BelowOne | Annotated[list[BelowOne], OneAnExpert()] = 0.07,
    weights: Weights | None = None,
    normalize: bool = True,
    elect: bool = True,
    rescale: bool = True,
    scope: Literal["row"] = "row",
    masks: Literal["drawn", "given"] = "drawn",
    variant: Literal["official", "mergekit"] = "official",
) -> Tensor:
    """base + scale * merge of entries kept with a probability that grows with their magnitude's rank in the row.

    Survivors are divided by their probability (mergekit: multiplied by the ratio of L1 norms); then signs are elected
    and the entries that agree are averaged by weight; all are without `elect`. A convolution's rows are those of its
    last dimension. `density` and `epsilon` are numbers, or lists of one an expert.

    Formula:
        pₜ = density − epsilon + 2 · epsilon · r / (n − 1), r the rank of |τₜ| in its row of n, from 0
        τ̂ₜ = mₜ ⊙ τₜ / pₜ, mₜ = 1 with probability pₜ, else 0;  s = sign(Σₜ wₜ τ̂ₜ)
        θ₀ + scale · (sum of the wₜ τ̂ₜ that have the sign s) / (sum of their wₜ)
    Parameters:
        density: the mean probability with which an entry is kept
        epsilon: half the width of the window of probabilities
        elect: merge only the entries that agree with the elected sign
        rescale: divide survivors by their probability
    Trap:
        The official `window_size` is twice `epsilon`, and density ± epsilon must stay inside (0, 1). The
        official code takes no convolutions.
    """
    tau_TMN = []
    window_T = _windows(density, epsilon, len(x.experts))
    for t, tau_MN in enumerate(x.task_vectors):
        if x.found:
            kept_MN = x.left_mask(t)
            if kept_MN is None:
                kept_MN = kept(x, t, keep_probability(tau_MN, *window_T[t]), masks)
            tau_TMN.append((kept_MN * tau_MN).mul_(x.found[t]))
            continue
        keep_MN = keep_probability(tau_MN, *window_T[t])
        survivors_MN = kept(x, t, keep_MN, masks).to(tau_MN).mul_(tau_MN)
        tau_TMN.append(survivors_MN.div_(keep_MN) if rescale else survivors_MN)
    return combine.merge_signed(tau_TMN, weights, elect, normalize)
