"""CART and WUDI in one: the centred update that interferes least, its spectrum flattened, and low-rank parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import decompositions, linear, quadratic
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import NotNegative, Positive, Rate, Share
from mergeline.merging.methods.spectral.cart import low_rank_sum

if TYPE_CHECKING:
    from torch import Tensor


def _least(x: Slot, damping: float) -> Tensor:
    """W: the update around the mean that interferes least: (M, N)."""
    around_base = x.from_base()
    curvature_NN, slope_MN = quadratic.interference_of_tasks(around_base, x.reference - around_base.reference)
    return quadratic.damped_minimum(curvature_NN, slope_MN, damping)


def flattened(x: Slot, damping: float, power: float) -> Tensor:
    """F: the same with its singular values raised to a power: (M, N)."""
    return decompositions.raised_to(x.shared(_least, damping), power)


def _low_rank(x: Slot, rank: float) -> Tensor:
    """L: what CART adds: (M, N)."""
    return low_rank_sum(x, linear.rank_of(rank, x.shape))


@method(
    paper="Mergeline's own, of 2503.08099 (WUDI), 2412.12153 (CART) and 2502.04959 (Iso-C)",
    reference="mean",
    scale=1.5,
    keys="block_linear",
    experts=(2, None),
    needs=("base",),
    spectral=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def cart_wudi(
    x: Slot,
    *,
    damping: Positive = 0.03,
    power: Rate = 0.55,
    low_rank: NotNegative = 0.5,
    rank: Share = 0.25,
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
    update_MN = x.shared(flattened, damping, power)
    return torch.add(update_MN, x.shared(_low_rank, rank), alpha=low_rank) if low_rank else update_MN
