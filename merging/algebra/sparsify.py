"""Entries of task vectors that are kept, the others zero."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def for_each(value: float | Sequence[float], experts: int) -> list[float]:
    """One number an expert, of one for all or of a list."""
    return list(value) if isinstance(value, Sequence) else [value] * experts


def trimmed(x: Slot, thresholds: Sequence[float]) -> list[Tensor]:
    """The task vectors without the entries below each one's threshold: T times (X)."""
    return [keep_at_least(tau_X, threshold) for tau_X, threshold in zip(x.task_vectors, thresholds)]


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
    return tau_X * ((size_X >= least) & (size_X <= most))
