"""OptMerge: WUDI with the interference measured against the leading directions of each task alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Iterator, Literal

from annotated_types import Ge, Gt, Le, Lt

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, Other, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="optimised",
    paper="2505.19892",
    code="WalkerWorldPeace/MLLMerging@5f8a4583",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    beside=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def optmerge(
    x: Slot,
    *,
    iterations: Annotated[int, Ge(0)] = 300,
    learning_rate: Annotated[float, Gt(0)] | None = None,
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9,
    optimizer: Literal["sgd", "adam"] | None = None,
    rank: Annotated[float, Gt(0), Le(1)] | Literal["1/T"] = "1/T",
    scale: float = 1.0,
    keys: Keys = "block_linear",
    other: Other = "mean",
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
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, other)
    official, k = variant == "official", spectral.rank_for_task(rank, x)
    setting = {
        "optimizer": optimizer or ("sgd" if official else "adam"),
        "learning_rate": learning_rate or (1e-4 if official else 1e-5),
        "momentum": momentum,
        "iterations": iterations,
    }

    def terms() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        mean = None if official else ops.mean(x.experts)
        for t in range(len(x.experts)):
            tau_MN = spectral.task_vector(x, t, base)
            u, s, v = spectral.leading_triplets(x, t, base, tau_MN, "pretrained", k)
            if official:
                target_MN = (u * s) @ v.T
            else:
                _, left_ML, right_NL = spectral.factors(x, t, mean, "mean", k, torch.float64)
                target_MN = left_ML[:, :k] @ right_NL[:, :k].T + (mean - base)
            yield target_MN, (v * s).T, tau_MN.square().sum()

    def update() -> Tensor:
        start_MN = ops.plain_update(x.experts, base, "mean" if official else "sum")
        curvature_NN, slope_MN = spectral.interference(start_MN, terms())
        return start_MN + spectral.descended(curvature_NN, slope_MN, x.dtype, **setting)

    return torch.add(base, x.share(("optmerge", k, variant, *setting.values()), update), alpha=scale)
