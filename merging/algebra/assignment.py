"""Rows that have no order of their own, matched to those of a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Sequence

from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def matched(reference: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The order of rows that is most like the reference's, (I,): `other[...][order]`.

    reference, other: matrices with a row (I, ...) for each thing that is matched; row i of all is of one thing. The sum
    of the products of matched rows is as large as it can be, and so the sum of their squared distances as small.
    """
    from scipy.optimize import linear_sum_assignment

    products_II = sum(a_IN @ b_IN.T for a_IN, b_IN in zip(reference, other))
    assert isinstance(products_II, torch.Tensor)
    return torch.from_numpy(linear_sum_assignment(products_II.cpu().numpy(), maximize=True)[1])
