"""PCB: parameters compete within a task and between tasks; the strongest are averaged by strength."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from mergeline.merging.algebra import quantiles, sums
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Look, method
from mergeline.merging.methods.parameters import Weights

if TYPE_CHECKING:
    from torch import Tensor


def bounds(views: Views, *, density: float, clamp: float, variant: str) -> dict[str, Any]:
    """For each expert: between which magnitudes entries are clamped; and from which strength to which they count."""
    n, experts = views.elements, views.experts
    places = [[int(n * clamp) + 1, max(1, int(n * (1 - clamp)))]] * experts
    clamps = quantiles.kth_smallest(views.total, lambda x: x.task_vectors, "element", places)

    def ordered(
        sign: int, places: list[int]
    ) -> list[list[float]]:  # one sign at a time: magnitudes are ordered
        def rows(x: Slot) -> list[Tensor]:
            return [(sign * strength_X).clamp_(min=0) for strength_X in _strengths(x, clamps, variant)]

        return quantiles.kth_smallest(views.total, rows, "element", [places] * experts)

    low = min(int(n * (1 - density)), n - 1) + 1
    strengths = ordered(1, [low, n])
    if not all(least > 0 for least, _ in strengths):
        negative = ordered(-1, [n - low + 1, 1])
        strengths = [[p - m for p, m in zip(*pair)] for pair in zip(strengths, negative)]
    return {"clamps": clamps, "strengths": strengths}


@method(
    paper="2410.02396",
    code="duguodong7/pcb-merging@5897888b",
    experts=(2, None),
    needs=("base",),
    measure=Look(bounds, over="model"),
)
def pcb(
    x: Slot,
    *,
    density: Annotated[float, Gt(0), Lt(1)] = 0.05,
    scale: float | Weights = 1.2,
    clamp: Annotated[float, Ge(0), Lt(0.5)] = 0.01,
    scope: Literal["global"] = "global",
    variant: Literal["es", "root", "nlp", "vision"] = "es",
) -> Tensor:
    """base + scale * mean of the clamped task vectors, weighted by their strength above its 1 - density quantile.

    Magnitudes are clamped to their [clamp, 1 - clamp] quantiles over the model; u is that from 0 to 1, z with its
    sign. Strength is exp(T * u^2) times the support of all: the sum of tanh(z_i * z_j) over j (es), tanh(tau_i *
    sum of z) (vision), tanh(tau_i * sum of tau) (root, nlp). Official clamps: 1e-4 for root, 0.01 for the others.

    Formula:
        Zₜ = sign(τₜ) · |τₜ| clamped to its quantiles and mapped to [0, 1]
        Bₜ = exp(T · Zₜ²) ⊙ Σₛ tanh(Zₜ ⊙ Zₛ)
        Sₜ = max(0, Bₜ − q) / (max Bₜ − q), q the 1 − density quantile of Bₜ
        θ₀ + scale · Σₜ Sₜ ⊙ clamped τₜ / Σₜ Sₜ
    Parameters:
        density: share of an expert's entries that win the competition
        clamp: share of the entries at each end whose magnitudes are clamped
        variant: which of the official versions is followed; they differ in what supports an entry, and the
            formula is that of es
    Trap:
        The four official versions are different methods. `scale` multiplies a normalised average, so it does
        not stand for the number of experts; values near 1 are usual.
    """
    sum_X, weight_X = torch.zeros_like(x.reference), torch.zeros_like(x.reference)
    scale_T = scale if isinstance(scale, list) else [1.0] * len(x.experts)
    strength_TX = _strengths(x, x.found["clamps"], variant)
    for tau_X, strength_X, clamps, (low, high), own in zip(
        x.task_vectors, strength_TX, x.found["clamps"], x.found["strengths"], scale_T
    ):
        if high > low:
            above_X = (strength_X - low).mul_(strength_X.float() > low).div_(high - low)
            sum_X.addcmul_(tau_X.sign() * tau_X.abs().clamp(*clamps), above_X, value=own)
            weight_X += above_X
    merged_X = sum_X.div_(weight_X.clamp_(min=1e-12))
    return merged_X if isinstance(scale, list) else merged_X.mul_(scale)


def _strengths(x: Slot, clamps: list[list[float]], variant: str) -> list[Tensor]:
    tau_TX, experts = x.task_vectors, len(x.experts)
    unit_TX = [
        (tau_X.abs().clamp(low, high) - low) / ((high - low) or 1.0)
        for tau_X, (low, high) in zip(tau_TX, clamps)
    ]
    signed_TX = [unit_X * tau_X.sign() for unit_X, tau_X in zip(unit_TX, tau_TX)]
    if variant == "es":
        support_TX = [(one_X**2).tanh_() for one_X in signed_TX]
        for t, s in combinations(range(experts), 2):
            support_X = (signed_TX[t] * signed_TX[s]).tanh_()
            support_TX[t] += support_X
            support_TX[s] += support_X
    else:
        total_X = sums.total(signed_TX if variant == "vision" else tau_TX)
        support_TX = [(tau_X * total_X).tanh_() for tau_X in tau_TX]
    # Divided by exp(T), which normalising undoes, so that nothing overflows.
    return [(unit_X**2 - 1).mul_(experts).exp_() * s_X for unit_X, s_X in zip(unit_TX, support_TX)]
