"""Products of rows that are summed in float64: X^T X, of which only what is on and above the diagonal is computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Iterator

if TYPE_CHECKING:
    from torch import Tensor

ROWS = 1 << 12  # whose products are summed in their own dtype, at most
NOT_FINITE = "examples give NaN or Inf inside of a model; look at the examples and the experts"
_WIDTH = 192  # of a strip


def strips(x_RN: Tensor, left_RN: Tensor | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
    """x^T x, or left^T x where that is symmetric, from its diagonal on, in strips: rows, columns, and what is there.

    What is left of the diagonal within a strip's first columns is computed, too; nothing else is.
    """
    left_RN, width = x_RN if left_RN is None else left_RN, x_RN.shape[1]
    for start in range(0, width, _WIDTH):
        rows = slice(start, min(start + _WIDTH, width))
        yield rows, slice(start, width), left_RN[:, rows].T @ x_RN[:, start:]


def mirrored(sum_NN: Tensor) -> Tensor:
    """The symmetric matrix with these entries on and above its diagonal."""
    upper_NN = sum_NN.triu()
    return upper_NN + upper_NN.T - upper_NN.diagonal().diag()
