"""A matrix as a product of two narrow ones and a few rows of what they leave: LoSparse (arXiv 2306.11222), as MC-SMoE
(2310.01334) keeps experts.

Shape suffixes: M rows out, N columns in, K kept directions, P kept rows of the rest.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, NamedTuple, Sequence

from mergeline.merging.algebra.decompositions import balanced, leading, triplets
from mergeline.merging.algebra.linear import gram
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class LowRankSparse(NamedTuple):
    """L (M, K) and R (K, N), each with the square roots of the singular values; which rows of S are kept, (M,) bool,
    and these (P, N)."""

    left_MK: Tensor
    right_KN: Tensor
    kept_M: Tensor
    rows_PN: Tensor

    def dense(self) -> Tensor:
        """L R + S: (M, N) float64."""
        whole_MN = self.left_MK.double() @ self.right_KN.double()
        whole_MN[self.kept_M] += self.rows_PN.double()
        return whole_MN


def rank_for_parameters(ratio: float, shape: Sequence[int]) -> int:
    """The least rank at which two factors have `ratio` times the numbers of a matrix, as the official code counts."""
    rows, columns = shape
    return min(ceil(ratio * (rows * columns) / (rows + columns)), rows, columns)


def row_count(share: float, shape: Sequence[int]) -> int:
    """How many rows a share of them is, rounded down."""
    return int(share * shape[0])


def split(a_MN: Tensor, rank: int, rows: int, dtype: torch.dtype | None = None) -> LowRankSparse:
    """A float64 matrix cut to a rank, and so many rows of what the cut leaves: those of the largest mean magnitude.

    The factors are rounded to `dtype` (None: float64) first, so that kept rows hold what the rounding lost, too. Of
    equal rows the earlier one counts.
    """
    dtype = dtype or torch.float64
    _, q_RK = leading(gram(a_MN), rank)
    left_MK, right_KN = (part.to(dtype) for part in balanced(*triplets(a_MN, q_RK)))
    rest_MN = a_MN - left_MK.double() @ right_KN.double()
    order_M = rest_MN.abs().mean(dim=1).sort(descending=True, stable=True).indices
    kept_M = torch.zeros(len(a_MN), dtype=torch.bool, device=a_MN.device)
    kept_M[order_M[:rows]] = True
    return LowRankSparse(left_MK.contiguous(), right_KN.contiguous(), kept_M, rest_MN[kept_M].to(dtype))
