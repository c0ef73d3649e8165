"""Quadratic losses of a merged task vector: WUDI's interference, optimisers on it, and its minimum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, Iterable

from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.algebra.directions import task_vector
from mergeline.merging.algebra.linear import inner, mirrored
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def descend(
    slope: Callable[[Tensor], Tensor],
    like_X: Tensor,
    *,
    optimizer: str,
    learning_rate: float,
    iterations: int,
    momentum: float = 0.0,
) -> Tensor:
    """Where Adam, or SGD with momentum, gets from zero in so many steps along a gradient, as torch's own do: (X)."""
    at_X, mean_X, square_X = (torch.zeros_like(like_X) for _ in range(3))
    for step in range(1, iterations + 1):
        slope_X = slope(at_X)
        if optimizer == "sgd":
            at_X -= mean_X.mul_(momentum).add_(slope_X).mul(learning_rate)
            continue
        mean_X.lerp_(slope_X, 0.1)
        square_X.mul_(0.999).addcmul_(slope_X, slope_X, value=0.001)
        size_X = square_X.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
        at_X.addcdiv_(mean_X, size_X, value=-learning_rate / (1 - 0.9**step))
    return at_X


def interference(start_MN: Tensor, terms: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Curvature C (N, N) and slope G (M, N) of WUDI's loss (2503.08099) at a float64 start: d -> 2 (d C + G).

    The loss of a merged task vector W is the sum over terms (target (M, N), rows (L, N), size) of
    |(W - target) rows^T|^2 / size; terms of size 0 say nothing. It is quadratic: C is the sum of rows^T rows / size, G
    of (start - target) rows^T rows / size, and the gradient at start + d is 2 (d C + G).
    """
    slope_MN = torch.zeros_like(start_MN)
    curvature_NN = start_MN.new_zeros(start_MN.shape[1], start_MN.shape[1])
    for target_MN, rows_LN, size in terms:
        if not size > 0:
            continue
        apart_MN, inner_NN = (start_MN - target_MN).div_(size), inner(rows_LN)
        if rows_LN.shape[0] < rows_LN.shape[1]:
            slope_MN.addmm_(apart_MN @ rows_LN.T, rows_LN)
        else:
            slope_MN.addmm_(apart_MN, mirrored(inner_NN))
        curvature_NN.add_(inner_NN.div_(size))
    return mirrored(curvature_NN), slope_MN


def interference_of_tasks(x: Slot, start_MN: Tensor, norm_power: float = 2.0) -> tuple[Tensor, Tensor]:
    """`interference` where every task vector is the target, the rows and, as a power of its norm, the size of a term.

    Sizes are norms to this power, times what gives C the trace that it has with their squares: 1 a task vector.
    """
    taus = (task_vector(x, t) for t in range(len(x.experts)))
    if norm_power == 2:
        return interference(start_MN, ((tau_MN, tau_MN, tau_MN.square().sum()) for tau_MN in taus))
    energies = [float(task_vector(x, t).square().sum()) for t in range(len(x.experts))]
    shares = [energy ** (1 - norm_power / 2) for energy in energies if energy > 0]
    unit = sum(shares) / max(len(shares), 1)
    sizes = [start_MN.new_tensor(energy ** (norm_power / 2) * unit) for energy in energies]
    return interference(start_MN, ((tau_MN, tau_MN, size) for tau_MN, size in zip(taus, sizes)))


def descended(curvature_NN: Tensor, slope_MN: Tensor, dtype: torch.dtype, **optimizer: Any) -> Tensor:
    """The displacement by which an optimiser (see `operators.descend`) lowers a loss of this curvature and slope.

    Each step is one product of matrices, in `dtype`; the slope at the start, in which task vectors cancel, is exact.
    """
    curvature_NN, slope_MN = curvature_NN.to(dtype), slope_MN.to(dtype)
    return descend(
        lambda at_MN: torch.addmm(slope_MN, at_MN, curvature_NN).mul_(2), slope_MN, **optimizer
    ).double()


def damped_minimum(curvature_NN: Tensor, slope_MN: Tensor, damping: float) -> Tensor:
    """The displacement to the minimum of such a loss plus damping * (mean eigenvalue of C) * |displacement|^2."""
    added = damping * curvature_NN.diagonal().mean()
    if not added > 0:
        return torch.zeros_like(slope_MN)
    curvature_NN.diagonal().add_(added)
    return -divided(slope_MN, curvature_NN)


def divided(b_MN: Tensor, a_NN: Tensor) -> Tensor:
    """B A^-1 for a positive definite float64 matrix A, which is overwritten: (M, N)."""
    if on_cpu(b_MN):
        from scipy.linalg import cho_factor, cho_solve

        factor = cho_factor(a_NN.numpy(), lower=True, overwrite_a=True, check_finite=False)
        return torch.from_numpy(cho_solve(factor, b_MN.numpy().T, check_finite=False).T)
    return torch.cholesky_solve(b_MN.T, torch.linalg.cholesky(a_NN)).T
