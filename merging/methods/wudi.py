"""WUDI: the merged task vector that interferes least with the inputs of every task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Gt

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
    paper="2503.08099",
    code="nathanielyvo/WUDI-Merging@dc3cd120",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
    spectral=True,
    beside=lambda rows, columns, experts: 6 * columns**2 + 6 * rows * columns,
)
def wudi(
    x: Slot,
    *,
    solver: Literal["iterative", "direct"] = "iterative",
    iterations: Annotated[int, Ge(0)] = 300,
    learning_rate: Annotated[float, Gt(0)] = 1e-5,
    optimizer: Literal["adam", "sgd"] = "adam",
    damping: Annotated[float, Gt(0)] = 0.01,
    scale: float = 1.0,
    keys: Keys = "block_linear",
    other: Other = "pretrained",
) -> Tensor:
    """base + scale * W, W near the least sum over tasks t of |(W - tau_t) tau_t^T|^2 / |tau_t|^2.

    `iterative`: what the optimiser reaches from W = sum of tau_t; stopping early is what regularises. `direct`: the
    exact minimum of the loss with `damping` * (mean eigenvalue of C) * |W|^2 added, C the sum of
    tau_t^T tau_t / |tau_t|^2. `other` is what the remaining tensors add: nothing, the mean or the sum of the task
    vectors.

    Formula:
        L(W) = Σₜ ‖(W − τₜ) τₜᵀ‖² / ‖τₜ‖², descended from W = Σₜ τₜ
        θ₀ + scale · W
    Parameters:
        solver: what the optimiser reaches, or the exact minimum of the damped loss
        damping: of the direct solver, in mean eigenvalues of C
    Spectral work:
        an N x N Gram matrix a matrix, and a product with it a step; of the direct solver, one Cholesky
        factorisation
    Trap:
        Stopping early is the regulariser: more iterations are another method, not a better minimum. Tensors
        that are no block matrices stay the base's unless `other` says otherwise.
    """
    base = x.base.double()
    if not is_matrix(x.name, x.shape, keys):
        return base + scale * ops.plain_update(x.experts, base, other)

    def update() -> Tensor:
        direct = solver == "direct"
        start_MN = torch.zeros_like(base) if direct else ops.plain_update(x.experts, base, "sum")
        curvature_NN, slope_MN = spectral.interference_of_tasks(x, base, start_MN)
        if direct:
            return spectral.damped_minimum(curvature_NN, slope_MN, damping)
        setting = {"optimizer": optimizer, "learning_rate": learning_rate, "iterations": iterations}
        return start_MN + spectral.descended(curvature_NN, slope_MN, x.dtype, **setting)

    ways = ("direct", damping) if solver == "direct" else (optimizer, learning_rate, iterations)
    return torch.add(base, x.share(("wudi", *ways), update), alpha=scale)
