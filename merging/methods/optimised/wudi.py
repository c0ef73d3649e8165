"""WUDI: the merged task vector that interferes least with the inputs of every task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from mergeline.merging.algebra import combine, quadratic
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Count, NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2503.08099",
    code="nathanielyvo/WUDI-Merging@dc3cd120",
    scale=1.0,
    keys="block_linear",
    needs=("base",),
    spectral=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def wudi(
    x: Slot,
    *,
    solver: Literal["iterative", "direct"] = "iterative",
    iterations: Count = 300,
    learning_rate: Positive = 1e-5,
    optimizer: Literal["adam", "sgd"] = "adam",
    damping: Positive = 0.01,
    norm_power: NotNegative = 2.0,
) -> Tensor:
    """base + scale * W, W near the least sum over tasks t of |(W - tau_t) tau_t^T|^2 / |tau_t|^2.

    `iterative`: what the optimiser reaches from W = sum of tau_t; stopping early is what regularises. `direct`: the
    exact minimum of the loss with `damping` * (mean eigenvalue of C) * |W|^2 added, C the sum of
    tau_t^T tau_t / |tau_t|^2. `other` is what the remaining tensors add: nothing, the mean or the sum of the task
    vectors.

    `norm_power` is that of the norms which divide. With 0 long task vectors count for more, and the direct minimum is,
    but for the damping, that of ACTMerge (apanariello4/merge-and-rebase@345c5704): (Σ tau_t tau_t^T tau_t)
    (Σ tau_t^T tau_t)^+. Whatever it is, the loss is multiplied by what gives C the trace that it has with 2, so that
    learning rates and damping keep their meaning.

    Formula:
        L(W) = Σₜ ‖(W − τₜ) τₜᵀ‖² / ‖τₜ‖^norm_power, descended from W = Σₜ τₜ
        θ₀ + scale · W
    Parameters:
        solver: what the optimiser reaches, or the exact minimum of the damped loss
        damping: of the direct solver, in mean eigenvalues of C
        norm_power: of the norm that a task's term is divided by: 2 is WUDI, 0 ACTMerge
    Spectral work:
        an N x N Gram matrix a matrix, and a product with it a step; of the direct solver, one Cholesky
        factorisation
    Trap:
        Stopping early is the regulariser: more iterations are another method, not a better minimum. Tensors
        that are no block matrices stay the base's unless `other` says otherwise.
    """
    direct = solver == "direct"
    start_MN = torch.zeros_like(x.reference) if direct else combine.plain_update(x, "sum")
    curvature_NN, slope_MN = quadratic.interference_of_tasks(x, start_MN, norm_power)
    if direct:
        return quadratic.damped_minimum(curvature_NN, slope_MN, damping)
    setting = {"optimizer": optimizer, "learning_rate": learning_rate, "iterations": iterations}
    return start_MN + quadratic.descended(curvature_NN, slope_MN, x.dtype, **setting)
