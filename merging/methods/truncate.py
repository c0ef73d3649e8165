"""Task vectors cut to low rank before another merge sees them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from merging import spectral
from merging.keys import Keys, is_matrix
from merging.methods import Inner, method
from merging.methods.cart import Share
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def cut(x: Slot, *, rank: float, energy: float | None, keys: Keys, inner: str) -> Slot:
    """The slot with the low-rank parts of its matrices' task vectors; other tensors as they are."""
    if not is_matrix(x.name, x.tensor_shape, keys):
        return x.given(x.facts, x.measured)
    k = None if energy is not None else spectral.rank_of(rank, x.shape)
    base_MN = x.base.double()

    def change(t: int, expert_MN: Tensor) -> Tensor:
        if k == min(x.shape):
            return expert_MN.double()
        energy_L, left_ML, right_NL = spectral.factors(x, t, base_MN, "pretrained", k, base_MN.dtype)
        kept = k or spectral.rank_for_energy(energy_L, energy)
        return base_MN.addmm(left_ML[:, :kept], right_NL[:, :kept].T)

    return x.with_experts(change, wide=True, keep=True)


@method(
    family="wrapper",
    paper="2412.12153",
    code="david3684/AdaRank@dfa53581",
    reference="pretrained",
    unit="matrix",
    needs_base=True,
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
    keys: Keys = "block_linear",
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
    return merge(x)
