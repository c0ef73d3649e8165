"""Task vectors cut to low rank before another merge sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import directions, linear
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import Share

if TYPE_CHECKING:
    from torch import Tensor


def cut(x: Slot, *, rank: float, energy: float | None, inner: str) -> Slot:
    """The slot with the low-rank parts of its task vectors."""
    k = None if energy is not None else linear.rank_of(rank, x.shape)
    if k == min(x.shape):
        return x.with_experts(lambda _, expert_MN: expert_MN.double(), wide=True)

    def leading_part(t: int) -> Tensor:
        energy_L, left_ML, right_NL = directions.factors(x, t, k, torch.float64)
        kept = linear.rank_for_energy(energy_L, energy or 1.0) if k is None else k
        return left_ML[:, :kept] @ right_NL[:, :kept].T

    return x.with_task_vectors(leading_part, wide=True, keep=True)


@method(
    paper="2412.12153",
    code="david3684/AdaRank@dfa53581",
    reference="none",
    keys="block_linear",
    other="inner",
    needs=("base",),
    transform=cut,
    spectral=True,
)
def truncate(
    x: Slot,
    merge: Inner,
    *,
    inner: str = "task_arithmetic",
    rank: Share = 0.12,
    energy: Share | None = None,
) -> Tensor:
    """Another merge of experts whose task vectors are cut to rank k = max(1, int(rank * min(M, N))).

    With `energy`, to the smallest rank that holds this share of the squared singular values. Tensors that are no block
    matrices pass whole. The inner method's parameters stand beside these.

    Formula:
        inner merge of the θ₀ + P_k(τₜ);  k = max(1, int(rank · min(M, N)))
    Parameters:
        energy: share of the squared singular values that is kept, in place of `rank`
    Spectral work:
        an eigendecomposition of the smaller Gram matrix, of every matrix and expert; `--factors` keeps it
    Trap:
        An inner method that looks at tensors before it merges them, such as ties, has them decomposed at
        every look unless factors are kept.
    """
    return merge.weights()
