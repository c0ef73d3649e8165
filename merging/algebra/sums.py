"""Sums over experts, one at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterable, Iterator, Protocol, Sequence

from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 17  # elements


class Tensors(Protocol):
    """T times (X): a list, a stack (T, *X), or the experts of a slot."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def __getitem__(self, t: int, /) -> Tensor: ...


def weighted_sum(
    tensors: Iterable[Tensor], weights: Sequence[float] | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Sum over experts of weight x tensor, one at a time, in float64 or `dtype`; `None` means weight 1 for all."""
    sum_X: Tensor | None = None
    for t, tensor_X in enumerate(tensors):
        weight = 1.0 if weights is None else float(weights[t])
        if sum_X is None:
            sum_X = tensor_X.to(dtype or torch.float64, copy=True)
            if weight != 1.0:
                sum_X.mul_(weight)
        else:  # converted first: adding float32 to float64 is three times slower; in pieces that caches hold
            for sum_P, piece_P in zip(sum_X.view(-1).split(_PIECE), tensor_X.reshape(-1).split(_PIECE)):
                sum_P.add_(piece_P.to(sum_P.dtype), alpha=weight)
    assert sum_X is not None
    return sum_X


def added(tensors: Iterable[Tensor]) -> Tensor:
    """Sum of tensors of one shape, in their own dtype."""
    return sum(tensors, start=torch.zeros(()))


def mean(tensors: Tensors, dtype: torch.dtype | None = None) -> Tensor:
    """Mean over experts in float64 or `dtype`: copies of one tensor give back that tensor, bit for bit."""
    return weighted_sum(tensors, dtype=dtype).div_(len(tensors))


def weighted_mean(
    tensors: Iterable[Tensor], weights: Sequence[float], dtype: torch.dtype | None = None
) -> Tensor:
    """`weighted_sum` with the weights divided by their sum."""
    return weighted_sum(tensors, [weight / sum(weights) for weight in weights], dtype)


def total(tau_TX: Tensors, weights: Sequence[float] | None = None) -> Tensor:
    """Sum over experts of weight x tensor, in the tensors' own dtype."""
    sum_X = tau_TX[0].clone() if weights is None else tau_TX[0] * weights[0]
    for t in range(1, len(tau_TX)):
        sum_X.add_(tau_TX[t], alpha=1.0 if weights is None else weights[t])
    return sum_X
