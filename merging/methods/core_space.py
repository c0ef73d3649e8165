"""Core Space: low-rank adapters merged in the small space that all of them span."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Mapping, Sequence

from merging import operators as ops
from merging import spectral
from merging.keys import Keys, is_matrix
from merging.lazy import torch
from merging.methods import Inner, method
from merging.slots import Slot

if TYPE_CHECKING:
    from torch import Tensor


def _space(x: Slot) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The factors (M, R) and (R, N) of what each expert adds, and bases of their columns (M, K) and rows (N, L)."""

    def make() -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
        pairs = [x.factors(t) or _decomposed(x, t) for t in range(len(x.experts))]
        lefts, rights = zip(*pairs)
        left_MK, _ = torch.linalg.qr(torch.cat(lefts, dim=1))
        right_NL, _ = torch.linalg.qr(torch.cat(rights).T)
        return pairs, left_MK, right_NL

    return x.remember("core space", make)


def _decomposed(x: Slot, t: int) -> tuple[Tensor, Tensor]:
    """The same of an expert that is no adapter."""
    expert_MN = x.experts[t].double()
    u_MR, s_R, v_NR = spectral.singular_triplets(expert_MN if x.base is None else expert_MN - x.base.double())
    return u_MR * s_R, v_NR.T


def core(x: Slot, **_: Any) -> Slot:
    """What each expert adds, in the bases of all, around zero: (K, L)."""
    pairs, left_MK, right_NL = _space(x)
    shape = left_MK.shape[1], right_NL.shape[1]
    return x.instead(
        shape,
        left_MK.new_zeros(shape),
        lambda t: (left_MK.T @ pairs[t][0]) @ (pairs[t][1] @ right_NL),
    )


def sees(name: str, shape: Sequence[int], params: Mapping[str, Any]) -> bool:
    return is_matrix(name, shape, params["keys"])


def _factors(x: Slot, merge: Inner, *, keys: Keys, **_: Any) -> tuple[Tensor, Tensor]:
    _, left_MK, right_NL = _space(x)
    if not sees(x.name, x.shape, {"keys": keys}) or not left_MK.shape[1]:
        return left_MK[:, :0], right_NL[:, :0].T
    return left_MK @ merge(x).double(), right_NL.T


@method(
    family="adapters",
    paper="2509.17786",
    code="apanariello4/core-space-merging@85176fab",
    reference="pretrained",
    unit="matrix",
    transform=core,
    sees=sees,
    inner_defaults={"keys": "matrices", "rank_rounding": "ceil"},
    spectral=True,
    beside=lambda rows, columns, experts: 5 * experts * rows * columns,
    delta=True,
    as_factors=_factors,
)
def core_space(
    x: Slot,
    merge: Inner,
    *,
    inner: Literal["tsv_merge", "task_arithmetic", "iso_c", "cart"] = "tsv_merge",
    keys: Keys = "matrices",
) -> Tensor:
    """base + Q_B * another merge of the cores Q_B^T B_t A_t Q_A * Q_A^T; other tensors: base.

    B_t A_t is what adapter t adds; Q_B and Q_A are orthonormal bases of all columns of B and rows of A. Experts that
    are no adapters are decomposed. Without a base, the result is what is added. The inner method's parameters stand
    beside these.

    Formula:
        BₜAₜ = what adapter t adds;  Q_B, Q_A = orthonormal bases of [B₁ … B_T] and [A₁ᵀ … A_Tᵀ]
        θ₀ + Q_B · inner merge of the (Q_Bᵀ Bₜ Aₜ Q_A) · Q_Aᵀ
    Needs:
        adapters; experts that are none are decomposed
    Spectral work:
        two QR decompositions a matrix, and what the inner method decomposes, which is as small as the ranks
        together
    Trap:
        With iso_c inside, singular values are averaged over the core alone, so that it is not iso_c by
        itself; task_arithmetic inside is task_arithmetic. Ranks should sum to no more than min(M, N).
    """
    if not sees(x.name, x.shape, {"keys": keys}):
        return ops.mean(x.experts) if x.base is None else x.base.double()
    left_ML, right_LN = _factors(x, merge, keys=keys)
    start = left_ML.new_zeros(x.shape) if x.base is None else x.base.double()
    return start + left_ML @ right_LN if left_ML.shape[1] else start
