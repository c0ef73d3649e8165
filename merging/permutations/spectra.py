"""Whether the leading singular vectors of two models' matrices point the same way.

That is what matching changes (Ito, Kumagai & Yamada 2024, arXiv 2402.04051): a permutation leaves singular values as
they are, and the distance nearly so, but turns the leading vectors to one another, on which merging rests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra.decompositions import singular_triplets
from mergeline.merging.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 0.1  # of the singular vectors, which are the leading ones


def overlap(a_MN: Tensor, b_MN: Tensor, share: float = SHARE) -> float:
    """sum over i, j of <u_i, u'_j> <v_i, v'_j> over the K leading pairs of each, over K: 1 where all are the same.

    Of matrices that have nothing to do with one another it is near 0. K: `share` of the smaller side, 1 at least.
    """
    count = max(1, round(share * min(a_MN.shape)))
    (u_MK, _, v_NK), (w_MK, _, x_NK) = (singular_triplets(m.double(), count) for m in (a_MN, b_MN))
    return float(torch.sum((u_MK.T @ w_MK) * (v_NK.T @ x_NK))) / count
