"""OptMerge: WUDI with the interference measured against the leading directions of each task alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator, Literal

from mergeline.merging.algebra import combine, directions, quadratic
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import BelowOne, Count, Positive, TaskRank

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2505.19892",
    code="WalkerWorldPeace/MLLMerging@5f8a4583",
    scale=1.0,
    keys="block_linear",
    other="mean",
    needs=("base",),
    spectral=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def optmerge(
    x: Slot,
    *,
    iterations: Count = 300,
    learning_rate: Positive | None = None,
    momentum: BelowOne = 0.9,
    optimizer: Literal["sgd", "adam"] | None = None,
    rank: TaskRank = "1/T",
    variant: Literal["official", "fusion_bench"] = "official",
) -> Tensor:
    """base + scale * W, W descended from the mean on the sum of |(W - P_k(tau_t)) P_k(tau_t)^T|^2 / |tau_t|^2.

    fusion_bench, the port of the same repository: Adam from the sum, to P_k(tau_t - mean) + mean instead of P_k(tau_t).

    Formula:
        L(W) = Σₜ ‖(W − P_k(τₜ)) P_k(τₜ)ᵀ‖² / ‖τₜ‖², descended from the mean of the τₜ
        k = int(min(M, N) / T)
        θ₀ + scale · W
    Parameters:
        learning_rate: of the optimiser; by default 1e-4, of fusion_bench 1e-5
        momentum: of SGD
        optimizer: by default sgd, of fusion_bench adam
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert, which `--factors` keeps;
        a product of matrices a step
    Trap:
        The fusion_bench port is another algorithm: another start, target and optimiser.
    """
    official, k = variant == "official", directions.rank_for_task(rank, x.shape, len(x.experts))
    setting = {
        "optimizer": optimizer or ("sgd" if official else "adam"),
        "learning_rate": learning_rate or (1e-4 if official else 1e-5),
        "momentum": momentum,
        "iterations": iterations,
    }
    start_MN = combine.plain_update(x, "mean" if official else "sum")
    curvature_NN, slope_MN = quadratic.interference(start_MN, _terms(x, k, official))
    return start_MN + quadratic.descended(curvature_NN, slope_MN, x.dtype, **setting)


def _terms(x: Slot, k: int, official: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of every task the target (M, N), the rows (K, N) and the size of its term of the loss."""
    centred = x.from_mean()
    for t in range(len(x.experts)):
        tau_MN = directions.task_vector(x, t)
        u_MK, s_K, v_NK = directions.leading_triplets(x, t, k, tau_MN)
        if official:
            target_MN = (u_MK * s_K) @ v_NK.T
        else:
            _, left_ML, right_NL = directions.factors(centred, t, k, torch.float64)
            target_MN = left_ML[:, :k] @ right_NL[:, :k].T + (centred.reference - x.reference)
        yield target_MN, (v_NK * s_K).T, tau_MN.square().sum()
