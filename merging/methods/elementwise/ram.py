"""RAM: what one expert alone changed is kept, what several changed is averaged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative

if TYPE_CHECKING:
    from torch import Tensor


def boosts(
    views: Views, *, threshold: float, variant: str, rescale_factor: float, rescale_cap: float
) -> list[float]:
    """What each expert's unshared entries are multiplied by: 1 + factor * min(shared / unshared, cap)."""
    if variant == "ram":
        return [1.0] * views.experts
    shared, unshared = [0] * views.experts, [0] * views.experts
    for view in views.views:
        for x in view.blocks("element"):
            active_TX, count_X = _active(x, threshold)
            for t, active_X in enumerate(active_TX):
                alone = int((active_X & (count_X == 1)).sum())
                unshared[t] += alone
                shared[t] += int(active_X.sum()) - alone
    return [1 + rescale_factor * min(s / max(u, 1), rescale_cap) for s, u in zip(shared, unshared)]


@method(
    paper="2601.13572",
    code="arcee-ai/mergekit@a6e40288",
    experts=(2, None),
    needs=("base",),
    measure=boosts,
)
def ram(
    x: Slot,
    *,
    threshold: NotNegative = 1e-5,
    variant: Literal["ram", "ram_plus"] = "ram",
    rescale_factor: float = 0.1,
    rescale_cap: NotNegative = 0.2,
) -> Tensor:
    """base + the mean over those task vectors whose magnitude exceeds the threshold.

    ram_plus multiplies entries that a single expert changed by 1 + rescale_factor * min(r, rescale_cap), where r is
    how many shared entries of the tensor that expert has for each unshared one.

    Formula:
        c = how many t have |τₜ| > threshold, entry by entry
        θ₀ + Σ over these t of τₜ · (bₜ where c = 1, else 1 / c)
        bₜ = 1, in ram_plus 1 + rescale_factor · min(r, rescale_cap)
    Parameters:
        threshold: the magnitude above which an entry counts as changed
        variant: whether what one expert alone changed is amplified (ram_plus)
        rescale_factor: how much a unit of r amplifies
        rescale_cap: the largest r, an expert's number of shared entries for each unshared one
    Trap:
        `threshold` is absolute: after long training, or in 16 bits, it may count all entries as changed, and
        what is left is the mean.
    """
    active_TX, count_X = _active(x, threshold)
    merged_X = torch.zeros_like(x.reference)
    for tau_X, active_X, boost in zip(x.task_vectors, active_TX, x.found):
        factor_X = torch.where(count_X == 1, boost, 1 / count_X.clamp(min=1).to(tau_X.dtype))
        merged_X.addcmul_(tau_X * active_X, factor_X)
    return merged_X


def _active(x: Slot, threshold: float) -> tuple[list[Tensor], Tensor]:
    """Which entries each expert changed, and how many experts did: T times (X), (X)."""
    active_TX = [tau_X.abs() > threshold for tau_X in x.task_vectors]
    return active_TX, torch.stack(active_TX).sum(0)
