"""Core Space: low-rank adapters merged in the small space that all of them span."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from mergeline.merging.algebra import decompositions, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.bound import Inner
from mergeline.merging.methods.contract import Factors, method

if TYPE_CHECKING:
    from torch import Tensor


def _space(x: Slot) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """The factors (M, R) and (R, N) of what each expert adds, and bases of their columns (M, K) and rows (N, L)."""
    pairs = [x.factors(t) or _decomposed(x, t) for t in range(len(x.experts))]
    lefts, rights = zip(*pairs)
    left_MK, _ = torch.linalg.qr(torch.cat(lefts, dim=1))
    right_NL, _ = torch.linalg.qr(torch.cat(rights).T)
    return pairs, left_MK, right_NL


def _decomposed(x: Slot, t: int) -> tuple[Tensor, Tensor]:
    """The same of an expert that is no adapter."""
    added_MN = directions.task_vector(x, t) if x.has_base else x.experts[t].double()
    u_MR, s_R, v_NR = decompositions.singular_triplets(added_MN)
    return u_MR * s_R, v_NR.T


def core(x: Slot, **_: Any) -> Slot:
    """What each expert adds, in the bases of all, around zero: (K, L)."""
    pairs, left_MK, right_NL = x.once(_space)
    shape = left_MK.shape[1], right_NL.shape[1]
    return x.replaced(
        shape,
        left_MK.new_zeros(shape),
        lambda t: (left_MK.T @ pairs[t][0]) @ (pairs[t][1] @ right_NL),
    )


def _factors(x: Slot, merge: Inner, **_: Any) -> tuple[Tensor, Tensor]:
    _, left_MK, right_NL = x.once(_space)
    if not left_MK.shape[1]:
        return left_MK, right_NL.T
    return left_MK @ merge.weights().double(), right_NL.T


@method(
    paper="2509.17786",
    code="apanariello4/core-space-merging@85176fab",
    keys="matrices",
    needs=("delta",),
    transform=core,
    inner_defaults={"keys": "matrices", "rank_rounding": "ceil"},
    spectral=lambda rows, columns, experts: 5 * experts * rows * columns,
    factors=Factors(_factors),
)
def core_space(
    x: Slot,
    merge: Inner,
    *,
    inner: Literal["tsv_merge", "task_arithmetic", "iso_c", "cart"] = "tsv_merge",
) -> Tensor | None:
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
    left_ML, right_LN = _factors(x, merge)
    return left_ML @ right_LN if left_ML.shape[1] else None
