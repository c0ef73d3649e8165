"""SWUDI, IWUDI and ASWUDI: the optimisation of WUDI in closed form, by a filter of the spectrum of its loss."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, Other, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-8  # eigenvalues below it count as this much
_STEP = 0.9  # of Landweber's iteration, over the largest eigenvalue


@method(
    family="optimised",
    paper="MLLMerging repository",
    code="WalkerWorldPeace/MLLMerging@5f8a4583",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    beside=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def swudi(
    x: Slot,
    *,
    variant: Literal["swudi", "iwudi", "aswudi"] = "swudi",
    filter: Literal["exponential", "tikhonov", "landweber"] = "exponential",
    time: Annotated[float, Gt(0)] = 1300.0,
    alpha: Annotated[float, Gt(0)] = 0.01,
    iterations: Annotated[int, Ge(0)] = 150,
    rank: Annotated[float, Gt(0), Le(1)] = 0.65,
    rank_rounding: Literal["ceil", "floor"] = "ceil",
    scale: float = 1.0,
    keys: Keys = "matrices",
    other: Other = "mean",
) -> Tensor:
    """base + scale * (S + (D C^-1 - S) f(C)), from the sum S of task vectors towards the minimum D C^-1 of WUDI's loss.

    f is a function of the eigenvalues l of C: 1 - exp(-l * time), l / (l + alpha) (tikhonov) or
    1 - (1 - 0.9 l / l_max)^iterations (landweber). iwudi takes all N directions (the official code with time 300),
    swudi the rank * N leading ones, aswudi f = 1 in the ceil((sum of sqrt(l))^2 / sum of l) leading ones. `other` as in
    wudi.

    Formula:
        C = Σₜ τₜᵀ τₜ / ‖τₜ‖² = Q diag(l) Qᵀ,  D = Σₜ τₜ τₜᵀ τₜ / ‖τₜ‖²,  S = Σₜ τₜ
        θ₀ + scale · (S + (D C⁻¹ − S) Q diag(f(l)) Qᵀ)
        f(l) = 1 − exp(−l · time), l / (l + alpha) or 1 − (1 − 0.9 l / l_max)^iterations; 0 for what does not pass
    Parameters:
        variant: which directions pass: swudi the `rank` leading ones, iwudi all, aswudi as many as the
            spectrum says
        filter: the function f of the eigenvalues
        time: of the exponential filter: how long the descent would run
        alpha: of the tikhonov filter: the eigenvalue that is halved
        iterations: of the landweber filter
        rank: share of the N directions that swudi keeps
    Spectral work:
        a full eigendecomposition of an N x N matrix, of every matrix; points of a sweep share it
    Trap:
        Small eigenvalues amplify rounding, so all of it is in float64. It acts on every 2-D tensor,
        embeddings too. `time` and `rank` were tuned for each model family.
    """
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, other)

    def spectrum() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        start_MN = ops.plain_update(x.experts, base, "sum")
        curvature_NN, slope_MN = spectral.interference_of_tasks(x, base, start_MN)
        energy_N, q_NN = spectral.leading(curvature_NN, len(curvature_NN))
        return start_MN, slope_MN @ q_NN, energy_N.clamp(min=_LEAST), q_NN

    def update() -> Tensor:
        start_MN, slope_MN, energy_N, q_NN = x.share("wudi spectrum", spectrum)
        if variant == "aswudi":
            passed_N, kept = torch.ones_like(energy_N), ceil(energy_N.sqrt().sum() ** 2 / energy_N.sum())
        else:
            passed_N = {
                "exponential": lambda: 1 - torch.exp(-energy_N * time),
                "tikhonov": lambda: energy_N / (energy_N + alpha),
                "landweber": lambda: 1 - (1 - _STEP * energy_N / energy_N[0]) ** iterations,
            }[filter]()
            whole = variant == "iwudi"
            kept = len(energy_N) if whole else spectral.rank_of(rank, energy_N.shape, rank_rounding)
        step_MK = slope_MN[:, :kept] * (passed_N / energy_N)[:kept]
        return start_MN - step_MK @ q_NN[:, :kept].T

    setting = ("swudi", variant, filter, time, alpha, iterations, rank, rank_rounding)
    return torch.add(base, x.share(setting, update), alpha=scale)
