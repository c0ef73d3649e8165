"""SWUDI, IWUDI and ASWUDI: the optimisation of WUDI in closed form, by a filter of the spectrum of its loss."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine, decompositions, linear, quadratic
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Count, NotNegative, Positive, Share

if TYPE_CHECKING:
    from torch import Tensor


_LEAST = 1e-8  # eigenvalues below it count as this much
_STEP = 0.9  # of Landweber's iteration, over the largest eigenvalue


def _spectrum(x: Slot, norm_power: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of the task vectors (M, N); the slope there in the eigenvectors of C (M, N), their values and they."""
    start_MN = combine.plain_update(x, "sum")
    curvature_NN, slope_MN = quadratic.interference_of_tasks(x, start_MN, norm_power)
    energy_N, q_NN = decompositions.leading(curvature_NN, len(curvature_NN))
    return start_MN, slope_MN @ q_NN, energy_N.clamp(min=_LEAST), q_NN


@method(
    paper="MLLMerging repository",
    code="WalkerWorldPeace/MLLMerging@5f8a4583",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base",),
    spectral=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def swudi(
    x: Slot,
    *,
    variant: Literal["swudi", "iwudi", "aswudi"] = "swudi",
    filter: Literal["exponential", "tikhonov", "landweber"] = "exponential",
    time: Positive = 1300.0,
    alpha: Positive = 0.01,
    iterations: Count = 150,
    rank: Share = 0.65,
    rank_rounding: Literal["ceil", "floor"] = "ceil",
    norm_power: NotNegative = 2.0,
) -> Tensor:
    """base + scale * (S + (D C^-1 - S) f(C)), from the sum S of task vectors towards the minimum D C^-1 of WUDI's loss.

    f is a function of the eigenvalues l of C: 1 - exp(-l * time), l / (l + alpha) (tikhonov) or
    1 - (1 - 0.9 l / l_max)^iterations (landweber). iwudi takes all N directions (the official code with time 300),
    swudi the rank * N leading ones, aswudi f = 1 in the ceil((sum of sqrt(l))^2 / sum of l) leading ones. `other` and
    `norm_power` as in wudi: with 0 all directions of an endless time are ACTMerge, the trace of C stays the same.

    Formula:
        C = Σₜ τₜᵀ τₜ / ‖τₜ‖² = Q diag(l) Qᵀ,  D = Σₜ τₜ τₜᵀ τₜ / ‖τₜ‖²,  S = Σₜ τₜ; 2 is norm_power
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
        norm_power: of the norm that a task's term is divided by: 2 is WUDI, 0 ACTMerge
    Spectral work:
        a full eigendecomposition of an N x N matrix, of every matrix; points of a sweep share it
    Trap:
        Small eigenvalues amplify rounding, so all of it is in float64. It acts on every 2-D tensor,
        embeddings too. `time` and `rank` were tuned for each model family.
    """
    start_MN, slope_MN, energy_N, q_NN = x.shared(_spectrum, norm_power)
    if variant == "aswudi":
        passed_N, kept = torch.ones_like(energy_N), ceil(energy_N.sqrt().sum() ** 2 / energy_N.sum())
    else:
        passed_N = {
            "exponential": lambda: 1 - torch.exp(-energy_N * time),
            "tikhonov": lambda: energy_N / (energy_N + alpha),
            "landweber": lambda: 1 - (1 - _STEP * energy_N / energy_N[0]) ** iterations,
        }[filter]()
        whole = variant == "iwudi"
        kept = len(energy_N) if whole else linear.rank_of(rank, energy_N.shape, rank_rounding)
    step_MK = slope_MN[:, :kept] * (passed_N / energy_N)[:kept]
    return start_MN - step_MK @ q_NN[:, :kept].T
