"""DRM: entries merged by sign in the common singular basis of all task vectors, the small ones dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Iterator, Literal, Mapping

from mergeline.merging.algebra import combine, directions
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import Note, method
from mergeline.merging.methods.parameters import BelowOne

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-2  # of the largest singular value: smaller ones are left out


def _pointless(params: Mapping[str, Any], experts: int) -> Iterator[str]:
    if params["drop_rate"] == 0:
        yield Note(
            "drop_rate 0 drops nothing, so that norms of rows do not matter: entries merge by sign in the common basis"
        )


def _by_sign(x: Slot, **_: Any) -> Tensor:
    """The mean of the entries that have the sign of their sum: (X)."""
    return _mean_of_signed(x.task_vectors, 0.0)


@method(
    paper="2505.23117",
    code="yophis/decom-renorm-merge@8c0f961c",
    scale=1.0,
    keys="block_linear",
    other=_by_sign,
    needs=("base",),
    check=_pointless,
    spectral=lambda rows, columns, experts: 4 * experts * rows * columns + 6 * max(rows, columns) ** 2,
)
def drm(
    x: Slot, *, drop_rate: BelowOne = 0.8, direction: Literal["horizontal", "vertical"] = "horizontal"
) -> Tensor | None:
    """base + scale * U M, M the rotated task vectors U^T tau_t merged by sign, without entries small for their row.

    The task vectors are stacked side by side (`horizontal`) or one below the other (`vertical`, the same of transposed
    matrices). U are the left singular vectors whose singular values are above 0.01 of the largest. Rows of U^T tau_t
    are brought to norm 1 for choosing alone: the largest round((1 - drop_rate) * elements) and one more, of all experts
    together, are kept, with the lengths that they had. Each entry of M is the mean of those that were kept and have the
    sign of their sum, where that is 0 the sign that most sums have. Other tensors are merged by sign in the same way,
    none dropped.

    At `drop_rate: 0` the official code leaves the basis out, and adds the mean of the entries that are not zero,
    whatever their signs. Here 0 is what numbers near it are: nothing is dropped, and signs are elected in the basis.

    Formula:
        U S [V₁ … V_T]ᵀ = [τ₁ … τ_T], where S > 0.01 · the largest
        Wₜ = Uᵀ τₜ;  kept: |Wₜ| over the norm of its row among the largest 1 − drop_rate of all t
        M = the mean of the kept entries that have the sign of Σₜ (kept Wₜ)
        θ₀ + scale · U M
    Parameters:
        drop_rate: share of the entries that is dropped
        direction: side by side, with a common left basis, or one below the other, with a common right one
    Spectral work:
        an eigendecomposition of the M x M (vertical: N x N) sum of Gram matrices, a matrix, which `--factors` keeps
    Trap:
        Parts of task vectors in directions below 0.01 of the largest singular value are lost, so that one expert does
        not come back. Which direction is better differs from model to model, and the official code's example and its
        default disagree. It splits packed attention in three if asked to; here it is one matrix.
    """
    tall = direction == "vertical"
    energy_K, basis_MK = x.shared(directions.common_directions, tall)
    basis_MK = basis_MK[:, energy_K.sqrt() > _LEAST * energy_K[:1].sqrt()]
    if not basis_MK.shape[1]:
        return None
    tau_TKN = basis_MK.new_empty(len(x.experts), basis_MK.shape[1], x.shape[0 if tall else 1])
    for t, rotated_KN in enumerate(tau_TKN):
        tau_MN = directions.task_vector(x, t)
        torch.mm(basis_MK.T, tau_MN.T if tall else tau_MN, out=rotated_KN)
    merged_KN = _mean_of_signed(_kept(tau_TKN, drop_rate), None)
    update_MN = basis_MK @ merged_KN
    return update_MN.T if tall else update_MN


def _kept(tau_TKN: Tensor, drop_rate: float) -> Tensor:
    """The entries that are large for their row, the others zero; in their place."""
    dropped = tau_TKN.numel() - round(tau_TKN.numel() * (1 - drop_rate))
    if not dropped:
        return tau_TKN
    size_TKN = tau_TKN.abs()
    size_TKN.div_(tau_TKN.norm(dim=2, keepdim=True).clamp(min=torch.finfo(tau_TKN.dtype).tiny))
    least = size_TKN.flatten().kthvalue(dropped).values
    return tau_TKN.mul_(size_TKN >= least)


def _mean_of_signed(tau_TX: Tensor, zero: float | None) -> Tensor:
    """The mean of the entries that have the sign of their sum; where that is 0, `zero`, or the sign of most sums."""
    if zero is None:
        zero = float(combine.elect_signs(tau_TX, None, 0.0).sum().sign())
    sum_X, count_X = combine.orthant_sum(tau_TX, combine.elect_signs(tau_TX, None, zero))
    return sum_X.div_(count_X.clamp_(min=1))
