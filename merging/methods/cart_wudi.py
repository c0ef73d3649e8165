"""CART and WUDI in one: the centred update that interferes least, its spectrum flattened, and low-rank parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import method
from merging.methods.cart import Share, low_rank_sum
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


@method(
    family="optimised",
    paper="Mergeline's own, of 2503.08099 (WUDI), 2412.12153 (CART) and 2502.04959 (Iso-C)",
    code="",
    reference="mean",
    unit="matrix",
    needs_base=True,
    minimum_experts=2,
    spectral=True,
    beside=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def cart_wudi(
    x: Slot,
    *,
    scale: float = 1.5,
    damping: Annotated[float, Gt(0)] = 0.03,
    power: Annotated[float, Ge(0), Le(1)] = 0.55,
    low_rank: Annotated[float, Ge(0)] = 0.5,
    rank: Share = 0.25,
    keys: Keys = "block_linear",
) -> Tensor:
    """mean + scale * (F + low_rank * L); other tensors: the mean. Not in any paper.

    W minimises WUDI's loss in mean + W, see `wudi`, plus damping * (mean eigenvalue of C) * |W|^2: directions that no
    task vector claims stay with the mean. F is W with its singular values raised to `power`, and its norm: 1 leaves W,
    0 makes them equal, as Iso-C does. L is CART's update, the sum of the rank-k parts of (expert - mean).

    Formula:
        W = argmin Σₜ ‖(θ̄ − θ₀ + W − τₜ) τₜᵀ‖² / ‖τₜ‖² + damping · mean eigenvalue of C · ‖W‖²
        F = ‖W‖ · U S^power Vᵀ / ‖S^power‖, W = U S Vᵀ;  L = Σₜ P_k(θₜ − θ̄), k from `rank`
        θ̄ + scale · (F + low_rank · L)
    Parameters:
        damping: in mean eigenvalues of C = Σₜ τₜᵀ τₜ / ‖τₜ‖²
        power: 1 leaves the singular values of W, 0 makes them equal
        low_rank: how much of CART's update is added
    Spectral work:
        an N x N Gram matrix and one Cholesky factorisation a matrix, an eigendecomposition of W's smaller Gram
        matrix, and those of `cart`
    Trap:
        Its form and its defaults were found on the validation images of the sample family of this repository;
        other families may want others, and no paper has measured it.
    """
    mean = ops.mean(x.experts)
    if not is_matrix(x.name, x.shape, keys):
        return mean

    def least() -> Tensor:
        base = x.base.double()
        curvature_NN, slope_MN = spectral.interference_of_tasks(x, base, mean - base)
        return spectral.damped_minimum(curvature_NN, slope_MN, damping)

    def flattened() -> Tensor:
        return spectral.raised_to(x.share(("least interference", damping), least), power)

    update_MN = x.share(("cart_wudi", damping, power), flattened)
    if low_rank:
        k = spectral.rank_of(rank, x.shape)
        parts_MN = x.share(("cart", "mean", k, "sum", "svd"), lambda: low_rank_sum(x, mean, "mean", k))
        update_MN = torch.add(update_MN, parts_MN, alpha=low_rank)
    return torch.add(mean, update_MN, alpha=scale)
