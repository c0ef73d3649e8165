"""Entries of task vectors that are kept, the others zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Sequence

from mergeline.merging.algebra.device import on_cpu
from mergeline.merging.algebra.slots import Slot, Views
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


_LEAST_NORM = 1e-7  # mergekit's, below which nothing is rescaled


def for_each(value: float | Sequence[float], experts: int) -> list[float]:
    """One number an expert, of one for all or of a list."""
    return list(value) if isinstance(value, Sequence) else [value] * experts


def trimmed(x: Slot, thresholds: Sequence[float]) -> list[Tensor]:
    """The task vectors without the entries below each one's threshold: T times (X)."""
    return [keep_at_least(tau_X, threshold) for tau_X, threshold in zip(x.task_vectors, thresholds)]


def l1_ratios(views: Views, sparse: Callable[[Slot], Sequence[Tensor]]) -> list[float]:
    """What mergekit multiplies sparse task vectors by: the L1 norm before over that after, one an expert."""
    before, after = [0.0] * views.experts, [0.0] * views.experts
    for view in views.views:
        for x in view.blocks("element"):
            for t, (tau_X, kept_X) in enumerate(zip(x.task_vectors, sparse(x))):
                before[t] += float(tau_X.abs().sum(dtype=torch.float64))
                after[t] += float(kept_X.abs().sum(dtype=torch.float64))
    return [b / a if min(a, b) >= _LEAST_NORM else 1.0 for b, a in zip(before, after)]


def keep_at_least(tau_X: Tensor, threshold: float) -> Tensor:
    """Zero the entries whose float32 magnitude is below the threshold; equals are kept."""
    if threshold <= 0:
        return tau_X
    if tau_X.dtype == torch.float64:
        return tau_X * (tau_X.float().abs() >= threshold)
    below = torch.nextafter(torch.tensor(threshold), torch.tensor(0.0))
    return torch.nn.functional.hardshrink(tau_X, below.item())  # keeps what is greater


def keep_between(tau_X: Tensor, least: float | Tensor, most: float | Tensor) -> Tensor:
    """Zero the entries whose float32 magnitude is below `least` or above `most`; equals are kept."""
    if isinstance(most, float) and not isinstance(least, torch.Tensor) and tau_X.dtype == torch.float32:
        kept_X = keep_at_least(tau_X, least)
        return kept_X - torch.nn.functional.hardshrink(kept_X, most)
    size_X = tau_X.float().abs()
    if on_cpu(tau_X):
        # NumPy takes half as long, for the same bits.
        size, low, high = (v.numpy() if isinstance(v, torch.Tensor) else v for v in (size_X, least, most))
        kept = size >= low
        kept &= size <= high
        return torch.from_numpy(tau_X.numpy() * kept)
    return tau_X * ((size_X >= least) & (size_X <= most))
