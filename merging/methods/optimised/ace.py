"""ACE-Merging: experts weighed by the covariances of their inputs, which their own task vectors stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine, decompositions, directions, linear, quadratic
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative, Positive, Share

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2603.02945",
    code="unravel-xu/ACE-Merging@22d9dfea",
    scale=1.0,
    keys="matrices",
    other="mean",
    needs=("base",),
    spectral=lambda rows, columns, experts: 6 * columns**2 + 8 * rows * columns,
)
def ace(
    x: Slot,
    *,
    epsilon: Positive | None = None,
    threshold: NotNegative = 0.3,
    rank: Share = 0.3,
    variant: Literal["paper", "official"] = "paper",
) -> Tensor:
    """base + scale * (sum of tau_t S_t) (sum of S_t + C)^-1, S_t the covariance of the rows of tau_t; others: the mean.

    Provisional. What is here as `paper` was put together from descriptions of the paper, not from its text, and leaves
    open: whether tau or whole weights are averaged (here tau, uncentred), whether g is one of a layer or of the model
    (here of each matrix), its variance (here with T - 1), of which singular values the refinement takes the mean (here
    of the k kept), and what other tensors get (here the mean). `official` follows the code that was released as the
    paper's, which differs: tau is centred in the first sum, `epsilon` is 0.01 and is divided by the trace in
    heterogeneous layers alone, where C is divided by the mean squared norm as well.

    C has in every row the column means of the sum of the covariances, so it is not symmetric; it is of rank one, and
    the inverse always exists. Experts whose rows are all alike have no covariance, and say nothing; if all are so, the
    mean is added.

    Formula:
        Kₜ = (τₜ − 1 μₜᵀ)ᵀ (τₜ − 1 μₜᵀ), μₜ the column means;  g = Var log ‖τₜ‖² / (mean log ‖τₜ‖²)²
        where g > threshold the layer is heterogeneous, and Kₜ is divided by its trace
        Sₜ = Kₜ + epsilon / (the trace before) · I;  C = 1 cᵀ, c the column means of Σₜ Kₜ
        W = (Σₜ τₜ Sₜ) (Σₜ Sₜ + C)⁻¹
        where heterogeneous: W + s · U_k V_kᵀ, U S Vᵀ = W + Σₜ τₜ (Kₜ − mean K), s the mean of the k of S
        θ₀ + scale · W
    Parameters:
        epsilon: ridge; by default 1e-5, of official 1e-2 (the paper: 1e-5 for ViT, 2e-4 RoBERTa, 4e-2 GPT-2)
        threshold: of g, from where on a layer is heterogeneous
        rank: share of the singular values that the refinement keeps
        variant: as described, or as the released code has it
    Spectral work:
        one Cholesky factorisation of an N x N matrix; of heterogeneous layers the leading triplets of a matrix, too
    Trap:
        g depends on the unit of the weights: it is the spread of logarithms over their mean, so that norms near 1 make
        any layer heterogeneous, and all weights times ten may change the method. The merge jumps where g passes the
        threshold. One expert does not come back, for C is in what divides.
    """
    energies = [float(directions.task_vector(x, t).square().sum()) for t in range(len(x.experts))]
    if not any(energies):
        return combine.plain_update(x, "mean")
    spread, official = _spread(energies) > threshold, variant == "official"
    ridge = epsilon or (1e-2 if official else 1e-5)
    rows, side = x.shape
    own_MN, plain_MN, weighted_MN = (torch.zeros_like(x.reference, dtype=torch.float64) for _ in range(3))
    cov_NN = own_MN.new_zeros(side, side)
    ridges, counted = 0.0, 0
    for t in range(len(x.experts)):
        tau_MN = directions.task_vector(x, t)
        centred_MN = tau_MN - tau_MN.mean(0)
        trace = float(centred_MN.square().sum())
        if not trace > 1e-24 * energies[t]:  # all rows alike
            continue
        own_NN = linear.mirrored(linear.inner(centred_MN))
        added = ridge / trace if spread or not official else ridge
        own_NN = own_NN.div_(trace) if spread else own_NN
        if spread:
            own_MN.addmm_(tau_MN, own_NN)
            plain_MN.add_(tau_MN)
        averaged_MN = centred_MN if official else tau_MN
        weighted_MN.addmm_(averaged_MN, own_NN).add_(averaged_MN, alpha=added)
        cov_NN.add_(own_NN)
        ridges, counted = ridges + added, counted + 1
    if not counted:
        return combine.plain_update(x, "mean")
    shift_N = cov_NN.mean(0)
    if official and spread:
        shift_N = shift_N / (sum(energies) / len(energies))
    if spread:  # before it is overwritten
        mean_NN = cov_NN / counted
        if official:
            mean_NN.diagonal().add_(ridges / counted)
        own_MN.sub_(plain_MN @ mean_NN)
    cov_NN.diagonal().add_(ridges)
    merged_MN = _divided_by_shifted(weighted_MN, cov_NN, shift_N)
    if not spread:
        return merged_MN
    u_MK, s_K, v_NK = decompositions.singular_triplets(merged_MN + own_MN, linear.rank_of(rank, x.shape))
    return merged_MN.addmm_(u_MK, v_NK.T, alpha=float(s_K.mean()))


def _spread(energies: list[float]) -> float:
    """The variance of the logarithms of squared norms over their squared mean; of task vectors that are not zero."""
    logs = torch.tensor([energy for energy in energies if energy > 0], dtype=torch.float64).log()
    if len(logs) < 2:
        return 0.0
    return float(logs.var() / logs.mean().square().clamp(min=1e-12))


def _divided_by_shifted(b_MN: Tensor, a_NN: Tensor, shift_N: Tensor) -> Tensor:
    """B (A + 1 shift^T)^-1 for a positive definite A, by the Sherman-Morrison formula; A is overwritten."""
    solved_MN = quadratic.divided(torch.cat([b_MN, shift_N[None]]), a_NN)
    solved_MN, shift_N = solved_MN[:-1], solved_MN[-1]
    return solved_MN - torch.outer(solved_MN.sum(1), shift_N) / (1 + shift_N.sum())
