"""RobustMerge: adapters pruned factor by factor, each direction rescaled by what pruning took from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeline.merging.algebra import combine, sums
from mergeline.merging.algebra.slots import Slot
from mergeline.merging.errors import UserError
from mergeline.merging.lazy import torch
from mergeline.merging.methods.contract import method
from mergeline.merging.methods.parameters import BelowOne

if TYPE_CHECKING:
    from torch import Tensor


@method(
    paper="2502.17159",
    code="AuroraZengfh/RobustMerge@12128022",
    keys="matrices",
    other="mean",
    needs=("delta",),
)
def robust_merge(
    x: Slot, *, mask_ratio: BelowOne = 0.2, att_ratio: BelowOne = 0.2, scale: float = 2.0
) -> Tensor:
    """base + B A of LoRA adapters: A = scale * sum of pruned A_t, B = scale * sum of s_t pruned B_t / sum of s_t.

    Of each factor, the entries that are at least as large as the one of rank int((1 - mask_ratio) * size) stay. s_t has
    a number a direction: the L1 norm of its row of A_t before pruning over that after, but at least what stands at
    place int((1 - att_ratio) * R) of all R in ascending order. What no adapter changes is averaged. The official code
    writes A and B, here their product is added.

    Formula:
        A = scale · Σₜ pruned Aₜ;  B = scale · Σₜ sₜ · pruned Bₜ / Σₜ sₜ
        θ₀ + B A;  sₜ = ‖rows of Aₜ‖₁ / ‖rows of pruned Aₜ‖₁, one number a direction
    Parameters:
        mask_ratio: share of the entries of a factor that are pruned
        att_ratio: share of the directions that keep their own sₜ; those of the others are lifted to the least
            of these
        scale: what both factors are multiplied by
    Needs:
        adapters of one rank
    Trap:
        `scale` counts twice: it multiplies A and B. Factors are pruned, not their product, so that the same
        BA in other factors merges differently.
    """
    pairs = [x.factors(t) for t in range(len(x.experts))]
    ranks = [pair[1].shape[0] if pair else 0 for pair in pairs]
    if not any(ranks):
        return combine.plain_update(x, "mean") if x.has_base else sums.mean(x.experts)
    if len(set(ranks)) > 1:
        raise UserError(
            f"robust_merge: adapters of different ranks, {ranks}, for '{x.name}'; give them one rank"
        )
    up_TMR, down_TRN = (torch.stack(side) for side in zip(*(pair for pair in pairs if pair)))
    left_TRN = _pruned(down_TRN, mask_ratio)
    size_TR = down_TRN.abs().sum(-1) / left_TRN.abs().sum(-1)
    size_TR = torch.where(left_TRN.any(-1), size_TR, 1.0)  # a direction without entries counts for nothing
    least = min(int(ranks[0] * (1 - att_ratio)), ranks[0] - 1)
    size_TR = torch.maximum(size_TR, size_TR.sort(dim=-1).values[:, least, None])
    up_MR = (_pruned(up_TMR, mask_ratio) * size_TR[:, None]).sum(0) / size_TR.sum(0)
    return (scale * up_MR) @ (scale * left_TRN.sum(0))


def _pruned(factors_TAB: Tensor, ratio: float) -> Tensor:
    """The factors of all adapters without the small entries of each."""
    size_TE = factors_TAB.abs().flatten(1)
    kth = max(1, int(size_TE.shape[1] * (1 - ratio)))
    least_T = size_TE.kthvalue(kth, dim=1).values
    return factors_TAB * (factors_TAB.abs() >= least_T[:, None, None])
